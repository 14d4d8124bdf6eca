"""The log that each rank of a run leaves in the run folder."""

from __future__ import annotations

import os

import pytest

from workbench.cli._training import logged
from workbench.errors import DataError


def test_a_rank_leaves_its_start_and_its_end_in_its_log(tmp_path, capsys):
    assert logged(lambda step: {"step": step}, tmp_path, 7) == {"step": 7}
    lines = (tmp_path / "rank-0000.log").read_text().splitlines()
    assert lines[0].endswith(f"rank 0 of 1 starts, process {os.getpid()}")
    assert lines[-1].endswith("done at step 7")
    assert capsys.readouterr().err == ""


def test_a_failure_leaves_its_traceback_in_the_log_and_nothing_on_the_console(tmp_path, capsys):
    def fail():
        raise DataError("the file is empty")

    with pytest.raises(DataError):
        logged(fail, tmp_path)
    text = (tmp_path / "rank-0000.log").read_text()
    assert "Traceback" in text and "DataError: the file is empty" in text
    assert capsys.readouterr().err == ""
