"""Damage for files: what a bad disk, a bad copy or a bad person does to them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st

_NUMBERS = (
    b"0",
    b"-1",
    b"1e999",
    b"99999999999999999999",
    b"4611686018427387904",
    b"null",
    b'"x"',
    b"[]",
    b"{}",
    b"NaN",
)


@dataclass(frozen=True)
class Mutation:
    """One change: `kind` at the fraction `where` of a file; `how_far` and `salt` say what."""

    kind: str
    where: float
    how_far: float
    salt: bytes

    def __call__(self, data: bytes) -> bytes:
        return _KINDS[self.kind](data, self)


def _at(data: bytes, mutation: Mutation) -> int:
    return min(int(mutation.where * len(data)), max(0, len(data) - 1))


def _flip(data: bytes, m: Mutation) -> bytes:
    if not data:
        return data
    at = _at(data, m)
    return data[:at] + bytes([data[at] ^ (m.salt[0] or 1)]) + data[at + 1 :]


def _overwrite(data: bytes, m: Mutation) -> bytes:
    at = _at(data, m)
    return data[:at] + m.salt + data[at + len(m.salt) :]


def _truncate(data: bytes, m: Mutation) -> bytes:
    return data[: _at(data, m)]


def _insert(data: bytes, m: Mutation) -> bytes:
    at = _at(data, m)
    return data[:at] + m.salt * (1 + int(m.how_far * 20)) + data[at:]


def _remove(data: bytes, m: Mutation) -> bytes:
    at = _at(data, m)
    return data[:at] + data[at + 1 + int(m.how_far * 40) :]


def _splice(data: bytes, m: Mutation) -> bytes:
    """A piece of the file once more, elsewhere in it."""
    at, source = _at(data, m), int(m.how_far * len(data))
    return data[:at] + data[source : source + 1 + m.salt[0]] + data[at:]


def _number(data: bytes, m: Mutation) -> bytes:
    """Another value where text has a number."""
    found = list(re.finditer(rb"(?<=[ :,\[])-?\d+(\.\d+)?(?=[,}\] \n])", data))
    if not found:
        return _flip(data, m)
    match = found[int(m.where * (len(found) - 1))]
    return data[: match.start()] + _NUMBERS[m.salt[0] % len(_NUMBERS)] + data[match.end() :]


_KINDS: dict[str, Callable[[bytes, Mutation], bytes]] = {
    "flip": _flip,
    "overwrite": _overwrite,
    "truncate": _truncate,
    "insert": _insert,
    "remove": _remove,
    "splice": _splice,
    "number": _number,
}
# Headers lie at the beginning of some files and at the end of others.
_WHERE = st.one_of(st.floats(0, 1), st.floats(0, 0.05), st.floats(0.9, 1))
MUTATIONS = st.lists(
    st.builds(Mutation, st.sampled_from(sorted(_KINDS)), _WHERE, st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=3,
)


def mutate(data: bytes, mutations: list[Mutation]) -> bytes:
    """The data after one change upon the other."""
    for mutation in mutations:
        data = mutation(data)
    return data
