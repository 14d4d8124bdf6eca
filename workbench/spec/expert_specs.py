"""The parameters of a router and its experts, and how expert and expert-tensor parallelism cut them. No torch.

Experts are dealt over the ranks of the expert axis, in order; each one's width is cut over the tensor axis, or not.
"""

from __future__ import annotations

from workbench.spec.geometry import Initial, ParameterSpec, Part
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig
from workbench.spec.moe import MixtureOfExperts


def router_specs(model: ModelConfig, moe: MixtureOfExperts, layout: ParallelLayout, layer: int) -> list[ParameterSpec]:
    """What chooses and weighs experts: whole on every rank. Under sequence parallelism each sees its own tokens."""
    path, partial, at = f"layers.{layer}.mlp", layout.sequence_parallel, (layer,)
    gate = Part(f"{path}.gate.weight", (moe.num_experts, model.hidden_size), partial_grad=partial)
    specs = [ParameterSpec(f"{path}.gate.weight", (gate,), at, "router")]
    if moe.e_score_correction_bias:
        bias = Part(f"{path}.gate.e_score_correction_bias", (moe.num_experts,))
        specs.append(ParameterSpec(f"{path}.gate.e_score_correction_bias", (bias,), at, "balance", "zeros"))
    if moe.shared_expert_gate:
        scale = Part(f"{path}.shared_expert_gate.weight", (1, model.hidden_size), partial_grad=partial)
        specs.append(ParameterSpec(f"{path}.shared_expert_gate.weight", (scale,), at, "router"))
    return specs


def expert_specs(model: ModelConfig, moe: MixtureOfExperts, layout: ParallelLayout, layer: int) -> list[ParameterSpec]:
    """All experts of a layer: one parameter of inputs (gate and up of the first, of the second ...), one of outputs.

    An expert that is whole on every tensor rank sees that rank's tokens alone, so part of its gradient.
    """
    path, hidden, width = f"layers.{layer}.mlp.experts", model.hidden_size, moe.moe_intermediate_size
    is_cut, at = layout.expert_tp > 1, (layer,)

    def part(expert: int, name: str, shape: tuple[int, int], dim: int) -> Part:
        name = f"{path}.{expert}.{name}.weight"
        return Part(name, shape, dim=dim) if is_cut else Part(name, shape, partial_grad=layout.tp > 1)

    names = ("gate_proj", "up_proj") if model.gated_mlp else ("up_proj",)
    experts = range(moe.num_experts)
    up = tuple(part(expert, name, (width, hidden), 0) for expert in experts for name in names)
    down = tuple(part(expert, "down_proj", (hidden, width), 1) for expert in experts)
    residual: Initial = "residual" if model.scale_residual_init else "normal"
    return [
        ParameterSpec(f"{path}.up_proj", up, at, "matrix", dealt=layout.ep),
        ParameterSpec(f"{path}.down_proj", down, at, "matrix", residual, dealt=layout.ep),
    ]
