"""Fine-tuning on a CPU against transformers' Trainer (with peft) and TRL's SFTTrainer: speed, peak memory, outcome.

A Llama-like model of about 11 M parameters and byte tokens, one process, two threads, fp32. Every program trains from
the same weights on the same rows in each step, with the same optimizer and rates. The peers take the rows of a step in
the order of the seed, as their samplers do, and pad each microbatch to its longest row; "grouped" gives them our
microbatches instead, in which rows of like length are together: what then remains is the engine alone. Each run is a
process of its own, so that its peak of memory is its own, libraries included; they run in turn, A B C A B C, and speed
is compared by the medians of the ratios within a round. The first two steps do not count. Held-out rows are judged
alike; the outcome may differ by two standard errors of the difference, since new heads and adapters begin from other
draws. TRL is compared where it is installed. Examples that share rows are compared with the same in rows of their own
by the supervised tokens that a second takes in.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from _common import Claim, claim, main, median_ratio, say
from finetune.objective import TaskObjective
from finetune.run import prepare
from finetune.task import Example, Prepared
from pretrain.engine import Share
from tests.finetune.adapters import write_base
from tests.finetune.data import byte_tokenizer, config_of, write_rows
from workbench.cli.main import main as wb
from workbench.spec.model import ModelConfig
from workbench.tokenizer import Tokenizer

CASES = {"LoRA sft": ("sft", True), "full sft": ("sft", False), "LoRA classification": ("classification", True)}
BAR = 1.2
SIDE = Path(__file__).parent / "_finetune_side.py"


def run(quick: bool, names: tuple[str, ...] = tuple(CASES)) -> list[Claim]:
    claims = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            claims += compare(name, Path(folder), quick=quick)
    return claims


def compare(name: str, folder: Path, *, quick: bool) -> list[Claim]:
    """The claims of one case."""
    task, lora = CASES[name]
    prepare_case(folder, task, lora, quick=quick)
    sides = ["workbench", "transformers", "transformers-grouped"]
    if task == "sft":
        sides.append("workbench-packed")
    if task == "sft" and find_spec("trl") is not None:
        sides.append("trl")
    elif task == "sft":
        say("trl is not installed: nothing is compared with SFTTrainer; pip install trl")
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(1 if quick else 2):
        for side in sides:
            words = [sys.executable, str(SIDE), side, str(folder)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            say(f"{name}: {side} {found[side][-1]}")
    ours = found.pop("workbench")
    packed = [of_packing(name, ours, found.pop("workbench-packed"))] if task == "sft" else []
    return packed + [one for side, theirs in found.items() for one in judge(f"{name} over {side}", task, ours, theirs)]


def of_packing(name: str, ours: list[dict[str, Any]], packed: list[dict[str, Any]]) -> Claim:
    """How many times as many supervised tokens a second packed rows take in."""
    rates = [[one["labels"] / one["seconds"] for one in side] for side in (packed, ours)]
    told = " and ".join(f"{statistics.median(side):.0f}" for side in rates)
    ratio = median_ratio(*rates)
    return claim(f"{name}, packed over unpacked: supervised tokens/s", ratio, unit="x", note=f"{told} a second")


def judge(name: str, task: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[Claim]:
    speed = median_ratio([one["seconds"] for one in theirs], [one["seconds"] for one in ours])
    memory = statistics.median(one["peak_bytes"] for one in ours) / statistics.median(t["peak_bytes"] for t in theirs)
    metric = "valid/token_accuracy" if task == "sft" else "valid/accuracy"
    here, there = ours[0]["metrics"][metric], theirs[0]["metrics"][metric]
    error = math.sqrt(sum(p * (1 - p) for p in (here, there)) / theirs[0]["metrics"]["counted"])
    return [
        claim(f"{name}: tokens/s", speed, unit="x", at_least=None if name.endswith("grouped") else BAR),
        claim(f"{name}: peak memory", memory, unit="x", at_most=1.0),
        claim(
            f"{name}: {metric} apart", abs(here - there), at_most=2 * error, note=f"{here:.4f} here, {there:.4f} there"
        ),
    ]


def prepare_case(folder: Path, task: str, lora: bool, *, quick: bool) -> None:
    """Writes the base in both formats, the rows as files, and case.json: the same rows as tokens, in training order."""
    model = ModelConfig(
        vocab_size=2048,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=2 if quick else 6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=256,
    )
    tokenizer = byte_tokenizer(folder / "tokenizer")
    write_base(folder / "base", model, tokenizer=tokenizer)
    assert wb(["export", str(folder / "base"), str(folder / "hf"), "--verify", "none", "-q"]) == 0
    assert wb(["data", "build", "pycola", str(folder / "pycola"), "-q"]) == 0
    files = {}
    for name, split, count in (("train", "train", 600), ("valid", "test", 200)):
        lines = (folder / "pycola" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        rows = [json.loads(line) for line in lines]
        if task == "sft":
            half = [len(row["text"]) // 2 for row in rows]
            rows = [{"prompt": r["text"][:n], "completion": r["text"][n:]} for r, n in zip(rows, half, strict=True)]
        files[name] = write_rows(folder / f"{name}.jsonl", rows)
    sizes = {"global_size": 16, "micro_size": 8, "seq_len": 224}
    config = config_of(folder, {"kind": task, **files}, {"kind": "full"}, batch=sizes)
    prepared = prepare(config, model, Tokenizer.load(tokenizer))
    objective, steps = TaskObjective(prepared, seed=config.task.seed), 4 if quick else 14
    ordered, numbers = [], []
    for step in range(steps):
        share = Share(sizes["micro_size"], 0, 1)
        for rows in objective.train_rows(
            share, step=step, first_sample=step * sizes["global_size"], global_size=sizes["global_size"]
        ):
            lengths = rows.lengths
            assert lengths is not None
            numbers += rows.sample_ids.tolist()
            ordered += [
                Example(ids[:n], labels[:n] if labels.ndim else labels)
                for ids, labels, n in zip(rows.input_ids, rows.labels, lengths, strict=True)
            ]
    case = {
        **sizes,
        "task": task,
        "lora": lora,
        "steps": steps,
        "pad": prepared.pad_id,
        "packed_rows": packed_rows(prepared, sizes),
        "train": [peer_row(example) for _, example in sorted(zip(numbers, ordered, strict=True), key=itemgetter(0))],
        "grouped": [peer_row(example) for example in ordered],
        "valid": [peer_row(example) for example in prepared.held_out["valid"]],
    }
    (folder / "case.json").write_text(json.dumps(case), encoding="utf-8")


def packed_rows(prepared: Prepared, sizes: dict[str, int]) -> int:
    """Full rows of about as many tokens as the examples of a step, an even number."""
    lengths = [len(example.input_ids) for example in prepared.train]
    tokens = statistics.mean(lengths) * sizes["global_size"]
    return max(2 * round(tokens / sizes["seq_len"] / 2), 2)


def peer_row(example: Example) -> dict[str, Any]:
    """As transformers takes it: labels under the tokens themselves, which it shifts."""
    ids, labels = example.input_ids.tolist(), example.labels.tolist()
    if isinstance(labels, list):
        ids, labels = [*ids, labels[-1]], [-100, *labels]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


if __name__ == "__main__":
    main(run, description=__doc__ or "")
