"""Pickles that others load, written without importing what they name. Protocol 2, as torch.save writes it.

Plain data (None, bool, int, float, str, bytes, list, tuple, dict, OrderedDict, Namespace) is written as itself; all
else is said with `Global`, `Call`, `Instance`, `Items` and `Persistent`.
"""

from __future__ import annotations

import struct
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Global:
    """A class, a function or a constant of a module, by name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """What a function or class makes of its arguments."""

    function: Global
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Instance:
    """An object of a class, made without its constructor and given its state."""

    kind: Global
    state: Any


@dataclass(frozen=True, slots=True)
class Persistent:
    """What the loader looks up under an identity of its own."""

    identity: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Items:
    """A dict, given as pairs: its keys may be what only the loader can hash."""

    pairs: tuple[tuple[Any, Any], ...]


def dump(value: Any, said: Mapping[type, Callable[[Any], Any]] = MappingProxyType({})) -> bytes:
    """The pickle of `value`; equal texts and globals in it are written once.

    said: for further types, what is written in the place of such a value.
    """
    writer = _Writer(said)
    writer.put(value)
    return b"\x80\x02" + b"".join(writer.parts) + b"."


class _Writer:
    def __init__(self, said: Mapping[type, Callable[[Any], Any]]) -> None:
        self._said = said
        self.parts: list[bytes] = []
        self._memo: dict[Any, int] = {}

    def put(self, value: Any) -> None:
        """Appends the code that leaves `value` on the stack."""
        if (say := self._said.get(type(value))) is not None:
            value = say(value)
        _WRITERS[type(value)](self, value)

    def once(self, value: str | Global, code: bytes) -> None:
        """Appends `code` for a value, or a reference to where it was written before."""
        place = self._memo.get(value)
        if place is None:
            place = self._memo[value] = len(self._memo)
            self.parts += [code, _numbered(b"q", b"r", place)]
        else:
            self.parts.append(_numbered(b"h", b"j", place))

    def integer(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.parts.append(b"K" + bytes([value]))
        elif -(1 << 31) <= value < 1 << 31:
            self.parts.append(b"J" + struct.pack("<i", value))
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.parts.append(b"\x8a" + bytes([len(data)]) + data)

    def text(self, value: str) -> None:
        data = value.encode("utf-8", "surrogatepass")
        self.once(value, b"X" + struct.pack("<I", len(data)) + data)

    def found(self, value: Global) -> None:
        self.once(value, f"c{value.module}\n{value.name}\n".encode())

    def sequence(self, start: bytes, items: Iterable[Any], end: bytes) -> None:
        self.parts.append(start + b"(")
        for item in items:
            self.put(item)
        self.parts.append(end)

    def row(self, value: tuple[Any, ...]) -> None:
        if len(value) > len(_SHORT_TUPLES) - 1:
            self.sequence(b"", value, b"t")
            return
        for item in value:
            self.put(item)
        self.parts.append(_SHORT_TUPLES[len(value)])

    def items(self, start: bytes, pairs: Iterable[tuple[Any, Any]]) -> None:
        self.sequence(start, (part for pair in pairs for part in pair), b"u")

    def ordered(self, value: OrderedDict[Any, Any]) -> None:
        self.put(Call(Global("collections", "OrderedDict"), ()))
        self.items(b"", value.items())

    def call(self, value: Call) -> None:
        self.put(value.function)
        self.put(value.arguments)
        self.parts.append(b"R")

    def instance(self, value: Instance) -> None:
        self.put(value.kind)
        self.parts.append(b")\x81")
        self.put(value.state)
        self.parts.append(b"b")

    def persistent(self, value: Persistent) -> None:
        self.put(value.identity)
        self.parts.append(b"Q")


def _numbered(short: bytes, long: bytes, place: int) -> bytes:
    return short + bytes([place]) if place < 1 << 8 else long + struct.pack("<I", place)


_SHORT_TUPLES: Final = (b")", b"\x85", b"\x86", b"\x87")
_ENCODE: Final = Global("_codecs", "encode")
_WRITERS: Final[Mapping[type, Callable[[_Writer, Any], None]]] = {
    type(None): lambda w, _: w.parts.append(b"N"),
    bool: lambda w, v: w.parts.append(b"\x88" if v else b"\x89"),
    int: _Writer.integer,
    float: lambda w, v: w.parts.append(b"G" + struct.pack(">d", v)),
    str: _Writer.text,
    bytes: lambda w, v: w.call(Call(_ENCODE, (v.decode("latin1"), "latin1"))),
    list: lambda w, v: w.sequence(b"]", v, b"e"),
    tuple: _Writer.row,
    dict: lambda w, v: w.items(b"}", v.items()),
    Items: lambda w, v: w.items(b"}", v.pairs),
    OrderedDict: _Writer.ordered,
    Namespace: lambda w, v: w.instance(Instance(Global("argparse", "Namespace"), vars(v))),
    Global: _Writer.found,
    Call: _Writer.call,
    Instance: _Writer.instance,
    Persistent: _Writer.persistent,
}
