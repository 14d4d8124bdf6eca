"""From a TOML file and overrides to one configuration, and what is said when that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from workbench.config import Config, load_config, resolved_json, table_by_kind
from workbench.errors import ConfigError


class Model(Config):
    preset: str = ""
    hidden_size: int = Field(default=64, gt=0)
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"


class Parallel(Config):
    tp: int = Field(default=1, gt=0)
    dp: int | Literal["auto"] = "auto"
    pp_layout: tuple[int, ...] | None = None


class Source(Config):
    path: Path
    weight: float = 1.0


class Data(Config):
    train: tuple[Source, ...] = ()


class Optim(Config):
    lr: float = 1e-3
    fused: bool = True


class Square(Config):
    kind: Literal["square"] = "square"
    side: int = 1


class Circle(Config):
    kind: Literal["circle"] = "circle"
    radius: int = 1


Shape = table_by_kind({"square": Square, "circle": Circle})


class Run(Config):
    shape: Shape = Square()
    model: Model = Model()
    parallel: Parallel = Parallel()
    data: Data = Data()
    optim: Optim = Optim()


TEXT = """\
# a run
[model]
preset = "tiny"

[parallel]
tp = 2
pp_layout = [1, 1]

[[data.train]]
path = "a.txt"

[[data.train]]
path = "b.txt"
weight = 2
"""
PRESETS = {"model": {"tiny": {"hidden_size": 32, "norm": "layernorm"}, "large": {"hidden_size": 4096}}}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def _write(text: str) -> Path:
        Path("tiny.toml").write_text(text)
        return Path("tiny.toml")

    return _write


def message(path, overrides=(), presets=None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, Run, overrides, presets)
    return str(caught.value)


def test_a_file_gives_typed_values_and_keeps_its_text(write):
    loaded = load_config(write(TEXT), Run, presets=PRESETS)
    assert loaded.config.parallel == Parallel(tp=2, pp_layout=(1, 1))
    assert loaded.config.data.train == (Source(path=Path("a.txt")), Source(path=Path("b.txt"), weight=2.0))
    assert loaded.text == TEXT


def test_precedence_is_defaults_then_preset_then_file_then_overrides(write):
    path = write(TEXT + "[optim]\nlr = 0.5\n")
    loaded = load_config(path, Run, ["optim.lr=0.25", "model.norm=rmsnorm"], PRESETS).config
    assert (loaded.model.hidden_size, loaded.model.norm) == (32, "rmsnorm")
    assert (loaded.optim.lr, loaded.optim.fused) == (0.25, True)


def test_an_override_may_choose_the_preset(write):
    assert load_config(write(TEXT), Run, ["model.preset=large"], PRESETS).config.model.hidden_size == 4096


def test_overrides_take_toml_values_bare_text_and_elements_of_lists(write):
    words = ["parallel.pp_layout=[2, 3]", "optim.fused=false", "data.train.1.path=c/d.txt", "parallel.dp=auto"]
    loaded = load_config(write(TEXT), Run, words, PRESETS).config
    assert loaded.parallel.pp_layout == (2, 3)
    assert loaded.optim.fused is False
    assert loaded.data.train[1].path == Path("c/d.txt")
    assert loaded.parallel.dp == "auto"


def test_overrides_alone_are_a_configuration():
    assert load_config(None, Run, ["parallel.tp=4"]).config.parallel.tp == 4


def test_an_unknown_key_is_named_with_its_line_and_its_nearest_neighbour(write):
    assert message(write("[parallel]\n\ntpp = 2\n")) == "tiny.toml:3: parallel.tpp: unknown key; did you mean 'tp'?"


def test_an_unknown_key_of_another_table_is_sent_there(write):
    assert message(write("[model]\nlr = 2\n")) == "tiny.toml:2: model.lr: unknown key; did you mean 'optim.lr'?"


def test_an_unknown_table_is_named_at_its_header(write):
    assert message(write("\n[paralel]\ntp = 1\n")) == "tiny.toml:2: paralel: unknown key; did you mean 'parallel'?"


@pytest.mark.parametrize(
    "text, line",
    [
        ("parallel = { tp = 1, tpp = 2 }\n", 1),
        ("parallel.tp = 1\nparallel.tpp = 2\n", 2),
        ('[parallel]\npp_layout = [ # comment = "]"\n 1,\n 2]\n"tpp" = 2\n', 5),
        ("[model]\npreset = '''\n[parallel]\ntpp = 3\n'''\n[parallel] # x\n'tpp' = 2\n", 7),
        ('[data]\ntrain = [{path = "a"},\n{path = "b", weigth = 1}]\n', 3),
        ('[[data.train]]\npath = "a"\n[[data.train]]\npath = "b"\n\nweigth = 1\n', 6),
    ],
)
def test_the_line_of_a_key_is_found_in_every_way_of_writing_it(write, text, line):
    assert f"tiny.toml:{line}: " in message(write(text), presets={"model": {}} if "'''" not in text else None)
    assert "unknown key; did you mean" in message(write(text))


@pytest.mark.parametrize(
    "line, said",
    [
        ('tp = "two"', 'parallel.tp = "two": must be a whole number'),
        ('tp = "2"', 'parallel.tp = "2": must be a number'),
        ("tp = true", "parallel.tp = true: must be a number"),
        ("tp = 0", "parallel.tp = 0: must be greater than 0"),
        ("tp = 1.5", "parallel.tp = 1.5: must be a whole number"),
        ('dp = "all"', "parallel.dp = \"all\": must be a whole number or 'auto'"),
        ("pp_layout = 3", "parallel.pp_layout = 3: must be a list, like [1, 2]"),
    ],
)
def test_a_wrong_value_is_shown_with_what_is_allowed(write, line, said):
    assert message(write(f"[parallel]\n{line}\n")) == f"tiny.toml:2: {said}"


def test_a_choice_lists_what_is_allowed(write):
    said = message(write('[model]\nnorm = "batchnorm"\n'))
    assert said == "tiny.toml:2: model.norm = \"batchnorm\": must be 'rmsnorm' or 'layernorm'"


def test_text_is_no_truth_value(write):
    assert message(write('[optim]\nfused = "yes"\n')) == 'tiny.toml:2: optim.fused = "yes": must be true or false'


def test_a_missing_key_is_named_at_its_table(write):
    said = message(write("[[data.train]]\nweight = 1\n"))
    assert said == "tiny.toml:1: data.train.0.path: is missing, and has no default"


@pytest.mark.parametrize(
    "text, said",
    [
        ('kind = "sqare"', "tiny.toml:2: shape.kind = \"sqare\": must be 'square' or 'circle'"),
        ("side = 1", "tiny.toml:1: shape.kind: is missing, and has no default"),
        ('kind = "square"\nradius = 1', "tiny.toml:3: shape.radius: unknown key; there are: kind, side"),
        ('kind = "circle"\nradius = "x"', 'tiny.toml:3: shape.radius = "x": must be a whole number'),
    ],
)
def test_a_table_of_several_kinds_is_judged_by_the_kind_it_names(write, text, said):
    assert message(write(f"[shape]\n{text}\n")) == said


def test_all_faults_are_listed_at_once(write):
    said = message(write("[parallel]\ntpp = 2\n[optim]\nlr = 'x'\n[extra]\n"), ["model.hidden_size=-1", "nonsense"])
    assert len(said.splitlines()) == 5
    assert "model.hidden_size=-1: model.hidden_size = -1: must be greater than 0" in said
    assert "nonsense: not an override; write table.key=value" in said


def test_a_fault_of_an_override_names_the_word_and_not_the_line(write):
    assert message(write("[parallel]\ntp = 2\n"), ["parallel.tp=x"]).startswith('parallel.tp=x: parallel.tp = "x"')


@pytest.mark.parametrize(
    "word, said",
    [
        ("parallel.tp.x=1", "parallel.tp is 2, not a table"),
        ("data.train.7.path=x", "data.train has no element 7; it has 2, from 0"),
        ("parallel.pp_layout=[1, 2", "is not a TOML value"),
        ("=3", "not an override"),
    ],
)
def test_an_override_that_cannot_be_set_says_why(write, word, said):
    assert said in message(write(TEXT), [word], PRESETS)


def test_an_unknown_preset_is_named_with_its_nearest(write):
    said = message(write('[model]\npreset = "tinny"\n'), presets=PRESETS)
    assert said == "tiny.toml:2: model.preset = \"tinny\": no such preset; did you mean 'tiny'?"


def test_broken_toml_is_named_with_its_line(write):
    assert message(write("[parallel]\ntp = two\n")) == "tiny.toml:2: not valid TOML: Invalid value; text needs quotes"


def test_a_missing_file_says_how_to_get_one(tmp_path):
    assert f"{tmp_path / 'no.toml'}: no such file; `wb init" in message(tmp_path / "no.toml")


def test_resolved_json_reads_back_as_the_same_configuration(write):
    config = load_config(write(TEXT), Run, presets=PRESETS).config
    text = resolved_json(config)
    assert json.loads(text)["model"]["hidden_size"] == 32
    assert Run.model_validate_json(text) == config


def test_values_never_change():
    with pytest.raises(ValueError, match="frozen"):
        Parallel().tp = 2  # type: ignore[misc]
