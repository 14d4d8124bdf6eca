"""What the families of DeepSeek share: latent attention, experts in all layers but the first.

Files hold the rotary part of each query head, and of the one key that all heads share, in pairs (`rope_interleave`):
dimensions 0 and 1 turn together. It is the end of each head's rows in q_b_proj (or q_proj), and of all rows in
kv_a_proj_with_mqa. In logical tensors these rows are in halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from converters.experts import Experts
from converters.families import _same_names as same_names
from converters.fields import FieldFault, Foreign
from converters.rope_fields import Rope
from converters.rules import Halve, Rule
from workbench.spec.model import ModelConfig

MSCALE: Final = "mscale_all_dim"
INTERLEAVE: Final = "rope_interleave"
ROPE: Final = Rope()
SIZES: Final[Mapping[str, Any]] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
SHARED: Final = "n_shared_experts"
DENSE: Final = "first_k_dense_replace"
HARMLESS: Final = (
    *("pretraining_tp", "output_router_logits", "head_dim", "qk_head_dim"),
    *("aux_loss_alpha", "seq_aux", "ep_size"),
)


@dataclass(frozen=True)
class Latent:
    """The sizes of latent attention, from which that of a head follows, and rotary positions, by whose stretch scores
    may grow.

    may_halve: whether the family has a key for rotary parts in halves; else they are in pairs.
    """

    may_halve: bool
    fields: tuple[str, ...] = ("latent", "head_dim", *ROPE.fields)

    @property
    def keys(self) -> tuple[str, ...]:
        return (*SIZES, *ROPE.keys, *([INTERLEAVE] if self.may_halve else []))

    def load(self, given: Foreign) -> dict[str, Any]:
        sizes = {key: given.get(key, default) for key, default in SIZES.items()}
        sizes[INTERLEAVE] = given.get(INTERLEAVE, True) if self.may_halve else True
        table = given.get("rope_parameters") or given.get("rope_scaling") or {}
        return {**ROPE.load(given), "latent": {**sizes, MSCALE: table.get(MSCALE) or 0.0}}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        if model.latent is None:
            raise FieldFault("latent=None: this family has latent attention")
        sizes, said = model.latent.model_dump(), ROPE.dump(model)
        if not self.may_halve and not sizes.pop(INTERLEAVE):
            raise FieldFault("latent.rope_interleave=False has no place, only True")
        if growth := sizes.pop(MSCALE):
            for table in filter(None, (said["rope_parameters"], said["rope_scaling"])):
                table[MSCALE] = growth
        return {**sizes, **said}


@dataclass(frozen=True)
class SparseLayers:
    """The first layers have one MLP each, all others experts, some of which all tokens share: here one as wide.

    dense, shared, layers: the family's own numbers of layers without experts, of shared experts and of layers.
    """

    experts: Experts
    dense: int
    shared: int
    layers: int
    fields: tuple[str, ...] = ("moe",)

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.experts.keys, SHARED, DENSE)

    def load(self, given: Foreign) -> dict[str, Any]:
        dense = given.get(DENSE, self.dense)
        if dense >= given.get("num_hidden_layers", self.layers):
            return {"moe": None}
        moe = self.experts.load(given)["moe"]
        shared = given.get(SHARED, self.shared) * moe["moe_intermediate_size"]
        return {"moe": {**moe, "mlp_only_layers": tuple(range(dense)), "shared_expert_intermediate_size": shared}}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        moe = model.moe
        if moe is None:
            return {DENSE: model.num_hidden_layers}
        dense, width = len(moe.mlp_only_layers), moe.shared_expert_intermediate_size
        if moe.mlp_only_layers != tuple(range(dense)):
            raise FieldFault(f"moe.mlp_only_layers={list(moe.mlp_only_layers)} are not the first layers")
        shared, rest = divmod(width, moe.moe_intermediate_size)
        if rest or not shared:
            raise FieldFault(
                f"moe.shared_expert_intermediate_size={width} is no multiple of "
                f"moe_intermediate_size={moe.moe_intermediate_size}"
            )
        routed = moe.model_copy(update={"mlp_only_layers": (), "shared_expert_intermediate_size": 0})
        return {**self.experts.dump(model.model_copy(update={"moe": routed})), SHARED: shared, DENSE: dense}


def rules(model: ModelConfig) -> tuple[Rule, ...]:
    """Where each logical tensor lies."""
    sizes, views = model.latent, dict[str, Halve]()
    if sizes is not None and sizes.rope_interleave:
        halve_q = Halve(0, sizes.qk_nope_head_dim, sizes.qk_head_dim)
        halve_k = Halve(0, sizes.kv_lora_rank, sizes.kv_lora_rank + sizes.qk_rope_head_dim)
        views = {"q_proj": halve_q, "q_b_proj": halve_q, "kv_a_proj_with_mqa": halve_k}
    return tuple(_placed(rule, views) for rule in same_names.rules(model))


def _placed(rule: Rule, views: Mapping[str, Halve]) -> Rule:
    foreign, module = rule.foreign.replace(".shared_expert.", ".shared_experts."), rule.logical.split(".")[-2]
    return Rule(rule.logical, foreign, (views[module],) if module in views else ())
