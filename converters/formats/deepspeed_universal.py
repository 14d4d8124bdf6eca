"""DeepSpeed universal checkpoints, read only. NumPy, no torch.

`ds_to_universal.py` of DeepSpeed writes `zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt`, each parameter whole,
and copies `*_model_states.pt` beside. Under ZeRO 1 and 2 a file holds {"param": tensor, ...}; under ZeRO 3 the tensor
alone, flat, its shape in the `param_shapes` of the model states. Parameters have the names of the model that was
trained: those of transformers are read, by the `config.json` in the folder or in that above.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from converters.cast import FLOATS
from converters.family import Family
from converters.format import Destination, OpenedCheckpoint, WriteRequest
from converters.formats._huggingface_files import CONFIG, StridedReader
from converters.formats._huggingface_source import require_equal
from converters.formats.huggingface import birth, read_model
from converters.matching import match
from converters.rules import pull
from converters.untrusted.paths import file_inside
from converters.untrusted.plain import Allowed
from converters.untrusted.torch_file import TORCH, StridedTensor, read_torch
from workbench.checkpoint.manifest import TrainingState
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.model import ModelConfig
from workbench.spec.schema import OPTIMIZER_PREFIX

if TYPE_CHECKING:
    import numpy as np

NAME: Final = "deepspeed_universal"
_WEIGHTS: Final = "fp32"
_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
_ZERO: Final = "zero"
_STATES: Final = "_model_states.pt"
_ALLOWED: Final = Allowed(TORCH, inert=("deepspeed.", "megatron."))


@dataclass(frozen=True)
class DeepSpeedUniversalFormat:
    """What DeepSpeed's ds_to_universal.py writes."""

    name: str = NAME

    def recognises(self, path: Path) -> bool:
        """Whether `path` is a folder with model states and `zero/<parameter>/fp32.pt`."""
        return (path / _ZERO).is_dir() and any(path.glob(f"*{_STATES}"))

    def open(self, path: Path, *, family: str | None = None, vocab_size: int | None = None) -> OpenedCheckpoint:
        """The folder as logical tensors: weights in float32, and moments where it holds them.

        CheckpointError when it is damaged or has no config.json, ConversionError when the family has no place for a
        parameter.
        """
        folder = next((folder for folder in (path, path.parent) if (folder / CONFIG).is_file()), None)
        if folder is None:
            raise CheckpointError(
                f"{path}: has no {CONFIG}, in it or beside it, so nothing says which model these parameters make; "
                "copy the model's there (save_pretrained of transformers writes it)"
            )
        found, model, config = read_model(folder, family)
        states = _model_states(path)
        source = UniversalSource(path, found, model, _shapes(path, states))
        return OpenedCheckpoint(
            format=NAME,
            path=path,
            source=source,
            model=model,
            training=_training(states, source.step) if source.has_moments else None,
            family=found.name,
            lineage=(birth(folder, found, config), {"format": NAME, "name": path.resolve().name}),
            info={"architecture": found.architecture(model), "not taken over": "scheduler, RNG, DeepSpeed's settings"},
            unplaced=source.unplaced,
        )

    def destination(self, request: WriteRequest) -> Destination:
        """Refuses: this format is read only."""
        raise ConversionError(f"{request.path}: DeepSpeed universal checkpoints are read, not written")


class UniversalSource:
    """A universal checkpoint seen as logical tensors (`TensorSource`). step: of the optimizer, where it is told."""

    def __init__(self, folder: Path, family: Family, model: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        weights = _places(folder, _WEIGHTS, shapes)
        if not weights:
            raise CheckpointError(
                f"{folder / _ZERO}: has no <parameter>/{_WEIGHTS}.pt; was the conversion interrupted?"
            )
        foreign = {name: LogicalTensor(name, place.shape, place.dtype) for name, place in weights.items()}
        reader = StridedReader(weights)
        found = match(family, model, foreign, str(folder), may_leave_over=True)
        require_equal(folder, found, foreign, reader)
        self.schema: dict[str, LogicalTensor] = dict(found.schema)
        self.places = {name: (weights[foreign_name], rule) for name, (foreign_name, rule) in found.places.items()}
        for kind in _MOMENTS:
            self._add_moments(kind, _places(folder, kind, shapes), foreign, folder)
        self.has_moments = len(self.schema) > len(found.schema)
        self.step = _step(folder, foreign)
        self.unplaced = found.over

    def _add_moments(
        self, kind: str, places: Mapping[str, StridedTensor], foreign: Mapping[str, LogicalTensor], folder: Path
    ) -> None:
        if not places:
            return
        for name, (weight, rule) in list(self.places.items()):
            if name.startswith(OPTIMIZER_PREFIX):
                continue
            parameter = weight.file.parent.name
            if parameter not in places or places[parameter].shape != foreign[parameter].shape:
                where = folder / _ZERO / parameter
                raise CheckpointError(f"{where}: its {kind}.pt is missing or has another shape than its {_WEIGHTS}.pt")
            moment = f"{OPTIMIZER_PREFIX}{kind}/{name}"
            self.places[moment] = (places[parameter], rule)
            self.schema[moment] = replace(self.schema[name], name=moment, dtype=places[parameter].dtype)

    def chunks(self, name: str) -> tuple[Box, ...]:
        """The whole tensor: a parameter lies in one file."""
        return (Box.whole(self.schema[name].shape),)

    def read(self, name: str, box: Box) -> np.ndarray:
        """The elements of `box` in storage dtype."""
        place, rule = self.places[name]
        return pull(rule.view, box, place.read)

    def close(self) -> None:
        """Nothing is kept open."""


def _places(folder: Path, state: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, StridedTensor]:
    """Where the state of every parameter lies, in its shape."""
    found: dict[str, StridedTensor] = {}
    for parameter in sorted((folder / _ZERO).iterdir()):
        if not (parameter / f"{state}.pt").is_file():
            continue
        path = file_inside(parameter, f"{state}.pt", _ZERO)
        value = read_torch(path, allowed=_ALLOWED)
        place = value.get("param") if type(value) is dict else value
        if type(place) is not StridedTensor or place.dtype not in FLOATS:
            held = place.dtype if type(place) is StridedTensor else type(place).__name__
            raise CheckpointError(f"{path}: holds {held}, not the numbers of a parameter")
        found[parameter.name] = place if type(value) is dict else _shaped(place, shapes.get(parameter.name))
    return found


def _shaped(flat: StridedTensor, shape: tuple[int, ...] | None) -> StridedTensor:
    if shape is None or flat.strides != (1,) or math.prod(shape) != math.prod(flat.shape):
        raise CheckpointError(
            f"{flat.file}: holds {list(flat.shape)} numbers without a shape, and the model states "
            f"give {'none' if shape is None else list(shape)}"
        )
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return replace(flat, shape=shape, strides=strides)


def _model_states(folder: Path) -> Mapping[str, Any]:
    """What the first of the model states holds; ranks agree on all that is read of it."""
    path = min(folder.glob(f"*{_STATES}"))
    states = read_torch(file_inside(folder, path.name, NAME), allowed=_ALLOWED)
    if type(states) is not dict:
        raise CheckpointError(f"{path}: holds {type(states).__name__}, not the states of a model")
    return states


def _shapes(folder: Path, states: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of parameters by name, of all groups of the optimizer."""
    groups = states.get("param_shapes") or []
    groups = groups if type(groups) is list else [groups]
    found: dict[str, tuple[int, ...]] = {}
    for group in groups:
        if type(group) is not dict or not all(type(shape) is tuple for shape in group.values()):
            raise CheckpointError(f"{folder}: its model states have param_shapes that are no shapes by name")
        found.update(group)
    return found


def _step(folder: Path, parameters: Iterable[str]) -> int | None:
    """The step of the optimizer, which all parameters share; None under ZeRO 3. CheckpointError when they differ."""
    found: set[int] = set()
    for name in parameters:
        path = folder / _ZERO / name / "step.pt"
        if path.is_file():
            value = read_torch(file_inside(path.parent, path.name, _ZERO), allowed=_ALLOWED)
            value = value.read(Box.whole(value.shape)).item() if type(value) is StridedTensor else value
            if type(value) not in (int, float) or value < 0 or value % 1 != 0:
                raise CheckpointError(f"{path}: holds {str(value)[:100]}, not a step")
            found.add(int(value))
    if len(found) > 1:
        raise CheckpointError(f"{folder}: its parameters are at different steps ({min(found)} to {max(found)})")
    return found.pop() if found else None


def _training(states: Mapping[str, Any], step: int | None) -> TrainingState:
    """Where the run stood; without a step of its own the optimizer's is that of the run."""
    run, samples = states.get("global_steps", 0), states.get("global_samples", 0)
    if not all(type(count) is int and count >= 0 for count in (run, samples)):
        raise CheckpointError(f"the model states count {run!r} steps and {samples!r} samples")
    return TrainingState(run, samples, optimizer={"name": "adamw", "step": run if step is None else step})


FORMAT = DeepSpeedUniversalFormat()
