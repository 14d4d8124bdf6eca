"""What a token costs, and what the hardware could do: the two halves of model FLOP/s utilisation (MFU)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from pretrain.data.spans import lengths_of, text_tokens
from workbench.spec.latent import LatentSizes
from workbench.spec.model import ModelConfig
from workbench.spec.schema import predicts_words

_DENSE_16_BIT_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "B200": 2250, "A100": 312, "L40S": 362, "L4": 121}
"""Vendors' data sheets, dense, without sparsity; the first name that is part of the device's name counts."""


@dataclass(frozen=True, slots=True)
class Peak:
    """The most that one rank's device can do, and where the number comes from."""

    flops: float
    source: str


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Floating-point operations to train on one token: matrix products forward and backward (3 x 2 per weight).

    Attention counts in full, recompute does not; the embedding lookup is none, the head counts.
    Of an encoder with a decoder: on a token that the encoder reads, with the decoder's part of span corruption.
    """
    heads, kv_heads, d = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    attention = model.hidden_size * d * (2 * heads + 2 * kv_heads)
    if model.latent is not None:
        attention = _latent_weights(model, model.latent)
    head = model.hidden_size * model.vocab_size if predicts_words(model) else 0
    head += model.hidden_size**2 if model.head_transform else 0
    if model.num_encoder_layers:
        return _flops_of_pair(model, seq_len, attention, head)
    feed_forward = sum(_feed_forward(model, layer) for layer in range(model.num_hidden_layers))
    seen = sum(min(seq_len, model.window(layer) or seq_len) for layer in range(model.num_hidden_layers))
    # In units of 2 FLOPs: queries by keys, and probabilities by values.
    scores = seen * heads * (d + model.value_head_dim)
    return 6.0 * (model.num_hidden_layers * attention + feed_forward + scores + head)


def _flops_of_pair(model: ModelConfig, seq_len: int, attention: int, head: int) -> float:
    """The same of an encoder with a decoder."""
    heads_dim = model.num_attention_heads * model.head_dim
    target_len = lengths_of(text_tokens(seq_len))[1]
    answers, decoder_layers = target_len / seq_len, model.num_hidden_layers - model.num_encoder_layers
    layer, scores = attention + _feed_forward(model, 0), 2 * seq_len * heads_dim
    own_scores, projections = 2 * target_len * heads_dim, 2 * model.hidden_size * heads_dim
    # Queries and output of the attention to the encoder are of answers, keys and values of what it read.
    decoder = answers * (layer + own_scores + projections + scores) + projections
    return 6.0 * (model.num_encoder_layers * (layer + scores) + decoder_layers * decoder + answers * head)


def _feed_forward(model: ModelConfig, layer: int) -> int:
    """Weights that multiply a token in the MLP of a layer, or in its router, the experts that it takes and the shared
    one."""
    product = model.hidden_size * (3 if model.gated_mlp else 2)
    moe = model.moe
    if moe is None or not moe.has_experts(layer):
        return product * model.intermediate_size
    width = moe.num_experts_per_tok * moe.moe_intermediate_size + moe.shared_expert_intermediate_size
    return product * width + model.hidden_size * (moe.num_experts + moe.shared_expert_gate)


def _latent_weights(model: ModelConfig, latent: LatentSizes) -> int:
    """Elements of the matrices of one layer's latent attention."""
    hidden, heads, q_rank = model.hidden_size, model.num_attention_heads, latent.q_lora_rank
    down = hidden * ((q_rank or 0) + latent.kv_lora_rank + latent.qk_rope_head_dim)
    queries = (q_rank or hidden) * heads * latent.qk_head_dim
    keys = latent.kv_lora_rank * heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    return down + queries + keys + heads * latent.v_head_dim * hidden


def find_peak(asked: float | str, device: torch.device, dtype: torch.dtype) -> Peak | None:
    """The peak that the configuration asks for; None when "auto" does not know this device or type."""
    if isinstance(asked, float | int):
        return Peak(asked * 1e12, f"{asked:g} TFLOP/s as configured")
    if asked == "measure":
        return measure_peak(device, dtype)
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for known, tflops in _DENSE_16_BIT_TFLOPS.items():
            if known in name:
                return Peak(tflops * 1e12, f"{tflops} TFLOP/s, dense 16 bit by the data sheet of {known}")
    return None


def measure_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The best of several square matrix products here and now."""
    size, rounds = (8192, 20) if device.type == "cuda" else (1024, 5)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    flops = 2 * size**3 / best
    return Peak(flops, f"{flops / 1e12:.3g} TFLOP/s, measured {size} x {size} matrix product in {str(dtype)[6:]}")
