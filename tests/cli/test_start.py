"""The commands that one starts with: init, schema, check, doctor, runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pretrain.data.helpers import small_tokenizer
from workbench.cli._tables import models, presets
from workbench.cli.main import main
from workbench.config import load_config
from workbench.log import JsonLines
from workbench.run_folder import RunFolder, Status

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def answer(capsys, *words: str) -> dict:
    """The object that a command prints with --json."""
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_the_file_that_init_writes_is_a_valid_configuration(capsys, kind):
    assert answer(capsys, "init", "mine.toml", "--for", kind) == {"path": "mine.toml", "for": kind}
    loaded = load_config("mine.toml", models()[kind], presets=presets())
    assert loaded.config.run.dir == "runs/mine"


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_the_defaults_that_init_shows_are_the_ones_in_force(kind):
    main(["init", "mine.toml", "--for", kind, "-q"])
    text = Path("mine.toml").read_text()
    as_written = load_config("mine.toml", models()[kind], presets=presets()).config
    lines, optional = [], False
    for line in text.splitlines():
        optional = line.startswith("# [") or (optional and line.startswith("# "))
        is_default = line.startswith("# ") and " = " in line.partition("  #")[0] and not optional
        lines.append(line.removeprefix("# ") if is_default and "(not set)" not in line else line)
    Path("all.toml").write_text("\n".join(lines[2:]))
    assert sum(line.startswith("# ") for line in lines) < sum(line.startswith("# ") for line in text.splitlines()) - 30
    assert load_config("all.toml", models()[kind], presets=presets()).config == as_written


def test_init_never_replaces_a_file(capsys):
    Path("mine.toml").write_text("precious")
    assert main(["init", "mine.toml"]) == 2
    assert "mine.toml exists and is left as it is" in capsys.readouterr().err
    assert Path("mine.toml").read_text() == "precious"


def test_the_schema_describes_every_table_and_key(capsys):
    schema = answer(capsys, "schema")
    for model in models().values():
        for name, field in model.model_fields.items():
            assert name in schema["properties"], name
            inner = getattr(field.annotation, "model_fields", {})
            if inner:
                definition = schema["$defs"][schema["properties"][name]["$ref"].rpartition("/")[2]]
                assert set(inner) <= set(definition["properties"])
                assert definition["additionalProperties"] is False
    assert "llama-tiny" in schema["$defs"]["ModelConfig"]["properties"]["preset"]["enum"]


def test_the_page_of_the_configuration_is_current(capsys):
    assert main(["schema", "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert shown == (ROOT / "docs" / "config.md").read_text(), "run: wb schema --markdown > docs/config.md"


@pytest.fixture
def configuration(tmp_path):
    """A configuration whose data is there."""
    small_tokenizer(tmp_path)
    Path("text.txt").write_text("<|endoftext|>\n".join(f"text number {n} says little\n" for n in range(200)))
    assert main(["data", "build", "text.txt", "corpus", "--tokenizer", "tokenizer", "-q"]) == 0
    Path("tiny.toml").write_text(
        '[model]\npreset = "llama-tiny"\n[data]\ntrain = "corpus"\ntokenizer = "tokenizer"\n'
        "[batch]\nglobal_size = 8\nmicro_size = 2\nseq_len = 64\n[run]\nsteps = 10\n"
    )
    return "tiny.toml"


def test_check_resolves_everything_and_trains_nothing(capsys, configuration):
    found = answer(capsys, "check", configuration, "parallel.tp=2", "parallel.pp=2")
    assert (found["ranks"], found["layout"]["tp"], found["layers_per_stage"]) == (4, 2, [2, 2])
    assert (found["steps"], found["step_tokens"], found["microbatches"]) == (10, 512, 4)
    assert found["data"]["epochs"] == pytest.approx(5120 / found["data"]["train_tokens"])
    assert found["memory"]["worst_rank"]["total"] > 4 * found["parameters"]
    assert not Path("runs").exists()


def test_check_speaks_to_people_too(capsys, configuration):
    assert main(["check", configuration]) == 0
    shown = capsys.readouterr().out
    assert "tp=1 cp=1 pp=1 dp=1 on 1 ranks" in shown and "10 steps" in shown and "MiB on the fullest rank" in shown


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["parallel.tp=3"], 3, "num_attention_heads=4 cannot be split over tp=3; use a tp that divides 4 (1, 2, 4)"),
        (["parallel.tp=2", "--nproc", "3"], 3, "3 ranks were given, but tp=2 x pp=1 needs a multiple of 2"),
        (["data.train=nowhere"], 5, "nowhere"),
        (["batch.sequence_len=8"], 2, "batch.sequence_len: unknown key; did you mean 'seq_len'?"),
        (["model.preset=lama-tiny"], 2, "model.preset = \"lama-tiny\": no such preset; did you mean 'llama-tiny'?\n"),
        (["model.hidden_size=4000000"], 6, "the ranks need about"),
    ],
)
def test_check_says_what_does_not_fit(capsys, configuration, words, code, said):
    assert main(["check", configuration, *words]) == code
    assert said in capsys.readouterr().err


def test_check_of_a_finetuning_run_names_a_base_that_is_not_there(capsys):
    main(["init", "sft.toml", "--for", "finetune", "-q"])
    assert main(["check", "sft.toml"]) == 5
    assert "CheckpointError: runs/pretrain" in capsys.readouterr().err


def test_doctor_names_versions_devices_and_backends(capsys):
    found = answer(capsys, "doctor")
    assert found["problems"] == []
    assert "gloo" in found["torch"]["backends"] and found["torch"]["devices"]
    assert {"workbench", "torch", "transformers"} <= set(found["versions"])


def test_doctor_names_a_package_that_is_missing(capsys, monkeypatch):
    from workbench.cli import doctor

    monkeypatch.setattr(doctor, "CORE", ("a-package-nobody-has",))
    assert main(["doctor"]) == 2
    assert "a-package-nobody-has is not installed; run `make install`" in capsys.readouterr().out


def test_runs_lists_each_run_with_where_it_stands(capsys):
    for name, status in (("one", Status.DONE), ("two", Status.FAILED)):
        run = RunFolder(Path("runs") / name)
        run.start(config_text="", resolved="{}", command=["wb"])
        JsonLines(run.metrics).write(20, {"loss": 2.5, "tokens_per_second": 12345.6})
        run.finish(status, "DataError: empty" if status is Status.FAILED else "")
    found = answer(capsys, "runs")
    assert [(run["name"], run["status"], run["step"]) for run in found["runs"]] == [
        ("one", "done", 20),
        ("two", "failed", 20),
    ]
    assert main(["runs"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["name", "status", "step", "loss", "tokens_per_second"]
    assert shown[1].split() == ["one", "done", "20", "2.5000", "12.3k"]
    assert shown[-1] == "two: DataError: empty"


def test_runs_of_a_folder_that_is_not_there_is_an_error_unless_it_is_the_usual_one(capsys):
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "no runs in runs\n"
    assert main(["runs", "elsewhere"]) == 2
    assert "elsewhere is not a folder" in capsys.readouterr().err
