"""Every logical tensor of a model and where Megatron-Core's GPT keeps it: one table for all of its formats. No torch.

Names here are those of a whole model in one process (`model` of a checkpoint at TP=PP=EP=1), with global layer and
expert indices: `decoder.layers.3.self_attention.linear_qkv.weight`. How tensor and expert parallelism cut such a tensor
is `McoreTensor.share`. The reference is megatron-core 0.16.1 (models/gpt/gpt_layer_specs.py, transformer/).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from converters.names import summarise
from converters.rules import TRANSPOSE, Halve, Merge, Operation, Rule, Slice, Split
from workbench.errors import ConversionError
from workbench.spec.geometry import Box
from workbench.spec.model import ModelConfig
from workbench.spec.schema import logical_tensors

Experts = Literal["sequential", "grouped", "flat"]

LAYERS: Final = "decoder.layers"
EMBEDDING: Final = "embedding.word_embeddings.weight"
HEAD: Final = "output_layer.weight"
NO_WEIGHTS: Final = "_extra_state"
"""What ends the name of an entry that holds scaling factors of fp8, or nothing."""


def has_scales(module: str, *, own_layers: bool) -> bool:
    """Whether a module looks for scales of fp8 beside its weights: Transformer Engine's, and Megatron's own linear
    layers."""
    return re.search(r"\.linear_\w+$" if own_layers else r"\.linear_\w+$|norm$", module) is not None


@dataclass(frozen=True)
class Spelling:
    """What Megatron spells in several ways.

    input, dense, sparse, latent: whether the norm before attention, before an MLP, before experts and of latents
    belongs to the linear layer that follows it. whole_down: whether each tensor rank has all of the projections to
    latents. experts: `local_experts.{e}` (sequential), `weight{e}` (grouped), or `weight1` and `weight2` of all experts
    of a rank (flat).
    """

    input: bool = True
    dense: bool = True
    sparse: bool = False
    latent: bool = True
    whole_down: bool = True
    experts: Experts = "sequential"


TE: Final = Spelling()
"""Transformer Engine's layers."""
LOCAL: Final = Spelling(input=False, dense=False, latent=False, whole_down=False)
"""Megatron's own layers."""
RENAMED: Final = replace(LOCAL, input=True, dense=True, sparse=True)
"""Megatron's own layers in torch_dist folders, which gives some norms the names that TE has for them."""


@dataclass(frozen=True, slots=True)
class McoreTensor:
    """A tensor of a whole model.

    dim: what tensor parallelism cuts, or None for a tensor that each rank holds whole; halves: it has two halves (gate
    and up), each of which is cut, and a rank's shares lie one after the other. num_experts: not 0 for tensors of
    experts, which are dealt over the expert axis and cut by the tensor parallelism of experts; expert: the one that it
    is of; else it holds all of them along dimension 0.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    halves: bool = False
    num_experts: int = 0
    expert: int | None = None

    def share(self, tp: int, tp_rank: int, ep: int = 1, ep_rank: int = 0) -> list[Pair]:
        """Pairs (box of this tensor, box of the rank's tensor) that make up what a rank holds; none: it has nothing.

        tp: of experts, for their tensors. ConversionError when the tensor cannot be cut like that.
        """
        box = Box.whole(self.shape)
        if self.num_experts:
            each = self.num_experts // ep
            if self.expert is None:
                box = _range(box, 0, ep_rank * each, each)
            elif self.expert // each != ep_rank:
                return []
        corner = box.shift([-offset for offset in box.offset])
        if self.dim is None:
            return [(box, corner)]
        count = 2 if self.halves else 1
        part, rest = divmod(self.shape[self.dim], tp * count)
        if rest:
            raise ConversionError(f"{self.name!r} of shape {list(self.shape)} cannot be cut over tp={tp}; use another")
        return [
            (
                _range(box, self.dim, (half * tp + tp_rank) * part, part),
                _range(corner, self.dim, half * part, part),
            )
            for half in range(count)
        ]


Pair = tuple[Box, Box]


def _range(box: Box, dim: int, start: int, size: int) -> Box:
    return Box((*box.offset[:dim], start, *box.offset[dim + 1 :]), (*box.size[:dim], size, *box.size[dim + 1 :]))


@dataclass(frozen=True)
class Table:
    """The rule of each logical tensor, whose `foreign` is a name of `tensors`."""

    rules: Mapping[str, Rule]
    tensors: Mapping[str, McoreTensor]


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where the tensor of some name in every layer (or outside of them) lies; as in McoreTensor."""

    name: str
    view: tuple[Operation, ...] = ()
    dim: int | None = None
    halves: bool = False


def make_table(model: ModelConfig, spelling: Spelling = TE, *, padded_vocab: int | None = None) -> Table:
    """Where every logical tensor of `model` lies; ConversionError names those that have no place.

    padded_vocab: rows of embedding and head with padding, if there is any.
    """
    outside = _outside(model, padded_vocab or model.vocab_size)
    kinds = {sparse: _layer(model, spelling, sparse=sparse) for sparse in (False, True)}
    rules: dict[str, Rule] = {}
    tensors: dict[str, McoreTensor] = {}
    homeless = []
    for name, tensor in logical_tensors(model, "F32").items():
        found = re.fullmatch(r"layers\.(\d+)\.(.*?)(?:experts\.(\d+)\.(.*))?", name)
        expert = int(found[3]) if found and found[3] else None
        entry = outside.get(name)
        if found and expert is None:
            entry = kinds[model.has_experts(int(found[1]))].get(found[2])
        elif found and expert is not None:
            entry = _expert(model, spelling, expert, found[4])
        if entry is None:
            homeless.append(name)
            continue
        foreign = f"{LAYERS}.{found[1]}.{entry.name}" if found else entry.name
        rules[name] = rule = Rule(name, foreign, entry.view)
        if foreign not in tensors:
            experts = model.moe.num_experts if model.moe and expert is not None else 0
            one = None if spelling.experts == "flat" else expert
            shape = rule.foreign_shape(tensor.shape)
            tensors[foreign] = McoreTensor(foreign, shape, entry.dim, entry.halves, experts, one)
    if homeless:
        raise ConversionError(f"{summarise(homeless, 'has', 'have')} no place in Megatron's GPT")
    return Table(rules, tensors)


def _outside(model: ModelConfig, padded: int) -> dict[str, _Entry]:
    """What is not in a layer."""
    rows = (Slice(0, 0, model.vocab_size, padded),) if padded != model.vocab_size else ()
    return {
        "embed_tokens.weight": _Entry(EMBEDDING, rows, 0),
        "embed_positions.weight": _Entry("embedding.position_embeddings.weight"),
        "norm.weight": _Entry("decoder.final_layernorm.weight"),
        "norm.bias": _Entry("decoder.final_layernorm.bias"),
        "lm_head.weight": _Entry(HEAD, rows, 0),
    }


def _layer(model: ModelConfig, spelling: Spelling, *, sparse: bool) -> dict[str, _Entry]:
    """A layer without its experts; sparse: one that has them."""
    fused = spelling.input and model.latent is None
    before = "self_attention.linear_qkv.layer_norm_" if fused else "input_layernorm."
    fused = spelling.sparse if sparse else spelling.dense
    between = "mlp.linear_fc1.layer_norm_" if fused else "pre_mlp_layernorm."
    found = {
        "self_attn.o_proj.weight": _Entry("self_attention.linear_proj.weight", dim=1),
        "self_attn.o_proj.bias": _Entry("self_attention.linear_proj.bias"),
        "self_attn.q_norm.weight": _Entry("self_attention.q_layernorm.weight"),
        "self_attn.k_norm.weight": _Entry("self_attention.k_layernorm.weight"),
        "mlp.gate.weight": _Entry("mlp.router.weight"),
        "mlp.gate.e_score_correction_bias": _Entry("mlp.router.expert_bias"),
        "mlp.shared_expert_gate.weight": _Entry("mlp.shared_experts.gate_weight"),
    }
    for kind in ("weight", "bias"):
        found[f"input_layernorm.{kind}"] = _Entry(before + kind)
        found[f"post_attention_layernorm.{kind}"] = _Entry(between + kind)
    found |= _heads(model) if model.latent is None else _latent(model, spelling)
    shared = model.moe.shared_expert_intermediate_size if model.moe else 0
    for ours, theirs, width in (
        ("mlp", "mlp", model.intermediate_size),
        ("mlp.shared_expert", "mlp.shared_experts", shared),
    ):
        found |= {f"{ours}.{name}": replace(entry, name=f"{theirs}.{entry.name}") for name, entry in _mlp(model, width)}
    return found


def _heads(model: ModelConfig) -> dict[str, _Entry]:
    """Rows of linear_qkv: for each key/value head the queries that share it, the key, the value."""
    groups, d = model.num_key_value_heads, model.head_dim
    queries = model.num_attention_heads // groups * d
    period = queries + 2 * d
    starts = {"q": (0, queries), "k": (queries, d), "v": (queries + d, d)}
    return {
        f"self_attn.{letter}_proj.{kind}": _Entry(
            f"self_attention.linear_qkv.{kind}",
            (Split(0, (groups, period)), Slice(1, start, size, period), Merge(0, (groups, size))),
            0,
        )
        for letter, (start, size) in starts.items()
        for kind in ("weight", "bias")
    }


def _latent(model: ModelConfig, spelling: Spelling) -> dict[str, _Entry]:
    """Projections of latent attention. Their rotary rows are in pairs (`_apply_rotary_pos_emb_bshd`)."""
    assert model.latent is not None
    sizes, base = model.latent, "self_attention"
    queries = (Halve(0, sizes.qk_nope_head_dim, sizes.qk_head_dim),)
    key = (Halve(0, sizes.kv_lora_rank, sizes.kv_lora_rank + sizes.qk_rope_head_dim),)
    down = None if spelling.whole_down else 0
    norms = "linear_{}_up_proj.layer_norm_weight" if spelling.latent else "{}_layernorm.weight"
    return {
        "self_attn.q_proj.weight": _Entry(f"{base}.linear_q_proj.weight", queries, 0),
        "self_attn.q_a_proj.weight": _Entry(f"{base}.linear_q_down_proj.weight", dim=down),
        "self_attn.q_a_layernorm.weight": _Entry(f"{base}.{norms.format('q')}"),
        "self_attn.q_b_proj.weight": _Entry(f"{base}.linear_q_up_proj.weight", queries, 0),
        "self_attn.kv_a_proj_with_mqa.weight": _Entry(f"{base}.linear_kv_down_proj.weight", key, down),
        "self_attn.kv_a_layernorm.weight": _Entry(f"{base}.{norms.format('kv')}"),
        "self_attn.kv_b_proj.weight": _Entry(f"{base}.linear_kv_up_proj.weight", dim=0),
    }


def _mlp(model: ModelConfig, width: int) -> Iterator[tuple[str, _Entry]]:
    """An MLP of this width: linear_fc1 holds gate, then up."""
    for kind in ("weight", "bias"):
        for half, name in enumerate(("gate_proj", "up_proj") if model.gated_mlp else ()):
            view = (Slice(0, half * width, width, 2 * width),)
            yield f"{name}.{kind}", _Entry(f"linear_fc1.{kind}", view, 0, halves=True)
        if not model.gated_mlp:
            yield f"up_proj.{kind}", _Entry(f"linear_fc1.{kind}", dim=0)
        yield f"down_proj.{kind}", _Entry(f"linear_fc2.{kind}", dim=1 if kind == "weight" else None)


def _expert(model: ModelConfig, spelling: Spelling, expert: int, name: str) -> _Entry | None:
    """A tensor of one expert."""
    assert model.moe is not None
    width, base = model.moe.moe_intermediate_size, "mlp.experts"
    entry = dict(_mlp(model, width)).get(name)
    if entry is None or spelling.experts == "sequential":
        return entry and replace(entry, name=f"{base}.local_experts.{expert}.{entry.name}")
    if spelling.experts == "grouped":
        return replace(entry, name=f"{base}.{entry.name}{expert}")
    # The buffers are [experts, hidden, width] and [experts, width, hidden] (experts.py, GroupedMLP.forward), whatever
    # shape the parameters have.
    is_up = entry.name.startswith("linear_fc1")
    rows = model.hidden_size if is_up else width
    one: tuple[Operation, ...] = (Slice(0, expert, 1, model.moe.num_experts), Merge(0, (1, rows)), TRANSPOSE)
    return _Entry(f"{base}.weight{1 if is_up else 2}", (*one, *entry.view), 2 if is_up else 1, halves=entry.halves)


def spelling_of(names: Collection[str], model: ModelConfig) -> Spelling:
    """How tensors are spelled of which a whole model has these `names`."""
    layers = range(model.num_hidden_layers)
    sparse = [layer for layer in layers if model.has_experts(layer)]
    dense = [layer for layer in layers if not model.has_experts(layer)]

    def has(layer: int, name: str) -> bool:
        return f"{LAYERS}.{layer}.{name}" in names

    fc1, qkv = "mlp.linear_fc1.layer_norm_weight", "self_attention.linear_qkv.layer_norm_weight"
    latent = has(0, "self_attention.linear_kv_up_proj.layer_norm_weight")
    experts: Experts = "sequential"
    if sparse and has(sparse[0], "mlp.experts.weight1"):
        experts = "flat"
    elif sparse and has(sparse[0], "mlp.experts.linear_fc1.weight0"):
        experts = "grouped"
    return Spelling(
        input=has(0, qkv),
        dense=bool(dense) and has(dense[0], fc1),
        sparse=bool(sparse) and has(sparse[0], fc1),
        latent=latent,
        whole_down=latent,
        experts=experts,
    )
