"""The entry point of `wb`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from workbench.cli.app import build, is_command
from workbench.cli.common import EXIT_INTERRUPTED, EXIT_USAGE, Output, fail


def main(words: Sequence[str] | None = None) -> int:
    """Runs `wb` with `words` (the process's own by default) and returns the exit code; never exits by itself."""
    words = list(sys.argv[1:] if words is None else words) or ["--help"]
    # Torch's threads wait for each other by spinning: where another program wants the core, that is twenty times slower
    # than sleeping. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    out = Output(json="--json" in words)
    if words[0] in ("--version", "-V"):
        return _version(out)
    try:
        code = build(words)(words, prog_name="wb", standalone_mode=False)
    except typer.TyperException as error:
        message = error.format_message() or "a command is missing"
        told = f"wb {words[0]} --help" if is_command(words[0]) else "wb --help"
        return fail(out, "UsageError", f"{message.rstrip('.')}; see `{told}`", EXIT_USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return fail(out, "Interrupted", "before anything was started", EXIT_INTERRUPTED)
    return int(code or 0)


def _version(out: Output) -> int:
    from importlib.metadata import version

    out.result({"workbench": version("workbench")}, text=f"wb {version('workbench')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
