"""Model shapes by name, for `model.preset`; any other key of the [model] table goes before it. No torch.

A published model has the values of the `config.json` in the repository that its entry names, on huggingface.co. Dropout
is left out: it is a matter of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Features = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """The features of a model. `source`: where they are published; empty for ours, which are for demos and tests."""

    source: str
    features: Features


_LLAMA: Features = {"hidden_act": "silu", "gated_mlp": True, "norm": "rmsnorm", "position_embedding": "rope"}
_LLAMA3: Features = {**_LLAMA, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 131072}
_QWEN2: Features = {
    **_LLAMA,
    "norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "attention_bias": True,
    "max_position_embeddings": 131072,
}
_QWEN3: Features = {
    **_LLAMA,
    "vocab_size": 151936,
    "head_dim": 128,
    "qk_norm": "head",
    "norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
}
_GEMMA: Features = {
    **_LLAMA,
    "hidden_act": "gelu_tanh",
    "norm_placement": "sandwich",
    "norm_unit_offset": True,
    "norm_eps": 1e-6,
    "scale_embeddings": True,
    "tie_word_embeddings": True,
}
_GEMMA2: Features = {
    **_GEMMA,
    "vocab_size": 256000,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 8192,
}
_GEMMA3: Features = {**_GEMMA, "qk_norm": "head", "rope_theta": 1000000.0, "rope_local_theta": 10000.0}
_OLMO2: Features = {
    **_LLAMA,
    "vocab_size": 100352,
    "norm_placement": "post",
    "qk_norm": "full",
    "norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "max_position_embeddings": 4096,
}
_BIASED: Features = {
    "gated_mlp": False,
    "norm": "layernorm",
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
}
_GPT2: Features = {
    **_BIASED,
    "hidden_act": "gelu_tanh",
    "position_embedding": "learned",
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}
_PYTHIA: Features = {
    **_BIASED,
    "hidden_act": "gelu",
    "position_embedding": "rope",
    "partial_rotary_factor": 0.25,
    "parallel_residual": True,
    "max_position_embeddings": 2048,
}


def _shape(base: Features, hidden: int, ffn: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        **base,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


def _by_parts(factor: float) -> dict[str, Any]:
    return {
        "kind": "by_parts",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _gemma2(hidden: int, ffn: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    """Every other layer slides, the first one too."""
    kinds = ("sliding_attention", "full_attention")
    return _shape(_GEMMA2, hidden, ffn, layers, heads, layer_types=[kinds[i % 2] for i in range(layers)], **more)


def _gemma3(hidden: int, ffn: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    """Every sixth layer sees all tokens, the others slide."""
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)]
    return _shape(_GEMMA3, hidden, ffn, layers, heads, layer_types=kinds, **more)


_TIED = {"tie_word_embeddings": True}
_SMALL_QWEN = {"vocab_size": 151936, **_TIED}
_LARGE_GEMMA3 = {
    "vocab_size": 262208,
    "sliding_window": 1024,
    "max_position_embeddings": 131072,
    "rope_scaling": {"kind": "linear", "factor": 8.0},
}
_OURS = {
    "llama-tiny": _shape(
        _LLAMA, 128, 352, 4, 4, vocab_size=2048, num_key_value_heads=2, max_position_embeddings=512, **_TIED
    ),
    "llama-125m": _shape(_LLAMA, 768, 2048, 12, 12, vocab_size=32000, max_position_embeddings=2048),
    "gpt2-tiny": {**_shape(_GPT2, 128, 512, 4, 4, vocab_size=2048), "max_position_embeddings": 512},
}
_PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "tinyllama-1.1b": (
        "TinyLlama/TinyLlama_v1.1",
        _shape(_LLAMA, 2048, 5632, 22, 32, vocab_size=32000, num_key_value_heads=4, max_position_embeddings=2048),
    ),
    "llama2-7b": (
        "meta-llama/Llama-2-7b-hf",
        _shape(_LLAMA, 4096, 11008, 32, 32, vocab_size=32000, max_position_embeddings=4096),
    ),
    "llama2-13b": (
        "meta-llama/Llama-2-13b-hf",
        _shape(_LLAMA, 5120, 13824, 40, 40, vocab_size=32000, max_position_embeddings=4096),
    ),
    "llama2-70b": (
        "meta-llama/Llama-2-70b-hf",
        _shape(_LLAMA, 8192, 28672, 80, 64, vocab_size=32000, num_key_value_heads=8, max_position_embeddings=4096),
    ),
    "llama3.1-8b": (
        "meta-llama/Llama-3.1-8B",
        _shape(_LLAMA3, 4096, 14336, 32, 32, num_key_value_heads=8, rope_scaling=_by_parts(8.0)),
    ),
    "llama3.1-70b": (
        "meta-llama/Llama-3.1-70B",
        _shape(_LLAMA3, 8192, 28672, 80, 64, num_key_value_heads=8, rope_scaling=_by_parts(8.0)),
    ),
    "llama3.1-405b": (
        "meta-llama/Llama-3.1-405B",
        _shape(_LLAMA3, 16384, 53248, 126, 128, num_key_value_heads=8, rope_scaling=_by_parts(8.0)),
    ),
    "llama3.2-1b": (
        "meta-llama/Llama-3.2-1B",
        _shape(_LLAMA3, 2048, 8192, 16, 32, num_key_value_heads=8, rope_scaling=_by_parts(32.0), **_TIED),
    ),
    "llama3.2-3b": (
        "meta-llama/Llama-3.2-3B",
        _shape(_LLAMA3, 3072, 8192, 28, 24, num_key_value_heads=8, rope_scaling=_by_parts(32.0), **_TIED),
    ),
    "mistral-7b-v0.1": (
        "mistralai/Mistral-7B-v0.1",
        _shape(
            _LLAMA,
            4096,
            14336,
            32,
            32,
            vocab_size=32000,
            num_key_value_heads=8,
            sliding_window=4096,
            max_position_embeddings=32768,
        ),
    ),
    "mistral-7b-v0.3": (
        "mistralai/Mistral-7B-v0.3",
        _shape(
            _LLAMA,
            4096,
            14336,
            32,
            32,
            vocab_size=32768,
            num_key_value_heads=8,
            rope_theta=1000000.0,
            max_position_embeddings=32768,
        ),
    ),
    "qwen2-0.5b": ("Qwen/Qwen2-0.5B", _shape(_QWEN2, 896, 4864, 24, 14, num_key_value_heads=2, **_SMALL_QWEN)),
    "qwen2-1.5b": ("Qwen/Qwen2-1.5B", _shape(_QWEN2, 1536, 8960, 28, 12, num_key_value_heads=2, **_SMALL_QWEN)),
    "qwen2.5-3b": (
        "Qwen/Qwen2.5-3B",
        _shape({**_QWEN2, "max_position_embeddings": 32768}, 2048, 11008, 36, 16, num_key_value_heads=2, **_SMALL_QWEN),
    ),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", _shape(_QWEN2, 3584, 18944, 28, 28, vocab_size=152064, num_key_value_heads=4)),
    "qwen2.5-14b": (
        "Qwen/Qwen2.5-14B",
        _shape({**_QWEN2, "norm_eps": 1e-5}, 5120, 13824, 48, 40, vocab_size=152064, num_key_value_heads=8),
    ),
    "qwen2.5-32b": (
        "Qwen/Qwen2.5-32B",
        _shape({**_QWEN2, "norm_eps": 1e-5}, 5120, 27648, 64, 40, vocab_size=152064, num_key_value_heads=8),
    ),
    "qwen2.5-72b": (
        "Qwen/Qwen2.5-72B",
        _shape({**_QWEN2, "norm_eps": 1e-5}, 8192, 29568, 80, 64, vocab_size=152064, num_key_value_heads=8),
    ),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", _shape(_QWEN3, 1024, 3072, 28, 16, num_key_value_heads=8, **_TIED)),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", _shape(_QWEN3, 2048, 6144, 28, 16, num_key_value_heads=8, **_TIED)),
    "qwen3-4b": ("Qwen/Qwen3-4B", _shape(_QWEN3, 2560, 9728, 36, 32, num_key_value_heads=8, **_TIED)),
    "qwen3-8b": ("Qwen/Qwen3-8B", _shape(_QWEN3, 4096, 12288, 36, 32, num_key_value_heads=8)),
    "qwen3-14b": ("Qwen/Qwen3-14B", _shape(_QWEN3, 5120, 17408, 40, 40, num_key_value_heads=8)),
    "qwen3-32b": ("Qwen/Qwen3-32B", _shape(_QWEN3, 5120, 25600, 64, 64, num_key_value_heads=8)),
    "gemma2-2b": (
        "google/gemma-2-2b",
        _gemma2(2304, 9216, 26, 8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256),
    ),
    "gemma2-9b": (
        "google/gemma-2-9b",
        _gemma2(3584, 14336, 42, 16, num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256),
    ),
    "gemma2-27b": (
        "google/gemma-2-27b",
        _gemma2(4608, 36864, 46, 32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144),
    ),
    "gemma3-1b": (
        "google/gemma-3-1b-pt",
        _gemma3(
            1152,
            6912,
            26,
            4,
            vocab_size=262144,
            num_key_value_heads=1,
            head_dim=256,
            query_pre_attn_scalar=256,
            sliding_window=512,
            max_position_embeddings=32768,
        ),
    ),
    "gemma3-4b": (
        "google/gemma-3-4b-pt, text model",
        _gemma3(2560, 10240, 34, 8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256, **_LARGE_GEMMA3),
    ),
    "gemma3-12b": (
        "google/gemma-3-12b-pt, text model",
        _gemma3(3840, 15360, 48, 16, num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256, **_LARGE_GEMMA3),
    ),
    "gemma3-27b": (
        "google/gemma-3-27b-pt, text model",
        _gemma3(5376, 21504, 62, 32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168, **_LARGE_GEMMA3),
    ),
    "gpt2": ("openai-community/gpt2", _shape(_GPT2, 768, 3072, 12, 12, vocab_size=50257)),
    "gpt2-medium": ("openai-community/gpt2-medium", _shape(_GPT2, 1024, 4096, 24, 16, vocab_size=50257)),
    "gpt2-large": ("openai-community/gpt2-large", _shape(_GPT2, 1280, 5120, 36, 20, vocab_size=50257)),
    "gpt2-xl": ("openai-community/gpt2-xl", _shape(_GPT2, 1600, 6400, 48, 25, vocab_size=50257)),
    **{
        f"pythia-{size}": (f"EleutherAI/pythia-{size}", _shape(_PYTHIA, d, 4 * d, layers, heads, vocab_size=vocab))
        for size, d, layers, heads, vocab in (
            ("14m", 128, 6, 4, 50304),
            ("70m", 512, 6, 8, 50304),
            ("160m", 768, 12, 12, 50304),
            ("410m", 1024, 24, 16, 50304),
            ("1b", 2048, 16, 8, 50304),
            ("1.4b", 2048, 24, 16, 50304),
            ("2.8b", 2560, 32, 32, 50304),
            ("6.9b", 4096, 32, 32, 50432),
            ("12b", 5120, 36, 40, 50688),
        )
    },
    "phi3-mini-4k": (
        "microsoft/Phi-3-mini-4k-instruct",
        _shape(_LLAMA, 3072, 8192, 32, 32, vocab_size=32064, sliding_window=2047, max_position_embeddings=4096),
    ),
    "phi4": (
        "microsoft/phi-4",
        _shape(
            {**_LLAMA, "rope_theta": 250000.0},
            5120,
            17920,
            40,
            40,
            vocab_size=100352,
            num_key_value_heads=10,
            max_position_embeddings=16384,
        ),
    ),
    "olmo2-1b": ("allenai/OLMo-2-0425-1B", _shape(_OLMO2, 2048, 8192, 16, 16)),
    "olmo2-7b": ("allenai/OLMo-2-1124-7B", _shape(_OLMO2, 4096, 11008, 32, 32)),
    "olmo2-13b": ("allenai/OLMo-2-1124-13B", _shape(_OLMO2, 5120, 13824, 40, 40)),
    "olmo2-32b": ("allenai/OLMo-2-0325-32B", _shape(_OLMO2, 5120, 27648, 64, 40, num_key_value_heads=8)),
}
CATALOGUE: Mapping[str, Preset] = MappingProxyType(
    {name: Preset("", features) for name, features in _OURS.items()}
    | {name: Preset(source, features) for name, (source, features) in _PUBLISHED.items()}
)
PRESETS: Mapping[str, Features] = MappingProxyType({name: preset.features for name, preset in CATALOGUE.items()})
