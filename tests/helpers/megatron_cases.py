"""Models that megatron-core saves in tests: their arguments, degrees and values, without megatron-core."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch

ITERATION: Final = 5
VOCAB: Final = 100
_SIZES: Final = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "make_vocab_size_divisible_by": 8,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "norm_epsilon": 1e-5,
}
_LLAMA: Final = {
    "group_query_attention": True,
    "num_query_groups": 2,
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "untie_embeddings_and_output_weights": True,
}
_GPT: Final = {
    "group_query_attention": False,
    "num_query_groups": 1,
    "swiglu": False,
    "bias_gelu_fusion": False,
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "untie_embeddings_and_output_weights": False,
}
_EXPERTS: Final = _LLAMA | {
    "num_experts": 4,
    "moe_ffn_hidden_size": 16,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_router_pre_softmax": False,
    "moe_layer_freq": 1,
}


@dataclass(frozen=True)
class Case:
    """A run: arguments of its model, degrees, and how it saves.

    te: Transformer Engine's names. flat: parameters are views into one buffer, as under Megatron's DDP.
    """

    model: dict[str, Any]
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    dtype: torch.dtype = torch.float32
    more: dict[str, Any] = field(default_factory=dict)
    te: bool = False
    flat: bool = False

    @property
    def padded(self) -> int:
        multiple = _SIZES["make_vocab_size_divisible_by"] * self.tp
        return -(-VOCAB // multiple) * multiple

    def arguments(self) -> Namespace:
        """What Megatron-LM saves as `args`, as far as it concerns the model and its layout."""
        return Namespace(
            **_SIZES,
            **self.model,
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp if self.vpp > 1 else None,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp or self.tp,
            sequence_parallel=False,
            vocab_size=VOCAB,
            padded_vocab_size=self.padded,
            params_dtype=self.dtype,
            bf16=self.dtype == torch.bfloat16,
            fp16=False,
            iteration=ITERATION,
            consumed_train_samples=40,
            ckpt_format="torch",
            **self.more,
        )


CASES: Final = {
    "llama": Case(_LLAMA),
    "llama-tp2-pp2": Case(_LLAMA, tp=2, pp=2, te=True),
    "llama-tp4-vpp2": Case(_LLAMA, tp=4, pp=2, vpp=2, flat=True),
    "llama-tied-pp2": Case(_LLAMA | {"untie_embeddings_and_output_weights": False}, tp=2, pp=2, dtype=torch.bfloat16),
    "llama-uneven": Case(_LLAMA, pp=3, more={"decoder_first_pipeline_num_layers": 2}),
    "gpt": Case(_GPT),
    "gpt-tp2-pp2": Case(_GPT, tp=2, pp=2),
    "experts": Case(_EXPERTS),
    "experts-tp2-ep2": Case(_EXPERTS, tp=2, ep=2),
    "experts-etp1": Case(_EXPERTS, tp=2, pp=2, ep=2, etp=1, more={}),
}


def whole(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The values of a tensor of the whole model, by megatron-core's name for it. Rows of padding are zeros."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    draw = torch.Generator().manual_seed(seed)
    rows = VOCAB if key.startswith(("embedding.word", "output_layer")) else shape[0]
    values = torch.zeros(shape)
    values[:rows] = torch.randn((rows, *shape[1:]), generator=draw) * 0.1
    if "norm" in key and key.endswith("weight"):
        values += 1
    return values.to(dtype)


def logical(case: Case) -> dict[str, torch.Tensor]:
    """What a case's model holds by our names, from `whole` alone."""
    args = case.arguments()
    layers, hidden, heads, d = args.num_layers, args.hidden_size, args.num_attention_heads, args.kv_channels
    groups = args.num_query_groups if args.group_query_attention else heads
    kinds = ["weight", "bias"] if args.add_bias_linear else ["weight"]
    norms = ["weight", "bias"] if args.normalization == "LayerNorm" else ["weight"]

    def stack(key: str, *shape: int) -> torch.Tensor:
        return whole(f"decoder.layers.{key}", (layers, *shape), case.dtype)

    found = {
        "embed_tokens.weight": whole("embedding.word_embeddings.weight", (case.padded, hidden), case.dtype)[:VOCAB]
    }
    if args.position_embedding_type == "learned_absolute":
        shape = (args.max_position_embeddings, hidden)
        found["embed_positions.weight"] = whole("embedding.position_embeddings.weight", shape, case.dtype)
    if args.untie_embeddings_and_output_weights:
        found["lm_head.weight"] = whole("output_layer.weight", (case.padded, hidden), case.dtype)[:VOCAB]
    for kind in norms:
        found[f"norm.{kind}"] = whole(f"decoder.final_layernorm.{kind}", (hidden,), case.dtype)
    rows = (heads + 2 * groups) * d
    for layer in range(layers):
        base = f"layers.{layer}"
        for kind in norms:
            found[f"{base}.input_layernorm.{kind}"] = stack(f"self_attention.linear_qkv.layer_norm_{kind}", hidden)[
                layer
            ]
            found[f"{base}.post_attention_layernorm.{kind}"] = stack(f"mlp.linear_fc1.layer_norm_{kind}", hidden)[layer]
        for kind in kinds:
            columns = (hidden,) if kind == "weight" else ()
            qkv = stack(f"self_attention.linear_qkv.{kind}", rows, *columns)[layer]
            grid = qkv.view(groups, heads // groups + 2, d, *columns)
            cut = {"q": grid[:, :-2], "k": grid[:, -2], "v": grid[:, -1]}
            found |= {f"{base}.self_attn.{x}_proj.{kind}": part.reshape(-1, *columns) for x, part in cut.items()}
            columns = (heads * d,) if kind == "weight" else ()
            found[f"{base}.self_attn.o_proj.{kind}"] = stack(f"self_attention.linear_proj.{kind}", hidden, *columns)[
                layer
            ]
        found |= _feed_forward(args, layer, kinds, stack)
    return found


def _feed_forward(
    args: Namespace, layer: int, kinds: list[str], stack: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The MLP of a layer, or its experts, as `logical` has them."""
    base, hidden, experts = f"layers.{layer}.mlp", args.hidden_size, getattr(args, "num_experts", None)
    width = args.moe_ffn_hidden_size if experts else args.ffn_hidden_size
    prefix, lead = ("mlp.experts.experts.", (experts,)) if experts else ("mlp.", ())
    found = {f"{base}.gate.weight": stack("mlp.router.weight", experts, hidden)[layer]} if experts else {}
    names = ["gate_proj", "up_proj"] if args.swiglu else ["up_proj"]
    for kind in kinds:
        up = stack(f"{prefix}linear_fc1.{kind}", *lead, width * len(names), *((hidden,) if kind == "weight" else ()))
        down = stack(f"{prefix}linear_fc2.{kind}", *lead, hidden, *((width,) if kind == "weight" else ()))
        for expert in range(experts or 1):
            path, at = (f"{base}.experts.{expert}", (layer, expert)) if experts else (base, (layer,))
            found |= {f"{path}.{n}.{kind}": part for n, part in zip(names, up[at].chunk(len(names)), strict=True)}
            found[f"{path}.down_proj.{kind}"] = down[at]
    return found


def probe() -> torch.Tensor:
    """Token ids to compare logits on."""
    return torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(7))
