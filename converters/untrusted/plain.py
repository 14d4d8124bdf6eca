"""What an untrusted pickle may name, and the plain data that stands for it. NumPy, no torch.

A global that is not in the allow-list is refused by name. Those in it lead to builders of our own: the function or
class that the file names is never imported, let alone called.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np

_NUMPY_KINDS: Final = "biufcSU"  # without "O" (objects), "V" (records), "M" and "m" (times)
_KEY_TYPES: Final = frozenset({str, bytes, bool, float, type(None)})
_KEY_PARTS: Final = frozenset({str, bytes, bool, type(None)})
_MAX_KEY_PARTS: Final = 64


class Refused(Exception):
    """Why a pickle is not read; the interpreter adds which file it is."""


@dataclass(eq=False, slots=True)
class PlainObject:
    """An object of a class that is known by name only.

    kind: module and name of the class. arguments: what its constructor was given (an enum's value).
    attributes: its attributes by name; a state that is not a dictionary is kept under "__state__".
    """

    kind: str
    arguments: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)

    def set_state(self, state: Any) -> None:
        """What pickle's BUILD does, on plain data."""
        if type(state) is tuple and len(state) == 2 and all(type(s) in (dict, type(None)) for s in state):
            state = {**(state[0] or {}), **(state[1] or {})}
        self.attributes.update(state if type(state) is dict else {"__state__": state})


@dataclass(frozen=True, slots=True)
class Builder:
    """A global that may be called: `build` makes plain data out of its arguments."""

    name: str
    build: Callable[..., Any]


@dataclass(eq=False, slots=True)
class PlainArray:
    """A NumPy array as a pickle holds it; `array` makes the array."""

    dtype: str = "u1"
    shape: tuple[int, ...] = (0,)
    fortran: bool = False
    data: bytes = b""

    def set_state(self, state: Any) -> None:
        """From (version, shape, dtype, is_fortran, data), as NumPy writes it."""
        _, shape, dtype, fortran, data = state
        if type(dtype) is not NumpyType or type(data) is not bytes or type(fortran) not in (bool, int):
            raise Refused("holds a NumPy array that is not plain numbers or text")
        self.dtype, self.shape, self.fortran, self.data = dtype.name, sizes(shape), bool(fortran), data
        if math.prod(self.shape) * dtype.item_bytes != len(data):
            raise Refused(f"holds a NumPy array of {dtype.name} {list(self.shape)} in {len(data)} bytes")

    def array(self) -> np.ndarray:
        """A fresh array of these numbers."""
        import numpy as np

        flat = np.frombuffer(self.data, self.dtype)
        return flat.reshape(self.shape, order="F" if self.fortran else "C").copy()


@dataclass(eq=False, slots=True)
class PlainBuffer:
    """What an io.BytesIO held."""

    data: bytes = b""

    def set_state(self, state: Any) -> None:
        """From (data, position, attributes)."""
        self.data = _bytes(state[0])


@dataclass(eq=False, slots=True)
class NumpyType:
    """A NumPy element type in little-endian order."""

    name: str
    item_bytes: int

    def set_state(self, state: Any) -> None:
        """Checks the byte order; what else a state says concerns records."""
        if state[1] not in ("<", "|", "=") or state[2] is not None:
            raise Refused(f"holds a NumPy type {self.name!r} of byte order {state[1]!r} or with fields")


@dataclass(frozen=True)
class Allowed:
    """The globals that a pickle may name.

    known: module and name -> a Builder, or the value that stands for it. inert: prefixes of the names of classes whose
    objects become a PlainObject.
    """

    known: Mapping[str, Any]
    inert: tuple[str, ...] = ()

    def find(self, name: str) -> Any:
        """What stands for a global; Refused when it is not in the list."""
        if name in self.known:
            return self.known[name]
        if name.startswith(self.inert):
            return inert(name)
        raise Refused(f"names {name!r}, which is not on the list of what a checkpoint may hold; it was not run")


def inert(name: str) -> Builder:
    """The builder of a class that is known by name only."""

    def build(*arguments: Any, **attributes: Any) -> PlainObject:
        return PlainObject(name, arguments, attributes)

    return Builder(name, build)


def key(value: Any) -> Any:
    """`value` when it may be a key of a dictionary; Refused otherwise.

    Tuples hash what they hold, deep and again each time; integers beyond 64 bits, and tuples of numbers, can be made to
    collide: none of that can be left to the file.
    """
    kind = type(value)
    if kind is int and -(1 << 63) <= value < 1 << 63:
        return value
    if kind in _KEY_TYPES or kind is PlainObject:
        return value
    if kind is tuple and len(value) <= _MAX_KEY_PARTS and all(type(part) in _KEY_PARTS for part in value):
        return value
    raise Refused(f"has a key of type {kind.__name__} that no checkpoint needs")


def sizes(value: Any) -> tuple[int, ...]:
    """A shape, or strides: a short tuple of numbers of elements; Refused when it is anything else."""
    if type(value) not in (tuple, list) or len(value) > 64:
        raise Refused("has a shape that is not a tuple of sizes")
    if not all(type(size) is int and 0 <= size < 1 << 59 for size in value):
        raise Refused("has a shape or strides with an entry that is not a size")
    return tuple(value)


def text(value: Any) -> str:
    """A string; Refused when it is anything else."""
    if type(value) is not str:
        raise Refused(f"has a {type(value).__name__} where a text belongs")
    return value


def _dictionary(items: Any = (), *_: Any) -> dict[Any, Any]:
    return {key(name): value for name, value in items}


def _with_default(factory: Any = None, *_: Any) -> dict[Any, Any]:
    if factory is not None and type(factory) is not Builder:
        raise Refused("has a defaultdict whose default is no class")
    return {}


def _set(items: Any = ()) -> set[Any]:
    return {key(item) for item in items}


def _path(*parts: Any) -> str:
    return posixpath.join(*(text(part) for part in parts)) if parts else "."


def _encode(value: Any, encoding: Any = "latin1") -> bytes:
    if encoding not in ("latin1", "utf-8"):
        raise Refused(f"has bytes in the encoding {encoding!r}")
    return text(value).encode(encoding)


def _bytes(*arguments: Any) -> bytes:
    """bytes() and bytearray() without arguments, of bytes, or of a text and its encoding; never of a size."""
    if not arguments:
        return b""
    return arguments[0] if type(arguments[0]) is bytes else _encode(*arguments)


def _buffer(data: Any = b"") -> PlainBuffer:
    return PlainBuffer(_bytes(data))


def _member(owner: Any, name: Any) -> PlainObject:
    """An enum's member, which some versions of Python write as getattr(class, name)."""
    if type(owner) is not Builder:
        raise Refused(f"asks for the attribute {name!r} of something that is no class")
    return PlainObject(owner.name, (), {"name": text(name)})


def _reconstruct(owner: Any, base: Any, state: Any = None) -> Any:
    """Protocols 0 and 1: an object of a class, made by its base."""
    if type(owner) is not Builder:
        raise Refused("makes an object of something that is no class")
    return owner.build() if state is None else owner.build(state)


def _numpy_type(name: Any, *_: Any) -> NumpyType:
    import numpy as np

    made = np.dtype(text(name) if len(name) <= 16 else "O")
    if made.kind not in _NUMPY_KINDS:
        raise Refused(f"has a NumPy type {name!r} that is not plain numbers or text")
    return NumpyType(made.newbyteorder("<").str, made.itemsize)


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    import numpy as np

    if type(dtype) is not NumpyType or type(data) is not bytes or len(data) != dtype.item_bytes:
        raise Refused("has a NumPy scalar that is not a plain number")
    return np.frombuffer(data, dtype.name)[0].item()


def _numpy_array(*_: Any) -> PlainArray:
    return PlainArray()


def _numpy_from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> PlainArray:
    made = PlainArray()
    made.set_state((1, shape, dtype, order == "F", data))
    return made


def _complex(real: Any, imaginary: Any = 0.0) -> complex:
    return complex(float(real), float(imaginary))


def builders(functions: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """A builder of each function under its name."""
    return {name: Builder(name, build) for name, build in functions.items()}


_MULTIARRAY = {"_reconstruct": _numpy_array, "scalar": _numpy_scalar}
PYTHON: Final[Mapping[str, Any]] = {
    **builders(
        {
            "builtins.set": _set,
            "builtins.frozenset": _set,
            "builtins.list": lambda items=(): list(items),
            "builtins.dict": _dictionary,
            "builtins.bytes": _bytes,
            "builtins.bytearray": _bytes,
            "builtins.complex": _complex,
            "builtins.getattr": _member,
            "_codecs.encode": _encode,
            "_io.BytesIO": _buffer,
            "collections.OrderedDict": _dictionary,
            "collections.defaultdict": _with_default,
            "copyreg._reconstructor": _reconstruct,
            "copyreg.__newobj__": _reconstruct,
        }
    ),
    **builders(
        {
            f"{module}.{system}Path": _path
            for module in ("pathlib", "pathlib._local")
            for system in ("Posix", "PurePosix", "Windows", "PureWindows")
        }
    ),
    **{
        name: inert(name)
        for name in ("argparse.Namespace", "types.SimpleNamespace", "signal.Signals", "builtins.object")
    },
    **{name: inert(name) for name in ("builtins.range", "builtins.slice", "builtins.int", "builtins.float")},
}
NUMPY: Final[Mapping[str, Any]] = {
    **builders({f"numpy.{core}.multiarray.{name}": f for core in ("core", "_core") for name, f in _MULTIARRAY.items()}),
    **builders({f"numpy.{core}.numeric._frombuffer": _numpy_from_buffer for core in ("core", "_core")}),
    **builders({"numpy.dtype": _numpy_type, "numpy.ndarray": _numpy_array}),
}
