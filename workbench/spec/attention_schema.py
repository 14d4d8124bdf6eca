"""The projections of multi-head latent attention (arXiv:2405.04434, sec. 2.1) and how they are cut. No torch.

What leads down to a latent is whole on every tensor rank: a latent is small, and every head needs all of it. What leads
up from it is cut by heads. The ranks sum the gradient of the latent before it goes further down, so that gradients
below are whole; under sequence parallelism they are those of a rank's own tokens.
"""

from __future__ import annotations

from workbench.spec.geometry import ParameterSpec, Part
from workbench.spec.latent import LatentSizes
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig


def latent_specs(
    model: ModelConfig, latent: LatentSizes, layout: ParallelLayout, layer: int
) -> tuple[ParameterSpec, ...]:
    """Everything between the hidden states and the heads of one layer.

    The projections down are one parameter. Without q_lora_rank the queries come straight from the hidden states.
    """
    base, at = f"layers.{layer}.self_attn", (layer,)
    heads, hidden, partial = model.num_attention_heads, model.hidden_size, layout.sequence_parallel
    q_rank, kv_rank = latent.q_lora_rank, latent.kv_lora_rank
    widths = {"q_a_proj": q_rank} if q_rank else {}
    widths["kv_a_proj_with_mqa"] = kv_rank + latent.qk_rope_head_dim

    def down(suffix: str, *columns: int) -> tuple[Part, ...]:
        return tuple(
            Part(f"{base}.{name}.{suffix}", (width, *columns), partial_grad=partial) for name, width in widths.items()
        )

    def up(name: str, head_dim: int, inputs: int) -> ParameterSpec:
        part = Part(f"{base}.{name}.weight", (heads * head_dim, inputs), dim=0, units=heads)
        return ParameterSpec(part.name, (part,), at, "matrix")

    def norm(name: str, width: int) -> ParameterSpec:
        part = Part(f"{base}.{name}.weight", (width,), partial_grad=partial)
        return ParameterSpec(part.name, (part,), at, "norm", "ones")

    specs = [ParameterSpec(f"{base}.down_proj.weight", down("weight", hidden), at, "matrix")]
    if model.attention_bias:
        specs.append(ParameterSpec(f"{base}.down_proj.bias", down("bias"), at, "bias", "zeros"))
    if q_rank:
        specs += [norm("q_a_layernorm", q_rank), up("q_b_proj", model.head_dim, q_rank)]
    else:
        specs.append(up("q_proj", model.head_dim, hidden))
    specs.append(norm("kv_a_layernorm", kv_rank))
    specs.append(up("kv_b_proj", latent.qk_nope_head_dim + latent.v_head_dim, kv_rank))
    return tuple(specs)
