"""The configuration of a family reads the same in both directions, and nothing in it is skipped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    CONFIG_MAPPING,
)

from converters.family import detect_family, family_for, family_named, family_names
from tests.converters.families.configs import CONFIGS, LATENT
from workbench.errors import ConversionError
from workbench.spec.model import ModelConfig
from workbench.spec.rope import RopeScaling

OLDER = {
    "eos_token_id",
    "rope_scaling",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "max_window_layers",
    "sliding_window_pattern",
    "position_embedding_type",
}
"""Keys that say again what others say, or of which a list is cut to its first."""


def dtype_of(config: dict[str, Any]) -> str:
    return config.get("dtype") or config.get("torch_dtype") or "float32"


@pytest.mark.parametrize("case", sorted(CONFIGS))
def test_a_configuration_that_went_in_comes_out_equal(case: str) -> None:
    given = {key: value for key, value in CONFIGS[case].items() if key not in ("model_type", "dtype")}
    given |= {"model_type": CONFIGS[case]["model_type"]}
    if "torch_dtype" not in given:
        given["dtype"] = "float32"
    family = detect_family(given, "config.json")
    model = family.load_config(given)
    assert family.dump_config(model, dtype_of(given), given) == dict(sorted(given.items()))


@pytest.mark.parametrize("case", sorted(CONFIGS))
def test_a_configuration_written_without_its_original_describes_the_same_model(case: str) -> None:
    family = detect_family(CONFIGS[case], "config.json")
    model = family.load_config(CONFIGS[case])
    written = family.dump_config(model, "float32")
    assert family.load_config(written) == model
    reader = CONFIG_MAPPING[family.model_type]
    theirs, ours = reader(**CONFIGS[case]).to_dict(), reader(**written).to_dict()
    theirs["rope_parameters"], ours["rope_parameters"] = rope_of(theirs), rope_of(ours)
    if ours.get("head_dim") is not None and theirs.get("head_dim") is None:
        theirs["head_dim"] = theirs["hidden_size"] // theirs["num_attention_heads"]  # what transformers then takes
    behaviour = {key for rule in family.fields for key in rule.keys} - OLDER
    assert {key: ours.get(key) for key in behaviour} == {key: theirs.get(key) for key in behaviour}


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers reads in `rope_parameters`, and for longrope the factor that it finds where none is said."""
    found = {key: value for key, value in (config.get("rope_parameters") or {}).items() if key != "type"}
    if found.get("rope_type") == "longrope":
        found.setdefault("factor", config["max_position_embeddings"] / found["original_max_position_embeddings"])
    return found


@pytest.mark.parametrize("name", family_names())
def test_no_feature_of_a_model_has_two_places_in_the_family(name: str) -> None:
    family = family_named(name)
    claimed = [field for rule in family.fields for field in rule.fields]
    claimed += {name for features in family.other_classes.values() for name in features}
    claimed += [*family.features, *family.training_only, *family.unused, "num_labels"]
    assert len(claimed) == len(set(claimed)) and set(claimed) <= ModelConfig.model_fields.keys()


def test_a_feature_that_the_family_does_not_name_is_refused_on_export() -> None:
    family = family_named("gpt2")
    model = family.load_config({}).model_copy(update={"sliding_window": 8})
    with pytest.raises(ConversionError, match="sliding_window=8 has no place, only None"):
        family.dump_config(model, "float32")


def test_scaled_rotary_positions_become_the_named_feature() -> None:
    model = family_named("llama").load_config(CONFIGS["llama of 2024"])
    assert model.rope_theta == 500000.0
    assert model.rope_scaling == RopeScaling(
        kind="by_parts", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    )
    old = family_named("llama").load_config(CONFIGS["llama of 2023"])
    assert old.rope_scaling == RopeScaling(kind="linear", factor=4.0)
    assert (old.rope_theta, old.bos_token_id, old.eos_token_id) == (10000.0, 1, 2)


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("llama defaults", {"sliding_window": 4096}, ["sliding_window=4096 is unknown", "'llama'"]),
        ("llama defaults", {"rope_parameters": {"rope_type": "ntk", "factor": 4.0}}, ["rope_type='ntk'", "linear"]),
        ("llama defaults", {"hidden_act": "mish"}, ["hidden_act='mish'", "silu"]),
        ("llama defaults", {"rope_theta": 5.0}, ["rope_theta is given as 5.0 and as 10000.0"]),
        ("llama defaults", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ("llama defaults", {"quantization_config": {"bits": 4}}, ["quantization_config={'bits': 4}"]),
        ("llama defaults", {"architectures": ["LlamaForQuestionAnswering"]}, ["LlamaForQuestionAnswering"]),
        ("llama defaults", {"hidden_size": "wide"}, ["hidden_size"]),
        ("llama defaults", {"rms_norm_eps": -1.0}, ["norm_eps"]),
        ("bert defaults", {"is_decoder": True}, ["is_decoder=True", "only False"]),
        ("bert defaults", {"tie_word_embeddings": False}, ["tie_word_embeddings=False", "only True"]),
        ("bert defaults", {"architectures": ["BertForQuestionAnswering"]}, ["BertForQuestionAnswering"]),
        ("t5 defaults", {"is_gated_act": True}, ["is_gated_act=True, but feed_forward_proj='relu' means False"]),
        ("t5 defaults", {"is_encoder_decoder": False}, ["is_encoder_decoder=False", "only True"]),
        ("qwen2 defaults", {"layer_types": ["sliding_attention"] * 32}, ["layers that slide", "no sliding_window"]),
        ("qwen3 defaults", {"layer_types": ["chunked_attention"] * 32}, ["layer_types has chunked_attention"]),
        ("mistral defaults", {"layer_types": ["full_attention"] * 32}, ["layer_types=", "is unknown"]),
        ("gemma2 defaults", {"use_bidirectional_attention": True}, ["use_bidirectional_attention=True"]),
        ("gemma3 defaults", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping=50.0", "only None"]),
        ("gemma3 defaults", {"rope_local_base_freq": 5.0}, ["rope_theta of sliding_attention is given as 5.0 and as"]),
        (
            "gemma3 defaults",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            ["rope_parameters.sliding_attention=", "only a rope_theta"],
        ),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, ["topk_method='noaux_tc'", "'group_limited_greedy'"]),
        ("deepseek_v2", {"norm_topk_prob": True}, ["norm_topk_prob=True", "only False or None"]),
        ("deepseek_v3 defaults", {"scoring_func": "softmax"}, ["scoring_func='softmax'", "only 'sigmoid'"]),
        ("deepseek_v3, dense", {"kv_lora_rank": None}, ["kv_lora_rank"]),
        ("deepseek_v3, dense", {"num_key_value_heads": 8}, ["num_key_value_heads=8", "num_attention_heads=128"]),
        ("gpt2 defaults", {"scale_attn_weights": False}, ["scale_attn_weights=False", "only True"]),
        ("gpt2 defaults", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx=True"]),
        ("gpt2 defaults", {"activation_function": "mish", "odd": 1}, ["activation_function='mish'", "odd=1"]),
    ],
)
def test_what_has_no_place_is_refused_by_name(case: str, change: dict[str, Any], words: list[str]) -> None:
    given = CONFIGS[case] | change
    with pytest.raises(ConversionError) as error:
        detect_family(given, "config.json").load_config(given)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llama", {"gated_mlp": False}, ["gated_mlp=False", "only True"]),
        ("llama", {"attention_bias": True}, ["attention_bias=True, attention_output_bias=False", "one switch"]),
        ("llama", {"norm": "layernorm"}, ["norm='layernorm'", "'rmsnorm'"]),
        ("llama", {"head_dim": 6, "num_attention_heads": 3, "num_key_value_heads": 3}, ["hidden_size=32", "=3"]),
        ("bert", {"pooler": True}, ["none of BertFor", "pooler=True", "next_sentence=False"]),
        ("llama", {"latent": LATENT, "head_dim": 12}, ["latent={...}", "only None"]),
        ("deepseek_v3", {}, ["latent=None"]),
        ("deepseek_v2", {"latent": {**LATENT, "rope_interleave": False}, "head_dim": 12}, ["rope_interleave=False"]),
        ("gpt2", {"num_key_value_heads": 2}, ["num_key_value_heads=2 is not num_attention_heads=4"]),
        ("gpt2", {"position_embedding": "rope"}, ["position_embedding='rope'"]),
        ("llama", {"parallel_residual": True}, ["parallel_residual=True has no place, only False"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5 has no place here, only 1.0"]),
    ],
)
def test_a_model_that_the_family_cannot_say_is_refused_by_field(
    family: str, change: dict[str, Any], words: list[str]
) -> None:
    small = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1}
    plain = ModelConfig(num_attention_heads=4, **small)
    if family == "gpt2":
        plain = family_named("gpt2").load_config({"n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 9})
    if family == "bert":
        plain = family_named("bert").load_config({**small, "num_attention_heads": 4})
    model = ModelConfig.model_validate(plain.model_dump() | change)
    with pytest.raises(ConversionError) as error:
        family_named(family).dump_config(model, "float32")
    for word in words:
        assert word in str(error.value)


def test_the_page_of_families_has_a_line_for_each() -> None:
    page = (Path(__file__).parents[3] / "docs" / "families.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == sorted(family_names())


def test_a_model_finds_its_family_by_what_it_is() -> None:
    for case in ("llama classifier", "gpt2 defaults", "bert, both heads", "bert classifier", "bert body"):
        family = detect_family(CONFIGS[case], "config.json")
        assert family_for(family.load_config(CONFIGS[case])) is family
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    odd = ModelConfig(**sizes, num_attention_heads=2, norm="layernorm", position_embedding="learned")
    with pytest.raises(ConversionError, match=r"(?s)gpt2.*gated_mlp=True.*llama.*norm='layernorm'"):
        family_for(odd)


def test_an_unknown_model_type_names_the_known_families() -> None:
    with pytest.raises(ConversionError, match=r"model_type='mamba'.*gpt2, .*llama.*--family"):
        detect_family({"model_type": "mamba"}, "config.json")
    with pytest.raises(ConversionError, match=r"'mamba' is not known; use one of: .*gpt2, .*llama"):
        family_named("mamba")


def test_a_model_that_became_a_classifier_gets_labels_and_its_class() -> None:
    family = family_named("llama")
    given = CONFIGS["llama defaults"]
    model = ModelConfig.model_validate(family.load_config(given).model_dump() | {"num_labels": 3})
    written = family.dump_config(model, "float32", given)
    assert written["architectures"] == ["LlamaForSequenceClassification"]
    assert written["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert family.load_config(written) == model


def test_a_number_of_labels_that_no_integer_holds_is_refused() -> None:
    given = {**CONFIGS["llama classifier"], "id2label": None, "num_labels": float("inf")}
    with pytest.raises(ConversionError, match="num_labels: cannot convert float infinity"):
        family_named("llama").load_config(given)
