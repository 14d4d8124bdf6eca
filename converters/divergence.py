"""Where two runs of one model part: hidden states after each layer, compared until the first that differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench.checkpoint.source import TensorSource
from workbench.spec.model import ModelConfig
from workbench.spec.schema import has_final_norm

if TYPE_CHECKING:
    import numpy as np
    import torch


def state_names(model: ModelConfig) -> list[str]:
    """What each hidden state is the output of, in the order in which transformers lists them."""
    encoder, layers = model.num_encoder_layers, model.num_hidden_layers
    sides = [("encoder ", 0, encoder), ("decoder ", encoder, layers)] if encoder else [("", 0, layers)]
    norm = " and the norm after it" if has_final_norm(model) else ""
    return [
        name
        for side, start, stop in sides
        for name in (
            f"the {side}embeddings",
            *(f"{side}layer {i - start}" for i in range(start, stop - 1)),
            f"{side}layer {stop - 1 - start}{norm}",
        )
    ]


def engine_states(model: ModelConfig, source: TensorSource, inputs: Mapping[str, Sequence[int]]) -> list[np.ndarray]:
    """The hidden states of one sequence as `state_names` names them, in fp32 on the CPU at tp=1."""
    from workbench.models.generate import load_model, outputs

    stage = load_model(model, source)
    kept: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args, *result: kept.__setitem__(name, _plain((*args, *result)[0 if not result else -1]))

    for index, layer in stage.layers.items():
        layer.register_forward_pre_hook(keep(index))
    stage.norm.register_forward_hook(keep("norm"))
    if model.num_encoder_layers:
        stage.encoder_norm.register_forward_hook(keep("encoder_norm"))
    outputs(stage, inputs)
    order = [str(index) for index in range(model.num_hidden_layers)]
    encoder = model.num_encoder_layers
    order[encoder:encoder] = ["encoder_norm"] if encoder else []
    return [kept[name] for name in (*order, "norm")]


def _plain(states_BTD: torch.Tensor) -> Any:
    return states_BTD[0].float().numpy()


def first_divergence(
    model: ModelConfig, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], tolerance: float
) -> str:
    """In words, the first hidden state that differs by more than `tolerance` of its size, and by how much."""
    import numpy as np

    names = state_names(model)
    if not len(names) == len(ours) == len(theirs):
        return f"their {len(theirs)} hidden states cannot be told layer by layer"
    for name, a, b in zip(names, ours, theirs, strict=True):
        if a.shape != b.shape:
            return f"the first to differ is {name}, of shape {list(b.shape)} and {list(a.shape)}"
        gap = np.abs(a.astype(np.float64) - b)
        gap = np.where(np.isfinite(gap), gap, np.inf)
        if gap.max() > tolerance * max(1.0, float(np.abs(b).max()) / 10):
            return f"the first to differ is the output of {name}, by {gap.max():.3g}"
    return "all layers agree, so it is the head that differs"
