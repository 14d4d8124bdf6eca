"""The lines of keys agree with what tomllib reads, for any TOML text."""

from __future__ import annotations

import tomllib

from hypothesis import given
from hypothesis import strategies as st

from workbench.toml_lines import key_lines

KEYS = st.sampled_from(["a", "b-c", "d_1", '"e.f"', "'g h'", '"i\\"j"'])
SCALARS = st.sampled_from(
    ["1", "-2.5e3", "true", "1979-05-27T07:32:00Z", '"x # [y] = {z}"', "'it = [1'", '"""a\n[b]\nc = 1"""', "'''\nd'''"]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: "[" + ", # c = ]\n".join(items) + "]")
        | st.dictionaries(KEYS, inner.filter(lambda text: "#" not in text), max_size=3).map(
            lambda table: "{" + ", ".join(f"{key} = {value}" for key, value in table.items()) + "}"
        )
    ),
    max_leaves=6,
)


def paths(value, prefix=()):
    if prefix:
        yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*prefix, key))


@given(st.dictionaries(KEYS, st.dictionaries(KEYS, VALUES, max_size=3), max_size=3))
def test_every_key_that_tomllib_reads_has_a_line(tables):
    text = "# start\n"
    for name, table in tables.items():
        text += f"\n[ {name} ] # header\n" + "".join(f"{key} = {value}\n" for key, value in table.items())
    lines = key_lines(text)
    assert set(lines) == set(paths(tomllib.loads(text)))
    assert all(1 <= line <= text.count("\n") + 1 for line in lines.values())


def test_each_line_is_the_one_the_key_stands_on():
    text = 'x.y = 1\n[[t]]\na = 1\n[[t]]\na = [\n  1,\n  {b = 2},\n]\n[t.sub]\nc = """\n\n"""\nd = 4\n'
    lines = key_lines(text)
    assert lines[("x",)] == lines[("x", "y")] == 1
    assert (lines[("t", 0)], lines[("t", 0, "a")]) == (2, 3)
    assert (lines[("t", 1)], lines[("t", 1, "a")], lines[("t", 1, "a", 0)], lines[("t", 1, "a", 1, "b")]) == (
        4,
        5,
        6,
        7,
    )
    assert (lines[("t", 1, "sub")], lines[("t", 1, "sub", "c")], lines[("t", 1, "sub", "d")]) == (9, 10, 13)
