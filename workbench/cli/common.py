"""What every command shares: how it is declared, how it speaks, and how its faults become exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from workbench.cli.progress import Progress
from workbench.errors import WorkbenchError

EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """One command: `run(out, ...)` with Typer annotations; its docstring is the help text.

    `run` gets an Output first and returns None, or an exit code other than 0 when the answer is "no" without being
    an error. --json, -q and -v are added to every command and are not parameters of `run`.
    """

    name: str
    run: Callable[..., int | None]
    panel: str = "Core"
    example: str = ""
    order: int = 50


@dataclass(frozen=True)
class Group:
    """Commands under one word: `wb data build`, `wb data info`. Here `panel` and `order` of the parts say nothing."""

    name: str
    help: str
    commands: tuple[Command, ...]
    panel: str = "Core"
    order: int = 50


@dataclass
class Output:
    """How a command speaks: narration, one result, warnings and progress, as --json and -q ask for."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    interrupt_hint: str = ""
    """What to do after Ctrl-C; a command sets it as soon as there is something to go on from."""
    results: list[Mapping[str, Any]] = field(default_factory=list)

    def say(self, text: str = "") -> None:
        """Prints narration; nothing with -q or --json."""
        if not (self.json or self.quiet):
            print(text, file=self.stdout, flush=True)

    def detail(self, text: str) -> None:
        """Prints narration that only -v asks for."""
        if self.verbose:
            self.say(text)

    def warn(self, text: str) -> None:
        """Prints a warning on stderr, always."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def result(self, result: Mapping[str, Any], text: str | None = None) -> None:
        """Gives the command's one result: the object for --json, else `text` (or the object as aligned lines)."""
        if self.results:
            raise RuntimeError("a command gives one result; merge the two objects")
        self.results.append(result)
        if self.json:
            print(json.dumps(result, default=str, allow_nan=True), file=self.stdout, flush=True)
        else:
            print(as_lines(result) if text is None else text, file=self.stdout, flush=True)

    def progress(self, label: str, total: float | None = None, unit: str = "", *, begun: float = 0) -> Progress:
        """A progress bar to use with `with`; `bar.advance(n, note="loss 2.1")` moves it. Silent with -q and --json."""
        return Progress(label, total=total, unit=unit, silent=self.json or self.quiet, begun=begun)


def run_command(work: Callable[[], int | None], out: Output) -> int:
    """Runs `work` and returns the exit code; every fault becomes one message on stderr (or a JSON object)."""
    try:
        return work() or 0
    except WorkbenchError as error:
        return fail(out, type(error).__name__, str(error), error.exit_code, trace=out.verbose)
    except KeyboardInterrupt:
        hint = out.interrupt_hint or "nothing was left half-done; run the same command to start again"
        return fail(out, "Interrupted", hint, EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader (`| head`) has gone: point stdout away, or the interpreter complains while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = f"{type(error).__name__}: {error}; this is a bug in wb, please report it with the lines above"
        return fail(out, "InternalError", message, EXIT_BUG, trace=True)


def fail(out: Output, kind: str, message: str, exit_code: int, *, trace: bool = False) -> int:
    """Reports a fault and returns its exit code."""
    if trace:
        traceback.print_exc()
    if out.json and not out.results:
        fault = {"error": {"kind": kind, "message": message, "exit_code": exit_code}}
        print(json.dumps(fault), file=out.stdout, flush=True)
    else:
        print(f"{kind}: {message}", file=sys.stderr, flush=True)
    return exit_code


@contextlib.contextmanager
def only_json_on_stdout() -> Iterator[TextIO]:
    """Yields the real stdout; whatever else prints meanwhile, child processes and libraries too, goes to stderr."""
    original = sys.stdout
    try:
        is_real = original.fileno() == 1
    except (OSError, ValueError):
        is_real = False
    if not is_real:  # captured by a test, or embedded in another program: the descriptor is not ours to move
        with contextlib.redirect_stdout(sys.stderr):
            yield original
        return
    original.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w") as real:
            yield real
    finally:
        original.flush()
        os.dup2(kept, 1)
        os.close(kept)


def as_lines(result: Mapping[str, Any], indent: str = "") -> str:
    """A result object as aligned `name  value` lines, nested objects indented."""
    width = max((len(str(key)) for key in result), default=0)
    lines = []
    for key, value in result.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{key}")
            lines.append(as_lines(value, indent + "  "))
        else:
            shown = f"{value:.6g}" if isinstance(value, float) else str(value)
            lines.append(f"{indent}{key!s:<{width}}  {shown}")
    return "\n".join(lines)


def size_text(num_bytes: float) -> str:
    """A number of bytes for people: '1.5 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def time_text(seconds: float) -> str:
    """A duration for people: '45s', '3m 20s', '2h 05m'."""
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"


def count_text(number: float) -> str:
    """A count for people: '940', '12.3k', '1.05M', '7.2B'."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= limit:
            return f"{number / (1e3 if suffix == 'k' else limit):.3g}{suffix}"
    return f"{number:.0f}"
