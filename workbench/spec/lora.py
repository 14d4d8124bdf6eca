"""Low-rank adapters as geometry: which pairs (A, B) a model gets, and how they are cut. No torch.

An adapted projection computes x W^T + s (x A^T) B^T (Hu et al., arXiv:2106.09685). Every logical projection has a pair
of its own, also where several are fused in one run-time parameter, so that adapters are exchanged as plain renames.
A column-parallel projection has A whole on every rank and B cut like the outputs; a row-parallel one has A cut like
the inputs and B whole. Each rank sees part of the gradient of a whole factor. A projection that is whole on every rank
has whole factors, whose gradients are whole or partial as its own. An embedding adds s A[:, id] to what it looks up,
A [r, vocabulary] cut like the vocabulary, times B [hidden, r]. The magnitudes of DoRA, one for each output, are cut
like the rows of B.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Literal

from pydantic import Field

from workbench.config import Config
from workbench.config_faults import nearest
from workbench.errors import ConfigError
from workbench.spec.geometry import Initial, LogicalTensor, ParameterSpec, Part
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig
from workbench.spec.schema import embedding_specs, head_specs, layer_specs, tied_head

EMBEDDING: Final = "embed_tokens"
HEAD: Final = "lm_head"
MAGNITUDE: Final = "lora_magnitude_vector"
_A, _B = "lora_A.weight", "lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
_SUFFIXES: Final = tuple(f".{suffix}" for suffix in (_A, _B, _EMBEDDING_A, _EMBEDDING_B, MAGNITUDE))


class LoraSpec(Config):
    """The shape of an adapter: what a checkpoint of one records."""

    r: int = Field(default=8, gt=0, description="Rank of each pair.")
    alpha: float = Field(default=16.0, gt=0, description="The update is scaled by alpha / r.")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(r) instead (arXiv:2312.03732).")
    dora: bool = Field(
        default=False,
        description="Learn the length of each row of a weight apart from its direction (arXiv:2402.09353).",
    )
    targets: tuple[str, ...] | Literal["all"] = Field(
        default="all",
        description='What to adapt: last words of names, like ["q_proj", "embed_tokens"], or globs over whole names, '
        'like ["layers.[0-3].mlp.*"]; "all": every projection in the layers.',
    )
    rank_pattern: Mapping[str, int] = Field(
        default={}, description="Another r for some of them, by names as in targets."
    )
    alpha_pattern: Mapping[str, float] = Field(default={}, description="Another alpha for some of them.")

    @property
    def scaling(self) -> float:
        """What multiplies B A where no pattern says otherwise."""
        return self.scale(self.alpha, self.r)

    def rank_of(self, module: str) -> int:
        """The rank of the pair that adapts `module`."""
        return next((r for name, r in self.rank_pattern.items() if names(name, module)), self.r)

    def alpha_of(self, module: str) -> float:
        """The alpha of the pair that adapts `module`."""
        return next((alpha for name, alpha in self.alpha_pattern.items() if names(name, module)), self.alpha)

    def scaling_of(self, module: str) -> float:
        """What multiplies B A of the pair that adapts `module`."""
        return self.scale(self.alpha_of(module), self.rank_of(module))

    def scale(self, alpha: float, r: int) -> float:
        """What multiplies B A of a pair of this alpha and rank."""
        return alpha / (math.sqrt(r) if self.rslora else r)


class AdapterRecord(Config):
    """What a checkpoint of an adapter says of it: its shape, and the weights that it was trained on.

    base: the path as it was given. base_fingerprint: one digest of the fingerprints of all logical tensors of the base.
    """

    kind: Literal["lora"] = "lora"
    lora: LoraSpec
    base: str
    base_fingerprint: str


@dataclass(frozen=True)
class LoraPair:
    """The adapters of one run-time parameter `base`: stacked pairs for those of its parts that are in `parts`.

    The parts have one rank: a parameter has a pair for each rank there is. path: of the module that holds the pair.
    scalings: of each part. magnitude: with DoRA.
    """

    base: ParameterSpec
    path: str
    parts: tuple[Part, ...]
    scalings: tuple[float, ...]
    a: ParameterSpec
    b: ParameterSpec
    magnitude: ParameterSpec | None

    @property
    def specs(self) -> tuple[ParameterSpec, ...]:
        """Every run-time parameter of the pair."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)


def merged_model(model: ModelConfig, lora: LoraSpec) -> ModelConfig:
    """The model that holds what an adapter makes of `model`: with a head of its own where the adapter changes a tied
    embedding, or its head, and not both alike."""
    if not tied_head(model) or {EMBEDDING, HEAD}.isdisjoint(resolved_targets(model, lora)):
        return model
    return model.model_copy(update={"tie_word_embeddings": False})


def held_as(weight: str, schema: Container[str]) -> str:
    """The name under which a base with the tensors of `schema` holds a weight: a tied head is the embedding."""
    return f"{EMBEDDING}.weight" if weight == f"{HEAD}.weight" and weight not in schema else weight


def names(target: str, module: str) -> bool:
    """Whether `target`, the last words of a name or a glob over whole names, stands for `module`."""
    return module == target or module.endswith(f".{target}") or fnmatchcase(module, target)


def module_of(weight: str) -> str:
    """The module that holds the logical tensor `weight`."""
    return weight.removesuffix(".weight")


def leaf_of(weight: str) -> str:
    """The last word of that module's name."""
    return module_of(weight).rpartition(".")[2]


def factor_names(weight: str) -> tuple[str, str]:
    """The names of A and B that adapt the logical tensor `weight`."""
    module = module_of(weight)
    a, b = (_EMBEDDING_A, _EMBEDDING_B) if module == EMBEDDING else (_A, _B)
    return f"{module}.{a}", f"{module}.{b}"


def magnitude_name(weight: str) -> str:
    """The name of the magnitudes of the rows of the logical tensor `weight`."""
    return f"{module_of(weight)}.{MAGNITUDE}"


def is_factor(name: str) -> bool:
    """Whether a logical tensor is A, B or the magnitudes of an adapter."""
    return name.endswith(_SUFFIXES)


def projections(model: ModelConfig) -> tuple[str, ...]:
    """The last words of all that can be adapted, in network order; "all" means those of the layers."""
    return tuple(dict.fromkeys(map(leaf_of, adaptable_modules(model))))


def adaptable_modules(model: ModelConfig) -> list[str]:
    """The names of all that can be adapted, in network order."""
    return [module_of(part.name) for spec in _adaptable(model, ParallelLayout()) for part in spec.parts]


def resolved_targets(model: ModelConfig, lora: LoraSpec) -> tuple[str, ...]:
    """The modules that `lora` adapts, in network order; ConfigError for a name that the model does not have, and for
    what cannot be adapted in this way."""
    modules = adaptable_modules(model)
    if lora.targets == "all":
        found = [module for module in modules if module not in (EMBEDDING, HEAD)]
    else:
        whole = set(lora.targets)
        found = [m for m in modules if m in whole or any(names(target, m) for target in lora.targets)]
        if not lora.targets:
            raise ConfigError(
                f"targets is empty, so nothing would be trained; name some of {', '.join(projections(model))}"
            )
    if faults := [*_name_faults(model, lora, modules), *_kind_faults(model, lora, found)]:
        raise ConfigError("; ".join(faults))
    return tuple(found)


def _name_faults(model: ModelConfig, lora: LoraSpec, modules: Sequence[str]) -> list[str]:
    asked = {
        "targets": () if lora.targets == "all" else lora.targets,
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.alpha_pattern,
    }
    known, whole, found = projections(model), set(modules), []
    for key, targets in asked.items():
        for target in targets:
            if target not in whole and not any(names(target, module) for module in modules):
                found.append(f"{key}: the model has no projection {target!r}{nearest(target, known)}")
    return [*found[:-1], f"{found[-1]} (it has {', '.join(known)})"] if found else []


def _kind_faults(model: ModelConfig, lora: LoraSpec, modules: Sequence[str]) -> list[str]:
    found = []
    if lora.dora and EMBEDDING in modules:
        found.append(f"dora=true: there are no magnitudes of {EMBEDDING!r}; leave it out of targets")
    if lora.dora and any(".experts." in module for module in modules):
        found.append("dora=true: there are no magnitudes of experts; leave them out of targets, or set dora = false")
    if uneven := _uneven_experts(model, lora, set(modules)):
        found.append(
            f"targets: experts of a layer are adapted alike, but not those of {', '.join(uneven)}; name them all"
        )
    return found


def _uneven_experts(model: ModelConfig, lora: LoraSpec, modules: set[str]) -> list[str]:
    """The kinds of experts' projections of which some are adapted, or not all in the same way."""
    kinds: dict[str, set[tuple[bool, int, float]]] = {}
    for spec in _adaptable(model, ParallelLayout()):
        for module in (module_of(part.name) for part in spec.parts if not spec.path.endswith(".weight")):
            experts, _, leaf = module.rsplit(".", 2)
            how = (module in modules, lora.rank_of(module), lora.alpha_of(module))
            kinds.setdefault(f"{experts}.*.{leaf}", set()).add(how)
    return [kind for kind, ways in kinds.items() if len(ways) > 1]


def adapted_pairs(model: ModelConfig, lora: LoraSpec, layout: ParallelLayout) -> Iterator[LoraPair]:
    """The adapters of the whole model, in network order."""
    targets = set(resolved_targets(model, lora))
    for base in _adaptable(model, layout):
        by_rank: dict[int, list[Part]] = {}
        for part in base.parts:
            if (module := module_of(part.name)) in targets:
                by_rank.setdefault(lora.rank_of(module), []).append(part)
        for number, (r, parts) in enumerate(by_rank.items()):
            yield _pair(base, tuple(parts), r, number, lora)


def adapter_specs(model: ModelConfig, lora: LoraSpec, layout: ParallelLayout) -> tuple[ParameterSpec, ...]:
    """Every run-time parameter that an adapter checkpoint holds: the pairs, and what judges rows, if anything does."""
    pairs = (spec for pair in adapted_pairs(model, lora, layout) for spec in pair.specs)
    return (*pairs, *judging_specs(model, layout))


def judging_specs(model: ModelConfig, layout: ParallelLayout) -> list[ParameterSpec]:
    """The sequence head and its pooler, which are trained whole beside an adapter; none without labels."""
    judging = ("pooler.", "score.")
    return [spec for spec in head_specs(model, layout) if model.num_labels and spec.path.startswith(judging)]


def adapter_tensors(model: ModelConfig, lora: LoraSpec, dtype: str) -> dict[str, LogicalTensor]:
    """Every logical tensor of an adapter checkpoint by name."""
    return {
        part.name: LogicalTensor(part.name, part.shape, dtype)
        for spec in adapter_specs(model, lora, ParallelLayout())
        for part in spec.parts
    }


def _adaptable(model: ModelConfig, layout: ParallelLayout) -> Iterator[ParameterSpec]:
    """The token embedding, the matrices of the layers, and the head over the vocabulary, if there is one.

    A head that is tied to the embedding has an adapter of its own, and so has the embedding.
    """
    yield from (spec for spec in embedding_specs(model, layout) if spec.path == f"{EMBEDDING}.weight")
    for layer in range(model.num_hidden_layers):
        yield from (spec for spec in layer_specs(model, layout, layer) if spec.role == "matrix")
    untied = model.model_copy(update={"tie_word_embeddings": False})
    yield from (spec for spec in head_specs(untied, layout) if spec.path == f"{HEAD}.weight")


def _pair(base: ParameterSpec, parts: tuple[Part, ...], r: int, number: int, lora: LoraSpec) -> LoraPair:
    # Experts are two parameters of one module, others one of its own.
    path = f"{module_of(base.path)}.delta.{number}" if base.path.endswith(".weight") else f"{base.path}_delta.{number}"
    places = base.places[:1]

    def spec(name: str, parts: Iterable[Part], init: Initial, role: Literal["matrix", "norm"]) -> ParameterSpec:
        return ParameterSpec(f"{path}.{name}", tuple(parts), places, role, init, base.dealt)

    embeds = base.path == f"{EMBEDDING}.weight"
    a_of, b_of = (_embedding_a, _embedding_b) if embeds else (_a, _b)
    # Of a lookup the factor that is looked up begins as zero, as in peft.
    inits: tuple[Initial, Initial] = ("zeros", "fan_in") if embeds else ("fan_in", "zeros")
    return LoraPair(
        base=base,
        path=path,
        parts=parts,
        scalings=tuple(lora.scaling_of(module_of(part.name)) for part in parts),
        a=spec("lora_A", (a_of(part, r) for part in parts), inits[0], "matrix"),
        b=spec("lora_B", (b_of(part, r) for part in parts), inits[1], "matrix"),
        magnitude=spec("magnitude", map(_magnitude, parts), "ones", "norm") if lora.dora else None,
    )


def _a(base: Part, r: int) -> Part:
    name, shape = factor_names(base.name)[0], (r, base.shape[1])
    if base.dim == 1:
        return Part(name, shape, dim=1, units=base.units)
    return Part(name, shape, partial_grad=base.partial_grad or base.dim is not None)


def _b(base: Part, r: int) -> Part:
    return _like_rows(base, factor_names(base.name)[1], (base.shape[0], r))


def _magnitude(base: Part) -> Part:
    return _like_rows(base, magnitude_name(base.name), base.shape[:1])


def _like_rows(base: Part, name: str, shape: tuple[int, ...]) -> Part:
    """A tensor whose rows belong to those of `base`."""
    if base.dim == 0:
        return Part(name, shape, dim=0, units=base.units, replicate=base.replicate, pad_to=base.pad_to)
    return Part(name, shape, partial_grad=base.partial_grad or base.dim is not None)


def _embedding_a(base: Part, r: int) -> Part:
    return Part(factor_names(base.name)[0], (r, base.shape[0]), dim=1, pad_to=base.pad_to)


def _embedding_b(base: Part, r: int) -> Part:
    return Part(factor_names(base.name)[1], (base.shape[1], r), partial_grad=True)
