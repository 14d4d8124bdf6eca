"""megatron-core on a CPU, as an oracle: the patches that it needs there, and its GPT model built from our features.

Nothing of this belongs in the product. Needs the [interop] extra (megatron-core 0.16.1).
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.nn.functional as F

from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

ON_CPU: Final = {
    "use_cpu_initialization": True,
    "bias_activation_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "bias_dropout_fusion": False,
}
"""Fields of a configuration whose layers run without CUDA: nothing is fused."""


def patch_for_cpu() -> None:
    """Lets megatron-core's local layers run without CUDA; once, before anything of it is built."""
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.current_device = lambda: "cpu"
    torch.Tensor.cuda = lambda self, *_, **__: self
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # which it looks for without Transformer Engine too
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


def gpt_model(
    model: ModelConfig,
    dtype: torch.dtype = torch.float32,
    *,
    layout: ParallelLayout | None = None,
    padded_vocab: int | None = None,
    chunk: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """What this rank has of megatron-core's GPTModel, local layer spec, with parameters of `dtype`.

    Its model-parallel groups must exist. padded_vocab: rows of the embedding, with padding. chunk: of a stage of
    several. overrides: more fields of its configuration.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        config = transformer_config(model, dtype, layout or ParallelLayout(), overrides or {})
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization, vp_stage=chunk
        )
        scaling = model.rope_scaling
        return GPTModel(
            config,
            spec,
            vocab_size=padded_vocab or model.vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=chunk is None, vp_stage=chunk),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=chunk is None, vp_stage=chunk),
            position_embedding_type="rope" if model.position_embedding == "rope" else "learned_absolute",
            rotary_base=int(model.rope_theta),
            rotary_percent=model.partial_rotary_factor,
            rope_scaling=scaling is not None and scaling.kind == "by_parts",
            rope_scaling_factor=scaling.factor if scaling else 8.0,
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            vp_stage=chunk,
        ).to(dtype)


def transformer_config(
    model: ModelConfig, dtype: torch.dtype, layout: ParallelLayout, overrides: Mapping[str, Any]
) -> Any:
    """megatron-core's configuration of a model at a layout, nothing fused and nothing dropped.

    Without latent attention, which version 0.16.1 builds of Transformer Engine's layers only.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[model.hidden_act]
    fields: dict[str, Any] = {
        **shared_words(model, layout),
        "layernorm_epsilon": model.norm_eps,
        "gated_linear_unit": model.gated_mlp,
        "activation_func": act,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_dtype": dtype,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        **ON_CPU,
    }
    if model.moe is not None:
        fields |= {
            "num_moe_experts": model.moe.num_experts,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "allgather",
        }
    return TransformerConfig(**{**fields, **overrides})


def shared_words(model: ModelConfig, layout: ParallelLayout) -> dict[str, Any]:
    """What megatron-core's configuration and Megatron's arguments say of a model at a layout by the same names."""
    words: dict[str, Any] = {
        "num_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.intermediate_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_key_value_heads,
        "kv_channels": model.head_dim,
        "normalization": "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
        "add_bias_linear": model.mlp_bias,
        "add_qkv_bias": model.attention_bias,
        "qk_layernorm": model.qk_norm == "head",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
    }
    if (moe := model.moe) is not None:
        sparse = [int(model.has_experts(layer)) for layer in range(model.num_hidden_layers)]
        words |= {
            "moe_layer_freq": 1 if all(sparse) else sparse,
            "moe_ffn_hidden_size": moe.moe_intermediate_size,
            "moe_router_topk": moe.num_experts_per_tok,
            "moe_router_pre_softmax": moe.scoring == "softmax" and not moe.norm_topk_prob,
            "moe_router_score_function": moe.scoring,
            "moe_router_enable_expert_bias": moe.e_score_correction_bias,
            "moe_shared_expert_intermediate_size": moe.shared_expert_intermediate_size or None,
            "moe_shared_expert_gate": moe.shared_expert_gate,
        }
    return words


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
