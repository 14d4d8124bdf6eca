"""`wb reshard --lazy`: a layout that cuts no tensor anew shares the files of the old one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from converters.open import open_checkpoint
from tests.helpers.checkpoints import random_native, read_all, tiny_model
from workbench.cli.main import main
from workbench.spec.layout import ParallelLayout


@pytest.fixture
def source(tmp_path) -> Path:
    random_native(tmp_path / "source", layout=ParallelLayout(tp=2, pp=2))
    return tmp_path / "source"


@pytest.mark.parametrize("words", [["--pp", "4"], ["--vpp", "2"], ["--pp-layout", "3,1"], ["--tp", "1"]])
def test_no_byte_is_copied_and_every_reader_sees_the_new_layout(source, tmp_path, capsys, words):
    assert main(["reshard", str(source), str(tmp_path / "copy"), *words, "-q"]) == 0
    capsys.readouterr()
    assert main(["reshard", str(source), str(tmp_path / "x"), *words, "--lazy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lazy"] is True
    for file in (tmp_path / "x").glob("*.safetensors"):
        assert file.stat().st_ino == (source / file.name).stat().st_ino
    copied, linked = open_checkpoint(tmp_path / "copy"), open_checkpoint(tmp_path / "x")
    assert linked.layout == copied.layout and linked.training == copied.training
    assert linked.fingerprints == copied.fingerprints
    assert main(["verify", str(tmp_path / "x"), "--full", "-q"]) == 0
    assert main(["verify", str(tmp_path / "x"), str(tmp_path / "copy"), "-q"]) == 0


def test_it_outlives_its_source_and_can_be_resharded_on(source, tmp_path):
    before = read_all(source)
    assert main(["reshard", str(source), str(tmp_path / "x"), "--pp", "1", "--lazy", "-q"]) == 0
    shutil.rmtree(source)
    assert main(["reshard", str(tmp_path / "x"), str(tmp_path / "y"), "--tp", "4", "-q"]) == 0
    after = read_all(tmp_path / "y")
    assert all((after[name] == array).all() for name, array in before.items())


def test_without_optimizer_state_its_files_are_not_shared(source, tmp_path):
    words = ["reshard", str(source), str(tmp_path / "x"), "--pp", "1", "--lazy", "--optimizer", "drop", "-q"]
    assert main(words) == 0
    assert not list((tmp_path / "x").glob("optim-*"))
    assert main(["verify", str(tmp_path / "x"), "-q"]) == 0


def test_damage_is_found_by_verify(source, tmp_path, capsys):
    assert main(["reshard", str(source), str(tmp_path / "x"), "--pp", "1", "--lazy", "-q"]) == 0
    file = source / "model-tp00-pp00.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with file.open("r+b") as opened:
        opened.write(content)
    assert main(["verify", str(tmp_path / "x")]) == 5
    assert f"{tmp_path / 'x' / file.name}: tensor " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--tp", "4"], 3, "4 tensors 'layers.*.mlp.down_proj.weight', "),
        (["--dtype", "F32"], 3, "would have to change; leave it out to copy"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(source, tmp_path, capsys, words, code, message):
    assert main(["reshard", str(source), str(tmp_path / "x"), *words, "--lazy"]) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def test_a_file_system_that_cannot_share_is_named(source, tmp_path, capsys, monkeypatch):
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(os, "link", refuse)
    assert main(["reshard", str(source), str(tmp_path / "x"), "--pp", "1", "--lazy"]) == 2
    assert "Invalid cross-device link; name a destination beside the source" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def test_it_takes_no_longer_for_more_bytes(tmp_path):
    random_native(tmp_path / "a", tiny_model(hidden_size=512, intermediate_size=1024, vocab_size=4001))
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        preadv = os.preadv
        patch.setattr(os, "preadv", lambda *words: read.append(preadv(*words)) or read[-1])
        assert main(["reshard", str(tmp_path / "a"), str(tmp_path / "x"), "--pp", "2", "--lazy", "-q"]) == 0
    assert sum(read) == 0
