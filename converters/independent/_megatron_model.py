"""Logical tensors of what Megatron-Core's GPT calls its own, said a second time: with PyTorch, on whole tensors.

How a tensor is cut follows from the shapes of its parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, Protocol

import numpy as np
import torch

from converters.independent._turned import bits
from workbench.errors import VerificationError
from workbench.spec.geometry import LogicalTensor

WEIGHT: Final = ""
MASTER: Final = "param"
MOMENTS: Final = ("exp_avg", "exp_avg_sq")
_OUTSIDE: Final = {
    "embed_tokens": "embedding.word_embeddings",
    "embed_positions": "embedding.position_embeddings",
    "norm": "decoder.final_layernorm",
    "lm_head": "output_layer",
}
_INSIDE: Final = {
    "input_layernorm.": ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    "post_attention_layernorm.": ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    "self_attn.o_proj.": ("self_attention.linear_proj.",),
    "self_attn.q_norm.": ("self_attention.q_layernorm.",),
    "self_attn.k_norm.": ("self_attention.k_layernorm.",),
    "self_attn.q_proj.": ("self_attention.linear_q_proj.",),
    "self_attn.q_a_proj.": ("self_attention.linear_q_down_proj.",),
    "self_attn.q_a_layernorm.": ("self_attention.linear_q_up_proj.layer_norm_", "self_attention.q_layernorm."),
    "self_attn.q_b_proj.": ("self_attention.linear_q_up_proj.",),
    "self_attn.kv_a_proj_with_mqa.": ("self_attention.linear_kv_down_proj.",),
    "self_attn.kv_a_layernorm.": ("self_attention.linear_kv_up_proj.layer_norm_", "self_attention.kv_layernorm."),
    "self_attn.kv_b_proj.": ("self_attention.linear_kv_up_proj.",),
    "mlp.gate.e_score_correction_": ("mlp.router.expert_",),
    "mlp.gate.": ("mlp.router.",),
    "mlp.shared_expert_gate.": ("mlp.shared_experts.gate_",),
}
_MLP: Final = re.compile(r"mlp\.(?:(shared_expert)\.|experts\.(\d+)\.)?(gate|up|down)_proj\.(\w+)")
_QKV: Final = re.compile(r"self_attn\.([qkv])_proj\.(\w+)")
Tensors = list[torch.Tensor]


class Parts(Protocol):
    """What ranks hold, in the order of tensor ranks, by kind: "" for weights, or what the optimizer has of them."""

    def outside(self, kind: str, name: str) -> Tensors:
        """Of a tensor outside of layers."""
        ...

    def inside(self, kind: str, layer: int, *names: str) -> Tensors:
        """Of the one of these tensors that a layer has."""
        ...

    def of_expert(self, kind: str, layer: int, expert: int, matrix: str, hidden: int) -> Tensors:
        """Of `linear_fc1.weight` and the like of one expert. hidden: the width of the model."""
        ...


class MegatronTensors:
    """Logical tensors, each joined and turned whole, the latest of them kept. version: of the checkpoint."""

    def __init__(self, parts: Parts, args: Mapping[str, Any], schema: Mapping[str, Any], version: float = 3) -> None:
        self._parts, self._args, self._version = parts, args, version
        self._gated = any(".gate_proj." in name for name in schema)
        self._turned = lru_cache(maxsize=1)(self._turn)

    def read(self, tensor: LogicalTensor, rows: slice) -> np.ndarray:
        """These rows of a logical tensor in storage dtype."""
        return bits(self._turned(tensor)[rows])

    def _turn(self, tensor: LogicalTensor) -> torch.Tensor:
        kind, _, name = tensor.name.removeprefix("optim.").rpartition("/")
        found = self._weight(kind, name, tensor.shape)
        if kind == WEIGHT and tensor.dtype == "F32" and found.dtype != torch.float32:
            found = self._weight(MASTER, name, tensor.shape)
        if tuple(found.shape) != tensor.shape:
            raise VerificationError(f"{tensor.name} has shape {list(found.shape)}, not {list(tensor.shape)}")
        return found

    def _weight(self, kind: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A weight, or what the optimizer holds of it."""
        if (inside := re.fullmatch(r"layers\.(\d+)\.(.+)", name)) is None:
            module, _, leaf = name.rpartition(".")
            parts = self._parts.outside(kind, f"{_OUTSIDE[module]}.{leaf}")
            return torch.cat(parts)[: shape[0]] if module in ("embed_tokens", "lm_head") else parts[0]
        layer, name = int(inside[1]), inside[2]
        if mlp := _MLP.fullmatch(name):
            return self._mlp(kind, layer, mlp, shape)
        if (qkv := _QKV.fullmatch(name)) and not self._args.get("multi_latent_attention"):
            fused = self._parts.inside(kind, layer, f"self_attention.linear_qkv.{qkv[2]}")
            return self._qkv(fused, "qkv".index(qkv[1]))
        module, leaf = next((key, name.removeprefix(key)) for key in _INSIDE if name.startswith(key))
        found = _joined(self._parts.inside(kind, layer, *(f"{theirs}{leaf}" for theirs in _INSIDE[module])), shape)
        if module in ("self_attn.q_proj.", "self_attn.q_b_proj."):
            return _in_halves(found, self._args["num_attention_heads"], self._args["qk_head_dim"])
        return _in_halves(found, 1, self._args["kv_lora_rank"]) if "kv_a_proj" in module else found

    def _qkv(self, parts: Tensors, letter: int) -> torch.Tensor:
        """Queries, keys or values: for each group of heads come its queries, a key and a value."""
        heads = self._args["num_attention_heads"]
        groups = self._args["num_query_groups"] if self._args.get("group_query_attention") else heads
        here = heads // len(parts)
        if self._version < 1:
            parts = [part.unflatten(0, (3, here, -1)).transpose(0, 1).flatten(0, 2) for part in parts]
        elif self._version < 2:
            parts = [part.unflatten(0, (here, -1, 3)).transpose(1, 2).flatten(0, 2) for part in parts]
        in_groups = torch.cat(parts).unflatten(0, (groups, heads // groups + 2, -1))
        return in_groups.split([heads // groups, 1, 1], 1)[letter].flatten(0, 2)

    def _mlp(self, kind: str, layer: int, name: re.Match[str], shape: tuple[int, ...]) -> torch.Tensor:
        """A projection of an MLP or an expert: each rank has rows of gate, then as many of up."""
        shared, expert, which, leaf = name.groups()
        matrix = f"linear_fc{2 if which == 'down' else 1}.{leaf}"
        if expert is None:
            parts = self._parts.inside(kind, layer, f"mlp.{'shared_experts.' if shared else ''}{matrix}")
        else:
            parts = self._parts.of_expert(kind, layer, int(expert), matrix, shape[0 if which == "down" else -1])
        if which != "down" and self._gated:
            return torch.cat([part.chunk(2)[which == "up"] for part in parts])
        return _joined(parts, shape)


def _joined(parts: Tensors, shape: tuple[int, ...]) -> torch.Tensor:
    """The whole of which ranks have parts: of the dimension that is shorter in a part, or each has all of it."""
    cut = [dim for dim, (part, whole) in enumerate(zip(parts[0].shape, shape, strict=True)) if part != whole]
    return torch.cat(parts, cut[0]) if cut else parts[0]


def _in_halves(tensor: torch.Tensor, heads: int, still: int) -> torch.Tensor:
    """Rows that are rotated in pairs, those behind the first `still` of each head, in the order of halves."""
    rows = tensor.unflatten(0, (heads, -1))
    turned = rows[:, still:].unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat((rows[:, :still], turned), 1).flatten(0, 1)
