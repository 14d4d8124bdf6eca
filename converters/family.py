"""What a model family is: its configuration and its tensors as one closed-world table, readable in both directions.

Closed world: every key of the foreign configuration and every foreign tensor is consumed, produced or listed as
ignored, and so is every feature of ModelConfig. Anything else is an error that names it; nothing is skipped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from pydantic import ValidationError

from converters.fields import FieldFault, FieldRule, Fixed
from converters.names import summarise
from converters.rules import Rule
from workbench import registry
from workbench.errors import ConversionError
from workbench.spec.model import ModelConfig
from workbench.spec.schema import logical_tensors

_PACKAGE: Final = "converters.families"
# Keys of every transformers configuration that say nothing of what a decoder computes. Text generation settings of
# old configurations are among them (transformers 5 drops them when it loads).
_HARMLESS_WORDS: Final = """
    architectures model_type dtype torch_dtype transformers_version use_cache return_dict return_dict_in_generate
    output_hidden_states output_attentions output_scores name_or_path id2label label2id num_labels problem_type
    finetuning_task task_specific_params tokenizer_class prefix sep_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id is_decoder gradient_checkpointing torchscript use_bfloat16 tf_legacy_loss
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    attn_implementation _attn_implementation_autoset _name_or_path _commit_hash unsloth_version unsloth_fixed
"""
HARMLESS: Final = frozenset(_HARMLESS_WORDS.split())
FIXED: Final = (
    Fixed("is_encoder_decoder", (False,)),
    Fixed("add_cross_attention", (False,)),
    Fixed("chunk_size_feed_forward", (0,)),
    Fixed("cross_attention_hidden_size", (None,)),
    Fixed("tie_encoder_decoder", (False,)),
    Fixed("pruned_heads", (None, {})),
    Fixed("quantization_config", (None,)),
    Fixed("auto_map", (None, {})),
)

LABELS: Final = {"num_labels", "label_tokens", "problem_type"}
"""Fields that are the class's, or written for all families alike."""

DROPOUTS: Final = {"mlp_dropout": 0.0, "final_dropout": 0.0, "classifier_dropout": 0.0}
"""Fields that few families can say; for inference none needs to."""


@dataclass(frozen=True)
class IgnoredTensor:
    """Foreign tensors that carry no weights of the model, and why; `{i}` is the layer."""

    pattern: str
    why: str

    def matches(self, name: str) -> bool:
        return re.fullmatch(re.escape(self.pattern).replace(r"\{i\}", r"\d+"), name) is not None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family of transformers.

    causal_lm, sequence_classification, token_classification: the classes of transformers with these heads, and body the
    one without, where the family has them. other_classes: further classes, each with the features that it stands for;
    one of those above has its features here. The first of all is what a configuration without a class means.
    prefix: what a model with a head puts before the names of its body; files of the bare body lack it.
    features: fields of ModelConfig that have one value in this family; what is named nowhere has its default, which for
    a feature is to be without it. unused: fields that mean nothing in it.
    training_only: fields that the family cannot say and inference does not need, with the value they get on import.
    harmless: keys beyond HARMLESS that may have any value. also_read: another table of rules, by which some files of
    this family are stored; written are always those of `rules`. renamed: words in names of tensors, and what they were
    in old files. repeats: tensors that old files hold although they must equal others, by the name of that other.
    """

    name: str
    model_type: str
    causal_lm: str | None = None
    sequence_classification: str | None = None
    token_classification: str | None = None
    body: str | None = None
    other_classes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    prefix: str
    fields: tuple[FieldRule, ...]
    features: Mapping[str, Any]
    training_only: Mapping[str, Any]
    rules: Callable[[ModelConfig], tuple[Rule, ...]]
    also_read: Callable[[ModelConfig], tuple[Rule, ...]] | None = None
    unused: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    ignored: tuple[IgnoredTensor, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    repeats: Mapping[str, str] = field(default_factory=dict)
    faults: Callable[[ModelConfig], list[str]] = field(default=lambda _: [])

    @property
    def _all_fields(self) -> tuple[FieldRule, ...]:
        """The family's own rules, and those of all families for keys that it does not name."""
        own = {key for rule in self.fields for key in rule.keys}
        return (*self.fields, *(rule for rule in FIXED if rule.key not in own))

    @property
    def classes(self) -> Mapping[str, Mapping[str, Any]]:
        """Every class of transformers that the family has, with the features that it stands for."""
        words: dict[str, Any] = {} if self.body is None else {"lm_head": True}
        own = {self.causal_lm: words, self.sequence_classification: {}, self.token_classification: {}}
        plain = {**own, self.body: {"lm_head": False}}
        named = {name: plain[name] for name in plain if name is not None and name not in self.other_classes}
        return {**named, **self.other_classes}

    def architecture(self, model: ModelConfig) -> str:
        """The class of transformers that this model is; ConversionError when there is none."""
        values = model.model_dump()
        for name, features in self.classes.items():
            labels = {self.sequence_classification: "row", self.token_classification: "tokens"}.get(name)
            has = None if not model.num_labels else "tokens" if model.label_tokens else "row"
            if labels == has and all(values[key] == features[key] for key in features):
                return name
        heads = {key: values[key] for features in self.classes.values() for key in features}
        labels_said = {"num_labels": model.num_labels, "label_tokens": model.label_tokens}
        said = ", ".join(f"{key}={value!r}" for key, value in {**labels_said, **heads}.items())
        raise ConversionError(f"none of {', '.join(self.classes)} has {said}")

    def current(self, name: str) -> str:
        """The name that a tensor has today, given the one that it may have had in an old file."""
        for today, once in self.renamed.items():
            name = name.replace(once, today)
        return name

    def load_config(self, given: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """The model that a foreign configuration describes; ConversionError with every key that has no place."""
        faults: list[str] = []
        values: dict[str, Any] = {**self.features, **self.training_only}
        try:
            values |= self._heads(given, faults)
        except (ArithmeticError, TypeError, ValueError) as error:
            faults.append(f"architectures, id2label, num_labels: {error}")
        for rule in self._all_fields:
            try:
                values |= rule.load(given)
            except FieldFault as fault:
                faults.append(str(fault))
            except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
                faults.append(f"{', '.join(f'{key}={given.get(key)!r}' for key in rule.keys)}: {error}")
        faults += [f"{key}={given[key]!r} is unknown" for key in sorted(set(given) - self._known_keys())]
        if not faults:
            try:
                return ModelConfig.model_validate(values)
            except ValidationError as error:
                faults = [f"{'.'.join(map(str, e['loc'])) or 'model'}: {e['msg']}" for e in error.errors()]
        raise ConversionError(f"{where}: family {self.name!r} has no place for: {'; '.join(faults)}")

    def _known_keys(self) -> set[str]:
        return {key for rule in self._all_fields for key in rule.keys} | HARMLESS | set(self.harmless)

    def _heads(self, given: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
        """The head of labels, and the features that the class of `given` stands for."""
        named = given.get("architectures") or list(self.classes)[:1]
        found = [name for name in self.classes if name in named]
        if not found:
            faults.append(f"architectures={named!r}, only {' and '.join(self.classes)}")
            return {"num_labels": 0}
        if found[0] not in (self.sequence_classification, self.token_classification):
            return {"num_labels": 0, **self.classes[found[0]]}
        labels = given.get("id2label")
        head = {
            "num_labels": len(labels) if labels else int(given.get("num_labels") or 2),
            "label_tokens": found[0] == self.token_classification,
            "problem_type": given.get("problem_type"),
        }
        return {**head, **self.classes[found[0]]}

    def dump_config(self, model: ModelConfig, dtype: str, original: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The foreign configuration of `model`, whose weights are of torch type `dtype`.

        `original`: the configuration that the model came from, if it did. Its harmless keys are carried over, and where
        it says the same in other words (or by leaving a key out) its words are kept. ConversionError with every field
        that the family cannot say.
        """
        original = original or {}
        rules = self._all_fields
        faults = [*self.faults(model), *self._feature_faults(model)]
        said: dict[str, Any] = {}
        for rule in rules:
            try:
                said |= rule.dump(model)
            except FieldFault as fault:
                faults.append(str(fault))
        try:
            self.architecture(model)
        except ConversionError as error:
            faults.append(str(error))
        if faults:
            raise ConversionError(f"family {self.name!r} cannot represent this model: {'; '.join(faults)}")
        written = {key: original[key] for key in original if key in HARMLESS or key in self.harmless}
        for rule in rules:
            words = original if original and _says_the_same(rule, original, said) else said
            written |= {key: words[key] for key in rule.keys if key in words}
        return dict(sorted((written | self._heading(model, dtype, original)).items()))

    def _heading(self, model: ModelConfig, dtype: str, original: Mapping[str, Any]) -> dict[str, Any]:
        """What names the class, the element type and the labels."""
        architecture = self.architecture(model)
        heading: dict[str, Any] = {"model_type": self.model_type, "architectures": [architecture]}
        heading["dtype" if "torch_dtype" not in original or "dtype" in original else "torch_dtype"] = dtype
        if model.problem_type is not None or "problem_type" in original:
            heading["problem_type"] = model.problem_type
        if not model.num_labels or (
            architecture in (original.get("architectures") or ())
            and model.num_labels == self._heads(original, [])["num_labels"]
        ):
            return heading
        names = {str(index): f"LABEL_{index}" for index in range(model.num_labels)}
        return {**heading, "id2label": names, "label2id": {name: int(index) for index, name in names.items()}}

    def _feature_faults(self, model: ModelConfig) -> list[str]:
        values = model.model_dump()
        return [
            f"{name}={'{...}' if isinstance(values[name], dict) else repr(values[name])} has no place, only {only!r}"
            for name, only in self._fixed().items()
            if values[name] != only
        ]

    def _fixed(self) -> dict[str, Any]:
        named = {name for rule in self.fields for name in rule.fields}
        named |= {*self.training_only, *self.unused, *DROPOUTS}
        named |= {name for features in self.classes.values() for name in features}
        defaults = {name: field.default for name, field in ModelConfig.model_fields.items()}
        unnamed = {name: value for name, value in defaults.items() if name not in named | LABELS}
        return {**unnamed, **self.features}

    def left_out(self, model: ModelConfig) -> dict[str, Any]:
        """Fields of `model` that a configuration of this family does not give back: those that only training reads.
        How initial values were drawn matters to nobody who has the values."""
        again = _flat(self.load_config(self.dump_config(model, "float32")))
        found = {name: value for name, value in _flat(model).items() if again.get(name) != value}
        return {
            name: value for name, value in found.items() if name not in ("initializer_range", "scale_residual_init")
        }

    def bind(self, model: ModelConfig, rules: tuple[Rule, ...] | None = None) -> dict[str, Rule]:
        """The rule of each logical tensor of `model`, layers filled in; ConversionError for a tensor without one.

        By `rules`, or those of the family.
        """
        table = {rule.logical: rule for rule in rules or self.rules(model)}
        bound: dict[str, Rule] = {}
        homeless: list[str] = []
        absent = "" if model.lm_head or model.num_labels else self.prefix
        for name in logical_tensors(model, "F32"):
            layer = re.fullmatch(r"layers\.(\d+)\..*", name)
            pattern = f"layers.{{i}}.{name.split('.', 2)[2]}" if layer else name
            if layer and pattern in table:
                bound[name] = table[pattern].at(int(layer[1]))
            elif name in table:
                bound[name] = table[name]
            else:
                homeless.append(name)
        bound = {name: replace(rule, foreign=rule.foreign.removeprefix(absent)) for name, rule in bound.items()}
        if homeless:
            raise ConversionError(f"{summarise(homeless, 'has', 'have')} no place in family {self.name!r}")
        return bound


def _flat(model: ModelConfig) -> dict[str, Any]:
    """The fields of a model, those of its experts by names of their own."""
    values = model.model_dump()
    moe: dict[str, Any] = values.pop("moe") or {}
    return values | {f"moe.{name}": value for name, value in moe.items()}


def _says_the_same(rule: FieldRule, original: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
    try:
        return rule.load(original) == rule.load(said)
    except (FieldFault, ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        return False


def family_names() -> tuple[str, ...]:
    """The name of every family: that of its file in converters/families/."""
    return registry.module_names(_PACKAGE)


def families() -> Iterator[Family]:
    """Every family, loaded when its turn comes."""
    return map(family_named, family_names())


def family_named(name: str) -> Family:
    """The family called `name`; ConversionError with the known names."""
    if name not in family_names():
        raise ConversionError(f"family {name!r} is not known; use one of: {', '.join(family_names())}")
    found: Family = registry.load(_PACKAGE, name, "FAMILY")
    assert found.name == name, f"{_PACKAGE}.{name} defines family {found.name!r}; give both one name"
    return found


def detect_family(config: Mapping[str, Any], where: str) -> Family:
    """The family of a foreign configuration, by its model_type or else its architectures."""
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    likely = [model_type] if model_type in family_names() else []  # the others' modules need not be read then
    for family in map(family_named, (*likely, *family_names())):
        if model_type == family.model_type or (not model_type and family.classes.keys() & set(architectures)):
            return family
    raise ConversionError(
        f"{where}: model_type={model_type!r}, architectures={architectures!r} is no known family; "
        f"known: {', '.join(family_names())}. If the model is one of them under another name, say so with --family; "
        "docs/adding-a-family.md tells how to add one"
    )


def family_for(model: ModelConfig) -> Family:
    """The family that can say all of `model`; ConversionError with each family's reasons when there is none."""
    reasons = []
    for family in families():
        try:
            family.dump_config(model, "float32")
        except ConversionError as error:
            reasons.append(str(error))
        else:
            return family
    raise ConversionError("no family of Hugging Face models can hold this model: " + "\n  ".join(["", *reasons]))
