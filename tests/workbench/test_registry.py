"""Plug-ins by file."""

from __future__ import annotations

import sys

import pytest

from workbench.registry import discover, load, module_names


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "plugins_for_a_test"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)

    def add(module: str, text: str) -> str:
        (folder / f"{module}.py").write_text("from types import SimpleNamespace as N\n" + text)
        return "plugins_for_a_test"

    yield add
    for name in [name for name in sys.modules if name.startswith("plugins_for_a_test")]:
        del sys.modules[name]


def test_plugins_are_found_by_name_and_helpers_are_left_out(package):
    package("b", "THING = N(name='second')")
    package("a", "THING = N(name='third')")
    package("_helper", "x = 1")
    name = package("tools", "x = 1")
    assert list(discover(name, "THING", helpers=("tools",))) == ["second", "third"]
    assert module_names(name, ("tools",)) == ("a", "b")


def test_two_plugins_of_one_name_are_refused(package):
    package("a", "THING = N(name='same')")
    name = package("b", "THING = N(name='same')")
    with pytest.raises(LookupError, match=r"THING 'same' is defined twice: in plugins_for_a_test\.a and in .*\.b"):
        discover(name, "THING")


def test_a_module_without_the_constant_is_refused(package):
    name = package("a", "THNG = 1")
    with pytest.raises(LookupError, match="plugins_for_a_test.a defines no THING"):
        load(name, "a", "THING")
