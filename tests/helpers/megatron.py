"""megatron-core on a CPU, as an oracle: the patches that it needs there, and its GPT model built from our features.

Nothing of this belongs in the product. Needs the [interop] extra (megatron-core 0.16.1).
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from workbench.spec.model import ModelConfig


def patch_for_cpu() -> None:
    """Lets megatron-core's local layers run without CUDA; once, before anything of it is built."""
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.current_device = lambda: "cpu"
    from megatron.core.tensor_parallel import random

    random.CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()


@contextlib.contextmanager
def single_rank() -> Iterator[None]:
    """A gloo group of this process alone, with megatron-core's own groups on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
    patch_for_cpu()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def gpt_model(model: ModelConfig, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """megatron-core's GPTModel, local layer spec, with parameters of `dtype`; for gated models with rope and RMSNorm.

    Its model-parallel groups must exist.
    """
    assert model.norm == "rmsnorm" and model.gated_mlp and model.position_embedding == "rope"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer.transformer_config import TransformerConfig

        config = TransformerConfig(
            num_layers=model.num_hidden_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.intermediate_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_key_value_heads,
            kv_channels=model.head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=model.norm_eps,
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cpu_initialization=True,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            persist_layer_norm=False,
            bias_dropout_fusion=False,
        )
        return GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_position_embeddings,
            position_embedding_type="rope",
            rotary_base=int(model.rope_theta),
            share_embeddings_and_output_weights=model.tie_word_embeddings,
        ).to(dtype)


def fill(gpt: torch.nn.Module, model: ModelConfig, logical: Mapping[str, torch.Tensor]) -> None:
    """Gives megatron-core's model the values of our logical tensors, in its own fused order."""
    sources: dict[str, Callable[[], torch.Tensor]] = {
        "embedding.word_embeddings.weight": lambda: logical["embed_tokens.weight"],
        "decoder.final_layernorm.weight": lambda: logical["norm.weight"],
        "output_layer.weight": lambda: logical["lm_head.weight"],
    }
    for i in range(model.num_hidden_layers):
        ours, theirs = f"layers.{i}", f"decoder.layers.{i}"
        sources |= {
            f"{theirs}.input_layernorm.weight": _one(logical, f"{ours}.input_layernorm.weight"),
            f"{theirs}.pre_mlp_layernorm.weight": _one(logical, f"{ours}.post_attention_layernorm.weight"),
            f"{theirs}.self_attention.linear_proj.weight": _one(logical, f"{ours}.self_attn.o_proj.weight"),
            f"{theirs}.self_attention.linear_qkv.weight": _qkv(logical, f"{ours}.self_attn", model),
            f"{theirs}.mlp.linear_fc1.weight": _one(
                logical, f"{ours}.mlp.gate_proj.weight", f"{ours}.mlp.up_proj.weight"
            ),
            f"{theirs}.mlp.linear_fc2.weight": _one(logical, f"{ours}.mlp.down_proj.weight"),
        }
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            parameter.copy_(sources[name]())


def token_losses(gpt: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss of each label, [B, T]; `labels` are already shifted, and none may be ignored."""
    tokens = input_ids.shape[1]
    masked = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(tokens).expand_as(input_ids)
    losses: Any = gpt(input_ids, positions, masked, labels=labels)
    return losses


def _one(logical: Mapping[str, torch.Tensor], *names: str) -> Callable[[], torch.Tensor]:
    return lambda: torch.cat([logical[name] for name in names])


def _qkv(logical: Mapping[str, torch.Tensor], path: str, model: ModelConfig) -> Callable[[], torch.Tensor]:
    """One group after the other: the query heads that share a key/value head, its key, its value."""
    shape = (model.num_key_value_heads, -1, model.hidden_size)
    return lambda: torch.cat([logical[f"{path}.{x}_proj.weight"].view(shape) for x in "qkv"], dim=1).flatten(0, 1)
