"""`wb doctor`."""

from workbench.cli.common import Command, Output


def doctor(out: Output) -> None:
    """Show what this machine and its Python can do."""
    out.result({"a": 1, "b": {"c": 2}})


COMMAND = Command("doctor", doctor, panel="Start", example="wb doctor\nwb doctor --json")
