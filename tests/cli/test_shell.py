"""What every command has: its help, --json, -q, and exit codes with one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer

from workbench import errors
from workbench.cli import app, common
from workbench.cli.common import Command, Group, Output, count_text, size_text, time_text
from workbench.cli.main import main
from workbench.registry import load, module_names

COMMANDS = [load(app.PACKAGE, name, "COMMAND") for name in module_names(app.PACKAGE, app.HELPERS)]
WORDS = [
    [group.name, command.name] if isinstance(group, Group) else [group.name]
    for group in COMMANDS
    for command in (group.commands if isinstance(group, Group) else (group,))
]
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.WorkbenchError)]


@pytest.fixture
def command(monkeypatch):
    """Puts one more command in: `wb probe`, which does what the test says."""

    def install(work) -> None:
        def run(out: Output, word: Annotated[str, typer.Argument(help="Any.")] = "x") -> int | None:
            """Do what a test says."""
            return work(out)

        probe = Command("probe", run, panel="Start", example="wb probe")
        monkeypatch.setattr(app.registry, "module_names", lambda *_: ("probe",))
        monkeypatch.setattr(app.registry, "load", lambda *_: probe)

    return install


def test_help_lists_every_command_in_its_panel(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for entry in COMMANDS:
        assert f" {entry.name} " in shown
    panels = [panel for panel in app.PANELS if any(entry.panel == panel for entry in COMMANDS)]
    assert [shown.index(f"─ {panel} ─") for panel in panels] == sorted(shown.index(f"─ {panel} ─") for panel in panels)


def test_no_words_is_a_call_for_help(capsys):
    assert main([]) == 0
    assert "Usage: wb" in capsys.readouterr().out


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_every_command_has_help_with_an_example_and_the_common_options(capsys, words):
    assert main([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Example" in shown and f"wb {' '.join(words)}" in shown
    for option in ("--json", "--quiet", "--verbose"):
        assert option in shown


def test_a_command_module_carries_the_name_of_its_command():
    for module in module_names(app.PACKAGE, app.HELPERS):
        assert load(app.PACKAGE, module, "COMMAND").name.replace("-", "_") == module.rstrip("_")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_users_fault_is_one_line_on_stderr_and_its_exit_code(capsys, command, kind):
    def work(out: Output) -> None:
        out.say("before")
        raise kind("tp=3 does not divide 4")

    command(work)
    assert main(["probe"]) == kind.exit_code
    out, err = capsys.readouterr()
    assert (out, err) == ("before\n", f"{kind.__name__}: tp=3 does not divide 4\n")
    assert main(["probe", "--json"]) == kind.exit_code
    out, err = capsys.readouterr()
    expected = {"kind": kind.__name__, "message": "tp=3 does not divide 4", "exit_code": kind.exit_code}
    assert json.loads(out) == {"error": expected} and err == ""


def test_json_prints_one_object_and_sends_everything_else_to_stderr(capsys, command):
    def work(out: Output) -> None:
        print("a library talks")
        out.say("narration")
        out.warn("careful")
        with out.progress("working", total=2) as bar:
            bar.advance()
        out.result({"value": 1.5})

    command(work)
    assert main(["probe", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"value": 1.5}
    assert err == "a library talks\nwarning: careful\n"


def test_json_stays_clean_of_child_processes_too():
    program = (
        "import subprocess, sys\n"
        "from workbench.cli.common import only_json_on_stdout\n"
        "with only_json_on_stdout() as real:\n"
        "    subprocess.run([sys.executable, '-c', \"print('child')\"])\n"
        "    print('parent')\n"
        "    print('{}', file=real)\n"
        "print('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "{}\nafter\n"
    assert done.stderr == "child\nparent\n"


def test_quiet_prints_the_result_alone(capsys, command):
    def work(out: Output) -> None:
        out.say("narration")
        out.result({"value": 1}, text="the result")

    command(work)
    assert main(["probe", "-q"]) == 0
    assert capsys.readouterr().out == "the result\n"


def test_verbose_says_more_and_where_an_error_happened(capsys, command):
    def work(out: Output) -> None:
        out.detail("a detail")
        raise errors.DataError("empty")

    command(work)
    assert main(["probe", "-v"]) == 5
    out, err = capsys.readouterr()
    assert out == "a detail\n"
    assert "Traceback" in err and err.endswith("DataError: empty\n")


def test_an_answer_of_no_is_an_exit_code_beside_the_result(capsys, command):
    def work(out: Output) -> int:
        out.result({"equal": False})
        return 4

    command(work)
    assert main(["probe", "--json"]) == 4
    assert json.loads(capsys.readouterr().out) == {"equal": False}


def test_an_interruption_says_how_to_go_on(capsys, command):
    def work(out: Output) -> None:
        out.interrupt_hint = "run the same command to go on from step 100"
        raise KeyboardInterrupt

    command(work)
    assert main(["probe"]) == 130
    assert capsys.readouterr().err == "Interrupted: run the same command to go on from step 100\n"


def test_a_bug_shows_where_it_is(capsys, command):
    def work(out: Output) -> None:
        raise ZeroDivisionError("division by zero")

    command(work)
    assert main(["probe"]) == 1
    err = capsys.readouterr().err
    assert "in work" in err and "InternalError: ZeroDivisionError: division by zero; this is a bug in wb" in err


@pytest.mark.parametrize(
    "words, said",
    [
        (["doctr"], "No such command 'doctr'. Did you mean 'doctor'?; see `wb --help`"),
        (["doctor", "--jsn"], "No such option: --jsn"),
        (["data", "buld"], "see `wb data --help`"),
        (["data"], "see `wb data --help`"),
        (["--nonsense"], "see `wb --help`"),
    ],
)
def test_a_wrong_word_is_a_usage_error(capsys, words, said):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("UsageError: ") and said in err and len(err.splitlines()) == 1


def test_a_reader_that_stops_reading_is_no_error(tmp_path):
    wb = Path(sys.executable).parent / "wb"
    done = subprocess.run(
        f"{wb} schema | head -n 1", shell=True, capture_output=True, text=True, timeout=60, env=os.environ
    )
    assert done.stdout == "{\n" and done.stderr == ""


def test_a_command_gives_one_result():
    out = Output(quiet=True, stdout=sys.stderr)
    out.result({})
    with pytest.raises(RuntimeError, match="one result"):
        out.result({})


def test_amounts_are_written_for_people():
    assert [size_text(n) for n in (0, 1023, 1536, 3 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]
    assert [time_text(n) for n in (4.26, 59, 200, 7500)] == ["4.3s", "59s", "3m 20s", "2h 05m"]
    assert [count_text(n) for n in (940, 12_345, 1_050_000, 7.24e9)] == ["940", "12.3k", "1.05M", "7.24B"]


def test_results_without_a_text_of_their_own_are_aligned_lines():
    assert common.as_lines({"a": 1, "long": {"b": 0.123456789}}) == "a     1\nlong\n  b  0.123457"
