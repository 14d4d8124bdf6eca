"""What programs that save with torch.distributed.checkpoint call the weights: the families' tables, renamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from converters.family import Family, IgnoredTensor
from converters.rules import Halve, Rule
from workbench.spec.model import ModelConfig
from workbench.spec.schema import logical_tensors

_TITAN: Final = {
    "embed_tokens.weight": "tok_embeddings.weight",
    "layers.{i}.self_attn.v_proj.weight": "layers.{i}.attention.wv.weight",
    "layers.{i}.self_attn.o_proj.weight": "layers.{i}.attention.wo.weight",
    "layers.{i}.mlp.gate_proj.weight": "layers.{i}.feed_forward.w1.weight",
    "layers.{i}.mlp.down_proj.weight": "layers.{i}.feed_forward.w2.weight",
    "layers.{i}.mlp.up_proj.weight": "layers.{i}.feed_forward.w3.weight",
    "layers.{i}.input_layernorm.weight": "layers.{i}.attention_norm.weight",
    "layers.{i}.post_attention_layernorm.weight": "layers.{i}.ffn_norm.weight",
    "norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True)
class Naming:
    """Names of weights: `table(family)` is the family with the rules that lead to them.

    prefix: what a whole state dictionary puts before the name of a weight.
    """

    name: str
    table: Callable[[Family], Family]
    prefix: str


def _titan_rules(model: ModelConfig) -> tuple[Rule, ...]:
    """torchtitan's Llama (models/llama3): rotary pairs are neighbours in the rows of a head."""
    pairs = (Halve(0, 0, model.head_dim),)
    turned = (
        Rule(f"layers.{{i}}.self_attn.{x}_proj.weight", f"layers.{{i}}.attention.w{x}.weight", pairs) for x in "qk"
    )
    return (*(Rule(ours, theirs) for ours, theirs in _TITAN.items()), *turned)


def _titan(family: Family) -> Family:
    return replace(
        family,
        name=f"{family.name} of torchtitan",
        prefix="",
        rules=_titan_rules,
        also_read=None,
        renamed={},
        repeats={"output.weight": "tok_embeddings.weight"},
        ignored=(IgnoredTensor("freqs_cis", "computed from rope_theta"),),
    )


def _own(family: Family) -> Family:
    return replace(
        family,
        prefix="",
        rules=lambda model: tuple(Rule(name, name) for name in logical_tensors(model, "F32")),
        also_read=None,
        renamed={},
        repeats={},
        ignored=(),
    )


TRANSFORMERS: Final = Naming("transformers", lambda family: family, "model.")
TORCHTITAN: Final = Naming("torchtitan", _titan, "")
LOGICAL: Final = Naming("workbench", _own, "model.")
