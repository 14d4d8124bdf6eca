"""Between live parameters and tensor sources: what a rank holds, as arrays; and loading from any source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from workbench.checkpoint.source import TensorSource
from workbench.errors import CheckpointError
from workbench.parallel.live import LiveParameter, shard_views
from workbench.parallel.nf4 import Nf4Weight
from workbench.spec.dtypes import TORCH_NAMES
from workbench.spec.geometry import Box, LogicalTensor

_DTYPE_NAMES = {getattr(torch, torch_name): name for name, torch_name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class StoredBox:
    """A box that this rank writes to a checkpoint."""

    tensor: LogicalTensor
    box: Box
    view: torch.Tensor

    def array(self) -> np.ndarray:
        """The values, contiguous on the CPU, in the storage dtype."""
        return to_array(self.view)


def stored_boxes(
    parameters: Sequence[LiveParameter], prefix: str = "", values: dict[str, torch.Tensor] | None = None
) -> Iterator[StoredBox]:
    """The boxes that this rank saves: over all ranks each logical element once.

    `values` by parameter path are tensors of the parameters' local shapes (moments, say); by default the parameters.
    """
    for parameter in parameters:
        if not parameter.counted or (values is not None and parameter.path not in values):
            continue
        data = parameter.data if values is None else values[parameter.path]
        shapes = {part.name: part.shape for part in parameter.spec.parts}
        for shard, view in shard_views(parameter, data):
            if shard.copy == 0:
                tensor = LogicalTensor(prefix + shard.name, shapes[shard.name], dtype_name(view.dtype))
                yield StoredBox(tensor, shard.box, view)


def load(
    parameters: Sequence[LiveParameter],
    source: TensorSource,
    prefix: str = "",
    values: dict[str, torch.Tensor] | None = None,
) -> None:
    """Fills parameters (or `values` by path, as in `stored_boxes`) from the boxes of `source`; padding becomes zero.

    Values are cast to the parameter's type. Raises CheckpointError naming every tensor that is missing or has another
    shape, before anything is written.
    """
    targets = [
        (p, p.data if values is None else values[p.path]) for p in parameters if values is None or p.path in values
    ]
    _require({prefix + part.name: part.shape for parameter, _ in targets for part in parameter.spec.parts}, source)
    for parameter, data in targets:
        data.zero_()
        for shard, view in shard_views(parameter, data):
            name = prefix + shard.name
            view.copy_(to_tensor(source.read(name, shard.box), source.schema[name].dtype))


def load_packed(stage: nn.Module, source: TensorSource) -> None:
    """Fills every weight of `stage` that is held in 4 bits, one after another; raises as `load` does."""
    packed = [module for module in stage.modules() if isinstance(module, Nf4Weight)]
    _require({name: shape for weight in packed for name, shape in weight.logical.items()}, source)

    def read(name: str) -> torch.Tensor:
        tensor = source.schema[name]
        return to_tensor(source.read(name, Box.whole(tensor.shape)), tensor.dtype)

    for weight in packed:
        weight.fill(read)


def _require(shapes: Mapping[str, tuple[int, ...]], source: TensorSource) -> None:
    """CheckpointError naming every tensor that `source` lacks or has in another shape."""
    faults = []
    for name, shape in shapes.items():
        found = source.schema.get(name)
        if found is None:
            faults.append(f"{name} is missing")
        elif found.shape != shape:
            faults.append(f"{name} has shape {list(found.shape)}, the model needs {list(shape)}")
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise CheckpointError(f"the checkpoint does not fit the model: {shown}")


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a torch type."""
    return _DTYPE_NAMES[dtype]


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous array of the same bits on the CPU; bfloat16 becomes uint16."""
    local = tensor.detach().to("cpu").contiguous()
    return (local.view(torch.int16).numpy().view(np.uint16)) if local.dtype == torch.bfloat16 else local.numpy()


def to_tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A tensor of safetensors type `dtype` with the array's bits."""
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        array = array.copy()
    tensor = torch.from_numpy(array.view(np.int16) if dtype == "BF16" else array)
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor
