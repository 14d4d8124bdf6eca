"""What Python pickles, the interpreter reads as the same data; what could run something, it refuses by name."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import io
import os
import pathlib
import pickle
import pickletools
import random
import runpy
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.untrusted.pickle import read_one, read_pickle
from converters.untrusted.plain import NUMPY, PYTHON, Allowed, PlainArray, PlainBuffer, PlainObject, inert
from workbench.errors import CheckpointError

ALLOWED = Allowed({**PYTHON, **NUMPY}, inert=("tests.",))
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
KEYS = st.one_of(st.text(max_size=5), st.integers(-(2**63), 2**63 - 1), st.booleans(), st.none(), st.binary(max_size=5))
SCALARS = st.one_of(KEYS, st.integers(-(2**200), 2**200), st.floats(allow_nan=False))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.sets(KEYS, max_size=3),
    ),
    max_leaves=20,
)


class Colour(enum.Enum):
    RED = "r"


class Slotted:
    __slots__ = ("a",)


def read(data: bytes) -> Any:
    return read_pickle(data, ALLOWED, "x.pkl")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@given(value=VALUES)
def test_plain_data_of_every_protocol_reads_as_what_was_written(protocol, value):
    assert read(pickle.dumps(value, protocol)) == value
    assert read(pickletools.optimize(pickle.dumps(value, protocol))) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_become_plain_objects_of_their_kind(protocol):
    slotted = Slotted()
    slotted.a = 3
    namespace = argparse.Namespace(lr=1e-3, path=pathlib.PosixPath("/a/b"), layers=[1, 2])
    value = [namespace, Colour.RED, collections.OrderedDict([("b", 1), ("a", 2)]), bytearray(b"xy"), 2j, range(3)]
    if protocol >= 2:
        value.append(slotted)
    arguments, colour, ordered, data, number, span, *rest = read(pickle.dumps(value, protocol))
    assert arguments.kind == "argparse.Namespace"
    assert arguments.attributes == {"lr": 1e-3, "path": "/a/b", "layers": [1, 2]}
    assert colour.kind.endswith("test_pickle.Colour") and colour.arguments == ("r",)
    assert list(ordered.items()) == [("b", 1), ("a", 2)]
    assert (data, number, span.arguments) == (b"xy", 2j, (0, 3, 1))
    assert all(item.attributes == {"a": 3} for item in rest)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_states_of_random_generators_are_the_same_numbers(protocol):
    name, keys, *rest = read(pickle.dumps(np.random.RandomState(5).get_state(), protocol))
    expected = np.random.RandomState(5).get_state()
    assert name == expected[0] and np.array_equal(keys.array(), expected[1]) and tuple(rest) == expected[2:]
    assert read(pickle.dumps(random.Random(5).getstate(), protocol)) == random.Random(5).getstate()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_any_order_and_scalars_keep_their_values(protocol):
    arrays = [np.arange(6.0).reshape(2, 3).T, np.zeros((0, 3), np.int8), np.array(["a", "bc"]), np.array(7, ">u4")]
    for array in arrays[:3]:
        found = read(pickle.dumps(array, protocol))
        assert type(found) is PlainArray
        assert np.array_equal(found.array(), array) and found.array().dtype == array.dtype
    assert read(pickle.dumps([np.float64(2.5), np.int16(-3), np.bool_(True)], protocol)) == [2.5, -3, True]
    with pytest.raises(CheckpointError, match="byte order"):
        read(pickle.dumps(arrays[3], protocol))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_buffer_keeps_its_bytes(protocol):
    found = read(pickle.dumps(io.BytesIO(b"state"), protocol))
    assert type(found) is PlainBuffer and found.data == b"state"


class Runs:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


CALLS: dict[str, Any] = {
    "posix.system": (os.system, ("touch executed",)),
    "runpy.run_path": (runpy.run_path, ("executed",)),
    "builtins.eval": (eval, ("open('executed', 'w')",)),
    "builtins.exec": (exec, ("open('executed', 'w')",)),
    "builtins.__import__": (__import__, ("os",)),
    "numpy.load": (np.load, ("executed",)),
    "datetime.date": (datetime.date, (2020, 1, 1)),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", CALLS)
def test_a_global_outside_the_list_is_refused_by_its_name_and_not_run(protocol, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=rf"x.pkl: names '{name.replace('.', '[.]')}', which is not on the list"):
        read(pickle.dumps(Runs(*CALLS[name]), protocol))
    assert list(tmp_path.iterdir()) == []


HOSTILE: dict[str, tuple[bytes, str]] = {
    "an attribute of a module": (b"cbuiltins\ngetattr\n(cos\nVsystem\ntR.", "names 'os[.]"),
    "a name with dots": (b"\x80\x04\x8c\x08builtins\x8c\x0bgetattr.ref\x93.", "names 'builtins.getattr.ref'"),
    "an attribute of data": (b"cbuiltins\ngetattr\n(Vabc\nVupper\ntR.", "something that is no class"),
    "a call of an attribute": (
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x05tests\x8c\x01C\x93\x8c\x01f\x86R)R.",
        "calls a PlainObject, which is no class or function",
    ),
    "a call of a text": (b"\x80\x04\x8c\x02os)R.", "calls a str"),
    "state of a list": (b"]}b.", "sets the state of a list"),
    "state of a class": (b"ctests\nC\n}b.", "sets the state of a Builder"),
    "an extension code": (b"\x80\x02\x82\x01.", "uses the opcode EXT1"),
    "a persistent id": (b"V1\nQ.", "persistent id"),
    "a persistent id as text": (b"P1\n.", "uses the opcode PERSID"),
    "a buffer from outside": (b"\x80\x05\x97.", "uses the opcode NEXT_BUFFER"),
    "an unknown byte": (b"\xff.", "uses the opcode 0xff"),
    "a later protocol": (b"\x80\x06N.", "protocol 6"),
    "a text that claims gigabytes": (b"X\xff\xff\xff\xffab.", "truncated: 4294967295 bytes"),
    "a text that claims exabytes": (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fab.", "truncated"),
    "an array that claims gigabytes": (
        b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.",
        "has a int where a text belongs",
    ),
    "a number of a million digits": (b"I" + b"9" * 1_000_000 + b"\n.", "an integer of 1000000 digits"),
    "a wide number": (b"\x8b\x00\x00\x01\x00" + b"\xff" * 65536 + b".", "an integer of 65536 bytes"),
    "a list in itself": (b"]q\x00h\x00a.", "nested more than 200 deep, or holds itself"),
    "tuples a hundred thousand deep": (b")" + b"\x85" * 100_000 + b".", "nested more than 200 deep"),
    "tuples that double": (b")" + b"q\x00h\x00\x86" * 60 + b".", "unfolds to more than .* elements"),
    "a nested key": (b"})\x85\x85Ns.", "key of type tuple"),
    "a key of a wide number": (b"}\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x01Ns.", "key of type int"),
    "a list as a key": (b"}]Ns.", "key of type list"),
    "an uneven dictionary": (b"(Nd.", "a key that has no value"),
    "items for a tuple": (b")Na.", "puts items into a tuple"),
    "nothing on the stack": (b"a.", "damaged"),
    "an unknown memo": (b"h\x05.", "damaged near byte"),
    "two values at the end": (b"NN.", "damaged"),
    "no end": (b"N", "damaged"),
    "nothing": (b"", "damaged"),
    "a text that is no UTF-8": (b"X\x01\x00\x00\x00\xff.", "damaged"),
    "half a surrogate": (b"V\\ud800\n.", "damaged"),
    "a line without an end": (b"c" + b"a" * 2_000_000, "a line at 1 that does not end"),
    "an array of objects": (b"cnumpy\ndtype\n(VO\ntR.", "NumPy type 'O' that is not plain"),
    "a scalar too short": (b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(Vf8\ntRC\x01atR.", "scalar"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_refused_by_file_and_cause(kind):
    data, message = HOSTILE[kind]
    with pytest.raises(CheckpointError, match=rf"x.pkl: .*({message})"):
        read(data)


def test_sets_by_the_million_end_before_memory_does(monkeypatch):
    monkeypatch.setattr("converters.untrusted.machine._MAX_OBJECTS", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 containers"):
        read(b"(" + b"\x8f" * 2000 + b"t.")
    with pytest.raises(CheckpointError, match="remembers more than 1000 values"):
        read(b"\x80\x04N" + b"\x94" * 2000 + b".")


def test_pickles_that_follow_one_another_are_read_one_by_one():
    data = b"".join(pickle.dumps(value, 2) for value in ("a", [1]))
    first, position = read_one(data, 0, ALLOWED, "x.pkl")
    assert (first, read_one(data, position, ALLOWED, "x.pkl")) == ("a", ([1], len(data)))


def test_a_class_known_by_name_keeps_what_it_was_given():
    made = inert("a.B").build(1, x=2)
    assert type(made) is PlainObject
    assert (made.kind, made.arguments, made.attributes) == ("a.B", (1,), {"x": 2})
