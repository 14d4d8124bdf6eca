"""What a step's tokens were to the experts: counted over all ranks, turned into biases and into metrics.

Legend: L layers with experts on this stage, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench.models.decoder import DecoderStage
from workbench.models.moe import SparseMLP
from workbench.parallel.mesh import Mesh


@dataclass(frozen=True)
class ExpertLoad:
    """Of each layer on this stage, over all ranks and microbatches since it was last asked: tokens of each expert
    [L, E], and the sums of the router's losses, balance and z, each weighted by its microbatch's labels [L, 2]."""

    layers: tuple[int, ...]
    tokens_LE: torch.Tensor
    losses_L2: torch.Tensor

    def metrics(self, mesh: Mesh, *, num_labels: int) -> dict[str, float]:
        """The load of the fullest expert of each layer, 1 being even, of the worst layer, and the mean losses of the
        routers before their coefficients; equal on all ranks. Collective over the world."""
        fullest_L = self.tokens_LE.amax(dim=1) / self.tokens_LE.mean(dim=1).clamp(min=1e-9)
        means_L2 = self.losses_L2 / max(num_labels, 1)
        here = list(zip(self.layers, fullest_L.tolist(), *means_L2.t().tolist(), strict=True))
        found = {row[0]: row for rows in mesh.world.gather_objects(here) for row in rows}
        layers, loads, balance, z = zip(*(found[layer] for layer in sorted(found)), strict=True)
        return {
            "router_aux_loss": sum(balance) / len(layers),
            "router_z_loss": sum(z) / len(layers),
            "expert_load": max(loads),
            **{f"expert_load/{layer}": load for layer, load in zip(layers, loads, strict=True)},
        }


def take_load(stage: DecoderStage, mesh: Mesh) -> ExpertLoad | None:
    """What the routers of `stage` have counted since the last call; None for a model without experts. Collective over
    the stage."""
    routers = {int(layer): block.mlp.gate for layer, block in stage.layers.items() if isinstance(block.mlp, SparseMLP)}
    if stage.model.moe is None:
        return None
    experts = stage.model.moe.num_experts
    seen = torch.zeros(len(routers), experts + 2, dtype=torch.float64, device=mesh.device)
    for row, router in zip(seen, routers.values(), strict=True):
        if router.tally is not None:
            row[:experts], row[experts:] = router.tally.tokens_E, router.tally.losses_2
            router.tally = None
    mesh.data.all_reduce(seen)
    if mesh.layout.sequence_parallel:
        mesh.tp.all_reduce(seen)
    return ExpertLoad(tuple(routers), seen[:, :experts], seen[:, experts:])


@torch.no_grad()
def balance_experts(stage: DecoderStage, load: ExpertLoad) -> None:
    """Raises by one step the biases of experts that had fewer tokens than the mean, and lowers those of the others
    (arXiv:2408.15664, algorithm 1). Frozen routers stay as they are."""
    for layer, tokens_E in zip(load.layers, load.tokens_LE, strict=True):
        router = stage.layers[str(layer)].mlp.gate
        moves = router.moe.bias_update_rate and router.weight.requires_grad
        if router.e_score_correction_bias is not None and moves:
            towards_E = (tokens_E.mean() - tokens_E).sign()
            router.e_score_correction_bias.add_(towards_E, alpha=router.moe.bias_update_rate)
