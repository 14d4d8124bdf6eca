"""Every file in examples/ runs as it is written, for fewer steps and on less data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pretrain.data.helpers import small_tokenizer
from workbench.cli.main import main
from workbench.run_folder import RunFolder, Status

EXAMPLES = Path(__file__).parents[2] / "examples"
FEWER = ["run.steps=2", "batch.global_size=4", "batch.micro_size=2", "batch.seq_len=32", "optim.warmup=1"]
NAMES = ["pretrain", "pretrain-experts"]
NAMES += [f"finetune-{name}" for name in ("classification", "lora", "sft", "preference", "reward")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with small data in the places that the examples name, and a pretrained model to start from."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("data/pycola").mkdir(parents=True)
        small_tokenizer(Path("data"))
        Path("text.txt").write_text("<|endoftext|>\n".join(f"text number {n} says little\n" for n in range(200)))
        for name in ("train", "valid"):
            built = main(["data", "build", "text.txt", f"data/corpus-{name}", "--tokenizer", "data/tokenizer", "-q"])
            assert built == 0
        rows = [{"text": f"x = {n}" if n % 2 else f"x {n} =", "label": n % 2} for n in range(16)]
        for name in ("train", "test"):
            write_rows(Path(f"data/pycola/{name}.jsonl"), rows)
        write_rows(Path("data/answers.jsonl"), [{"prompt": f"say {n}", "completion": f" {n}"} for n in range(8)])
        pairs = [{"prompt": f"say {n}", "chosen": f" {n}", "rejected": " no"} for n in range(8)]
        write_rows(Path("data/preferences.jsonl"), pairs)
        assert run("pretrain") == 0
    return folder


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(name: str) -> int:
    return main([name.partition("-")[0], str(EXAMPLES / f"{name}.toml"), *FEWER, "-q"])


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.toml")} == set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains_and_leaves_a_finished_run(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    if name != "pretrain":
        assert run(name) == 0
    found = {path.name for path in Path("runs").iterdir() if RunFolder(path).status() is Status.DONE}
    folders = {"finetune-classification": "pycola", "finetune-lora": "pycola-lora", "finetune-sft": "answers"}
    folders |= {"finetune-preference": "preferences", "finetune-reward": "reward"}
    assert folders.get(name, name) in found
