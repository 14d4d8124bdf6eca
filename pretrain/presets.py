"""Model shapes by name, for `model.preset`; any other key of the [model] table goes before it. No torch."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

_LLAMA = {"hidden_act": "silu", "gated_mlp": True, "norm": "rmsnorm", "position_embedding": "rope"}
_GPT = {
    "hidden_act": "gelu_tanh",
    "gated_mlp": False,
    "norm": "layernorm",
    "position_embedding": "learned",
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
}


def _shape(
    base: dict[str, Any], vocab: int, hidden: int, ffn: int, layers: int, heads: int, **more: Any
) -> dict[str, Any]:
    return {
        **base,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


PRESETS = MappingProxyType(
    {
        "llama-tiny": _shape(
            _LLAMA, 2048, 128, 352, 4, 4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=512
        ),
        "llama-125m": _shape(_LLAMA, 32000, 768, 2048, 12, 12, max_position_embeddings=2048),
        "llama-1b": _shape(_LLAMA, 32000, 2048, 5632, 22, 32, num_key_value_heads=4, max_position_embeddings=2048),
        "llama-7b": _shape(_LLAMA, 32000, 4096, 11008, 32, 32, max_position_embeddings=4096),
        "gpt2-tiny": _shape(_GPT, 2048, 128, 512, 4, 4, max_position_embeddings=512),
        "gpt2": _shape(_GPT, 50257, 768, 3072, 12, 12, max_position_embeddings=1024),
        "gpt2-xl": _shape(_GPT, 50257, 1600, 6400, 48, 25, max_position_embeddings=1024),
    }
)
"""Sizes as published: TinyLlama 1.1B, Llama 2 7B, GPT-2; the tiny ones are for demos and tests."""
