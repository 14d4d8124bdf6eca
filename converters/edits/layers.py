"""Some of the layers of a model, renumbered; a layer may be taken more than once. Moments go with their layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from converters.edits.edited import changed_model, edited
from converters.format import OpenedCheckpoint
from workbench.checkpoint.source import TensorSource
from workbench.errors import ConfigError, ConversionError
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.model import ModelConfig

_LAYER = re.compile(r"((?:optim\.[^/]*/)?layers\.)(\d+)(\..*)")


class RenamedSource:
    """Tensors of a source under other names; one may have several, and those without a name are left out."""

    def __init__(self, source: TensorSource, origins: Mapping[str, str]) -> None:
        """origins: the name in `source` of each tensor."""
        self._source, self._origins = source, origins
        self._schema = {name: replace(source.schema[origin], name=name) for name, origin in origins.items()}

    @property
    def schema(self) -> Mapping[str, LogicalTensor]:
        """The tensors by their new names."""
        return self._schema

    def chunks(self, name: str) -> tuple[Box, ...]:
        """As the source holds it."""
        return self._source.chunks(self._origins[name])

    def read(self, name: str, box: Box) -> np.ndarray:
        """The box of the tensor's origin."""
        return self._source.read(self._origins[name], box)


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """The layers that '0-7,16-31' names, of `count`; ConfigError when there are no such layers."""
    found: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigError(f"--layers {text!r}: {word!r} is not a layer or a range; write it as 0-7,16-31")
        if last >= count:
            raise ConfigError(f"--layers {text!r}: the model has layers 0 to {count - 1}, and no layer {last}")
        found += range(first, last + 1)
    return tuple(found)


def select_layers(opened: OpenedCheckpoint, layers: Sequence[int]) -> OpenedCheckpoint:
    """`opened` with these of its layers, in this order."""
    places: dict[int, list[int]] = {}
    for new, old in enumerate(layers):
        places.setdefault(old, []).append(new)
    origins: dict[str, str] = {}
    dropped: dict[str, str] = {}
    for name in opened.source.schema:
        match = _LAYER.fullmatch(name)
        if match is None:
            origins[name] = name
        elif int(match[2]) in places:
            origins |= {f"{match[1]}{new}{match[3]}": name for new in places[int(match[2])]}
        else:
            dropped[name] = f"layer {match[2]} is not among the layers taken"
    model = changed_model(opened, _changes(opened.model, layers))
    what = f"layers {','.join(map(str, layers))} of {opened.model.num_hidden_layers} taken, renumbered from 0"
    found = edited(opened, RenamedSource(opened.source, origins), what, model=model, dropped=dropped)
    layout = found.layout.model_copy(update={"pp_layout": None}) if found.layout else None
    return replace(found, layout=layout)


def _changes(model: ModelConfig, layers: Sequence[int]) -> dict[str, Any]:
    """The fields that speak of layers."""
    encoder = model.num_encoder_layers
    if encoder and [layer >= encoder for layer in layers] != sorted(layer >= encoder for layer in layers):
        raise ConversionError(f"layers 0 to {encoder - 1} are the encoder; name them before those of the decoder")
    changes: dict[str, Any] = {
        "num_hidden_layers": len(layers),
        "num_encoder_layers": sum(layer < encoder for layer in layers),
    }
    if model.layer_types is not None:
        changes["layer_types"] = kinds = tuple(model.layer_types[layer] for layer in layers)
        changes["sliding_window"] = model.sliding_window if "sliding_attention" in kinds else None
    if model.moe is not None:
        dense = tuple(new for new, old in enumerate(layers) if not model.has_experts(old))
        every = {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        changes["moe"] = None if len(dense) == len(layers) else model.moe.model_dump() | every
    return changes
