"""Files that torch.save wrote, read as plain data with every tensor left where it lies. No torch.

A tensor becomes a `StridedTensor`: a strided place in the file. Nothing is unpickled and no tensor is loaded.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from converters.untrusted.archive import Archive
from converters.untrusted.pickle import MAX_BYTES, read_one, read_pickle
from converters.untrusted.plain import NUMPY, PYTHON, Allowed, Builder, PlainObject, Refused, builders, sizes, text
from workbench.errors import CheckpointError
from workbench.spec.dtypes import ITEM_BYTES, NUMPY_NAMES, TORCH_NAMES
from workbench.spec.geometry import Box

if TYPE_CHECKING:
    import numpy as np

_LEGACY_START: Final = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
DTYPES: Final[Mapping[str, str]] = {f"torch.{name}": dtype for dtype, name in TORCH_NAMES.items()}
"""What stands for a torch.dtype in the data ("torch.bfloat16") -> its name here ("BF16")."""
_FOREIGN_DTYPES: Final = {  # of which a tensor may be found, not read: their bytes
    "torch.complex64": 8,
    "torch.complex128": 16,
    "torch.float8_e4m3fn": 1,
    "torch.float8_e5m2": 1,
    "torch.uint16": 2,
    "torch.uint32": 4,
    "torch.uint64": 8,
}
_STORAGES: Final = {
    "Double": "F64",
    "Float": "F32",
    "Half": "F16",
    "BFloat16": "BF16",
    "Long": "I64",
    "Int": "I32",
    "Short": "I16",
    "Char": "I8",
    "Byte": "U8",
    "Bool": "BOOL",
    "ComplexFloat": "torch.complex64",
    "ComplexDouble": "torch.complex128",
    "Untyped": "U8",
}


@dataclass(frozen=True, slots=True)
class StridedTensor:
    """Where the elements of a tensor lie: (i, j) at byte `start + (i * strides[0] + j * strides[1]) * item bytes`.

    dtype: its name here ("BF16"), or torch's ("torch.complex64") where Workbench has none and cannot read it.
    strides: in elements, not negative.
    """

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, box: Box) -> np.ndarray:
        """A fresh array of a box; only its own pages are touched."""
        return self.mapped()[box.slices].copy()

    def mapped(self) -> np.ndarray:
        """The tensor as a view over a mapping of its part of the file, read-only."""
        import numpy as np

        if self.dtype not in NUMPY_NAMES:
            raise CheckpointError(f"{self.file}: holds a tensor of type {self.dtype}, which is not read")
        dtype = np.dtype(NUMPY_NAMES[self.dtype])
        if 0 in self.shape:
            return np.empty(self.shape, dtype)
        extent = last_element(self.shape, self.strides) + 1
        try:
            flat = np.memmap(self.file, np.uint8, "r", self.start, (extent * dtype.itemsize,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.file}: cannot be mapped: {error}; was it changed?") from error
        strides = tuple(stride * dtype.itemsize for stride in self.strides)
        return np.ndarray(self.shape, dtype, buffer=flat, strides=strides)


@dataclass(frozen=True, slots=True)
class _Storage:
    """A range of the file that tensors view."""

    file: Path
    start: int
    num_bytes: int
    dtype: str


def last_element(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Index of the last element of a tensor that is not empty, counted from its first."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def item_bytes(dtype: str) -> int:
    """Bytes of an element of a dtype, known here or only to torch."""
    return ITEM_BYTES[dtype] if dtype in ITEM_BYTES else _FOREIGN_DTYPES[dtype]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StridedTensor:
    """torch._utils._rebuild_tensor_v2, its arguments after the strides (gradient, hooks, metadata) left aside."""
    return _place(storage, storage.dtype if type(storage) is _Storage else "", offset, shape, strides)


def _typed_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> StridedTensor:
    """torch._utils._rebuild_tensor_v3: a storage of bytes, whose element type is said apart."""
    if text(dtype) not in DTYPES and dtype not in _FOREIGN_DTYPES:
        raise Refused(f"has a tensor of type {dtype!r}")
    return _place(storage, DTYPES.get(dtype, dtype), offset, shape, strides)


def _place(storage: Any, dtype: str, offset: Any, shape: Any, strides: Any) -> StridedTensor:
    if type(storage) is not _Storage:
        raise Refused("has a tensor without a storage")
    shape, strides, (offset,) = sizes(shape), sizes(strides), sizes((offset,))
    if len(shape) != len(strides):
        raise Refused(f"has a tensor of shape {list(shape)} with strides {list(strides)}")
    held = storage.num_bytes // item_bytes(dtype)
    count = 1
    for size in shape:
        count *= size
    if count and (count > held or offset + last_element(shape, strides) >= held):
        raise Refused(
            f"has a tensor of shape {list(shape)}, strides {list(strides)} at {offset} of a storage of {held} elements"
        )
    return StridedTensor(storage.file, storage.start + offset * item_bytes(dtype), dtype, shape, strides)


def _parameter(data: Any, *_: Any) -> Any:
    """A parameter is its tensor."""
    return data


def _subclass(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    """A tensor with attributes hung on it is its tensor."""
    if type(function) is not Builder or type(arguments) is not tuple:
        raise Refused("has a tensor of a class of its own")
    return function.build(*arguments)


def _layout(name: Any) -> str:
    return text(name)


def _device(kind: Any, index: Any = None) -> str:
    return text(kind) if index is None else f"{text(kind)}:{index}"


_TENSORS: Final[Mapping[str, Callable[..., Any]]] = {
    "_rebuild_tensor": _tensor,
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": _typed_tensor,
    "_rebuild_parameter": _parameter,
    "_rebuild_parameter_with_state": _parameter,
}
TORCH: Final[Mapping[str, Any]] = {
    **PYTHON,
    **NUMPY,
    **builders({f"torch._utils.{name}": build for name, build in _TENSORS.items()}),
    **builders(
        {
            "torch.Size": sizes,
            "torch.device": _device,
            "torch.serialization._get_layout": _layout,
            "torch._tensor._rebuild_from_type_v2": _subclass,
        }
    ),
    **{name: PlainObject(name) for name in ("torch.Tensor", "torch.nn.parameter.Parameter")},
    **{name: name for name in (*DTYPES, *_FOREIGN_DTYPES)},
    **{
        f"{module}.{kind}Storage": PlainObject("storage", (dtype,))
        for kind, dtype in _STORAGES.items()
        for module in ("torch", "torch.storage", "torch.cuda")
    },
}
"""The globals of a state dictionary and its tensors."""
MEGATRON: Final = Allowed(TORCH, inert=("megatron.", "transformer_engine."))
"""Those, and any class of Megatron-LM or Transformer Engine by name."""


def read_torch(path: Path, *, offset: int = 0, length: int | None = None, allowed: Allowed = MEGATRON) -> Any:
    """The object that torch.save stored at `path`, or in a range of it, with `StridedTensor` for each tensor.

    CheckpointError when it is damaged, or holds what is not in `allowed`.
    """
    if offset == 0 and length is None and _starts_legacy(path):
        return _read_legacy(path, allowed)
    with Archive(path, offset=offset, length=length) as archive:
        if "byteorder" in archive and archive.read("byteorder", 16) != b"little":
            raise CheckpointError(f"{path}: was written on a big-endian machine, which is not read")
        if "data.pkl" not in archive:
            raise CheckpointError(f"{path}: is a zip archive, not one of torch.save: it has no data.pkl")
        places: dict[tuple[str, str], _Storage] = {}

        def storage(pid: Any) -> _Storage:
            name, dtype, count = _persistent(pid)
            if (name, dtype) not in places:
                member = archive.member(f"data/{name}")
                places[name, dtype] = _Storage(path, member.start, member.num_bytes, dtype)
            found = places[name, dtype]
            if found.num_bytes < count * item_bytes(dtype):
                raise Refused(f"has a storage {name!r} of {count} elements of {dtype} in {found.num_bytes} bytes")
            return found

        return read_pickle(archive.read("data.pkl", MAX_BYTES), allowed, str(path), persistent=storage)


def _starts_legacy(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_LEGACY_START)) == _LEGACY_START
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _read_legacy(path: Path, allowed: Allowed) -> Any:
    """A file of torch before 1.6: pickles, the last of which lists storages, and then those one after another.

    Where they lie is known only after the object was read, so it is read twice.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        starts: dict[str, int] = {}
        found: dict[str, _Storage] = {}

        def storage(pid: Any) -> _Storage:
            name, dtype, count = _persistent(pid)
            if len(pid) > 5 and pid[5] is not None:
                raise Refused("has a view of a storage, as torch before 0.4 wrote it; save it again with a newer torch")
            found[name] = _Storage(path, starts.get(name, 0), count * item_bytes(dtype), dtype)
            return found[name]

        position = len(_LEGACY_START)
        for _ in range(2):  # protocol version; sizes of types
            _, position = read_one(data, position, allowed, str(path))
        _, end = read_one(data, position, allowed, str(path), persistent=storage)
        names, end = read_one(data, end, allowed, str(path))
        if type(names) is not list or len(names) != len(found) or not all(name in found for name in names):
            raise CheckpointError(f"{path}: its list of storages is not that of its tensors; it is damaged")
        for name in names:
            starts[name] = end + 8
            count = int.from_bytes(data[end : end + 8], "little")
            end += 8 + found[name].num_bytes
            if end > len(data) or count * item_bytes(found[name].dtype) != found[name].num_bytes:
                raise CheckpointError(f"{path}: storage {name!r} at byte {end} of {len(data)} is damaged or truncated")
        return read_one(data, position, allowed, str(path), persistent=storage)[0]


def _persistent(pid: Any) -> tuple[str, str, int]:
    """Name, dtype and number of elements in ("storage", class, name, device, number)."""
    if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage":
        raise Refused("has a persistent id that is no storage")
    kind, name, _, count = pid[1:5]
    if type(kind) is not PlainObject or kind.kind != "storage":
        raise Refused("has a storage of no known class")
    (dtype,) = kind.arguments
    return text(name), dtype, sizes((count,))[0]
