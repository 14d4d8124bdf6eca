"""The keys of a foreign configuration that say which layers attend to a sliding window. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from converters.fields import FieldFault, Foreign
from workbench.spec.model import MAX_LAYERS, ModelConfig

KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class SlidingLayers:
    """`sliding_window` and `layer_types`.

    derive: whether a layer slides where `layer_types` is absent, by the configuration and the layer's index. older: the
    keys that it reads. switched: whether the window counts only if `use_sliding_window` is true.
    """

    num_layers: int
    derive: Callable[[Foreign, int], bool]
    older: tuple[str, ...] = ()
    switched: bool = False
    default_window: int | None = 4096
    fields: tuple[str, ...] = ("sliding_window", "layer_types")

    @property
    def keys(self) -> tuple[str, ...]:
        switch = ("use_sliding_window",) if self.switched else ()
        return ("sliding_window", "layer_types", *switch, *self.older)

    def load(self, given: Foreign) -> dict[str, Any]:
        window = given.get("sliding_window", self.default_window)
        if self.switched and not given.get("use_sliding_window", False):
            window = None
        kinds = given.get("layer_types")
        if kinds is None:
            layers = range(min(given.get("num_hidden_layers", self.num_layers), MAX_LAYERS))
            kinds = [KINDS[window is not None and self.derive(given, layer)] for layer in layers]
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise FieldFault(f"layer_types has {', '.join(unknown)}, only {' and '.join(KINDS)}")
        if KINDS[1] not in kinds:
            return {"sliding_window": None, "layer_types": None}
        if window is None:
            raise FieldFault("layer_types has layers that slide, but no sliding_window is in use")
        return {"sliding_window": window, "layer_types": tuple(kinds) if KINDS[0] in kinds else None}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        kinds = [KINDS[model.slides(layer)] for layer in range(model.num_hidden_layers)]
        switch: Mapping[str, Any] = {"use_sliding_window": model.sliding_window is not None} if self.switched else {}
        return {"sliding_window": model.sliding_window, "layer_types": kinds, **switch}


@dataclass(frozen=True)
class AllSlide:
    """`sliding_window` of all layers, which counts only if `use_sliding_window` is true."""

    keys: tuple[str, ...] = ("sliding_window", "use_sliding_window")
    fields: tuple[str, ...] = ("sliding_window",)

    def load(self, given: Foreign) -> dict[str, Any]:
        return {"sliding_window": given.get("sliding_window", 4096) if given.get("use_sliding_window") else None}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": model.sliding_window, "use_sliding_window": model.sliding_window is not None}
