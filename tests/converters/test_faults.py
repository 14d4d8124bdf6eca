"""What goes wrong under a conversion: each fault has its message and exit code, and nothing half appears.

What is copied stays for --resume where the machine has failed, and goes where the data has.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.checkpoints import random_native, tiny_model
from tests.helpers.killed import copied_names, same_folders
from workbench.checkpoint.descriptors import Descriptors
from workbench.checkpoint.writer import JOURNAL
from workbench.cli.main import main
from workbench.spec.layout import ParallelLayout

COMMANDS = {"native": ["reshard", "--tp", "4", "--pp", "1"], "huggingface": ["export", "--verify", "crc"]}


@pytest.fixture
def source(tmp_path) -> Path:
    random_native(tmp_path / "source", layout=ParallelLayout(tp=2, pp=2))
    return tmp_path / "source"


@pytest.fixture(scope="module")
def small_disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
        if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("may not mount a small file system")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def words_for(kind: str, source: Path, target: Path) -> list[str]:
    command, *options = COMMANDS[kind]
    return [command, str(source), str(target), *options, "-q"]


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_disk_that_fills_up_ends_in_6_and_once_there_is_room_resume_goes_on(
    tmp_path, small_disk, capsys, monkeypatch, kind
):
    random_native(tmp_path / "big", tiny_model(hidden_size=64, intermediate_size=96), optimizer=False)
    monkeypatch.setattr("converters.copy.require_space", lambda path, num_bytes: None)  # something else fills the disk
    monkeypatch.setattr("converters.job.require_space", lambda path, num_bytes: None)
    words = [*words_for(kind, tmp_path / "big", small_disk / "x"), "--workers", "1"]
    other = small_disk / "other"
    other.write_bytes(bytes((1 << 20) - (160 << 10)))
    assert main(words) == 6
    said = capsys.readouterr().err
    assert "no space left on the device; free some and try again" in said
    assert f"what was copied is in {small_disk / 'x'}.partial: run the same with --resume to go on" in said
    assert sorted(small_disk.iterdir()) == [other, small_disk / "x.partial"]
    noted = len((small_disk / "x.partial" / JOURNAL).read_bytes().splitlines()[1:])
    other.unlink()
    copied = copied_names(monkeypatch)
    assert main([*words, "--resume"]) == 0
    again = len(copied)
    (tmp_path / "whole").mkdir()
    assert main(words_for(kind, tmp_path / "big", tmp_path / "whole" / "x")) == 0
    assert noted > 2 and len(copied) - again == noted + again, "each tensor is copied once"
    assert same_folders(small_disk / "x", tmp_path / "whole" / "x")
    shutil.rmtree(small_disk / "x")


@pytest.mark.parametrize("kind", COMMANDS)
def test_short_reads_and_writes_are_gone_on_with(source, tmp_path, monkeypatch, kind):
    assert main(words_for(kind, source, tmp_path / "whole")) == 0
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: max(1, len(data) // 2)], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][: max(1, len(views[0]) // 3)]], at))
    assert main(words_for(kind, source, tmp_path / "pieces")) == 0
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "pieces" / file.name).read_bytes()


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_write_that_stops_halfway_is_an_error_and_not_a_short_file(source, tmp_path, capsys, monkeypatch, kind):
    pwrite, calls = os.pwrite, [0]

    def failing(descriptor: int, data: memoryview, start: int) -> int:
        calls[0] += 1
        if calls[0] > 12:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pwrite(descriptor, data[: max(1, len(data) // 2)], start)

    monkeypatch.setattr(os, "pwrite", failing)
    assert main(words_for(kind, source, tmp_path / "x")) == 6
    assert "cannot be written: Input/output error; what was copied is in" in capsys.readouterr().err
    assert list(tmp_path.glob("x*")) == [tmp_path / "x.partial"]
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert main([*words_for(kind, source, tmp_path / "x"), "--resume"]) == 0
    assert main(["verify", str(source), str(tmp_path / "x")]) == 0


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_source_that_cannot_be_read_for_a_while_is_gone_on_with_and_a_damaged_one_begun_anew(
    source, tmp_path, capsys, monkeypatch, kind
):
    preadv, calls = os.preadv, [0]

    def failing(descriptor: int, views: list[memoryview], start: int) -> int:
        from_source = str(source) in os.readlink(f"/proc/self/fd/{descriptor}")
        calls[0] += from_source
        if from_source and calls[0] > 40:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, views, start)

    words = words_for(kind, source, tmp_path / "x")
    monkeypatch.setattr(os, "preadv", failing)
    assert main(words) == 5
    assert "cannot be read: Input/output error; what was copied is in" in capsys.readouterr().err
    monkeypatch.setattr(os, "preadv", preadv)
    assert main([*words, "--resume"]) == 0
    file = source / "model-tp00-pp00.safetensors"
    with file.open("r+b") as opened:
        opened.seek(-3, os.SEEK_END)
        opened.write(b"???")
    assert main(words_for(kind, source, tmp_path / "y")) == 5
    said = capsys.readouterr().err
    assert str(file.name) in said and "checksum" in said and "--resume" not in said
    assert not list(tmp_path.glob("y*"))


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("change", ["touched", "removed", "added"])
def test_a_source_that_changes_meanwhile_is_named(source, tmp_path, capsys, monkeypatch, kind, change):
    from converters import copy

    file = source / ("late.txt" if change == "added" else "model-tp00-pp00.safetensors")
    run_plan = copy.run_plan

    def changed(*words, **more):
        found = run_plan(*words, **more)
        if change == "removed":
            file.unlink()
        else:
            file.touch()
        return found

    monkeypatch.setattr(copy, "run_plan", changed)
    words = [*words_for(kind, source, tmp_path / "x"), "--verify", "none"]
    assert main(words) == 5
    assert f"{file}: changed while it was being read (" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_destination_that_appears_meanwhile_stays_as_it_is(source, tmp_path, capsys, monkeypatch, kind):
    from converters import copy

    run_plan = copy.run_plan

    def rival(*words, **more):
        found = run_plan(*words, **more)
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "mine").write_text("mine")
        return found

    monkeypatch.setattr(copy, "run_plan", rival)
    assert main(words_for(kind, source, tmp_path / "x")) == 2
    assert f"{tmp_path / 'x'} appeared while it was being written" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "x").iterdir()] == ["mine"]
    assert not (tmp_path / "x.partial").exists()


def test_a_thousand_files_need_few_descriptors(tmp_path):
    paths = [tmp_path / str(index) for index in range(40)]
    for path in paths:
        path.write_text(path.name)
    descriptors = Descriptors(os.O_RDONLY, most=4)
    before = len(os.listdir("/proc/self/fd"))
    with descriptors.use(paths[0]) as first:
        for path in paths * 2:
            with descriptors.use(path) as descriptor:
                assert os.pread(descriptor, 9, 0).decode() == path.name
        assert len(os.listdir("/proc/self/fd")) - before <= 4
        assert os.pread(first, 9, 0) == b"0", "what is in use stays open"
    descriptors.close()
    assert len(os.listdir("/proc/self/fd")) == before
