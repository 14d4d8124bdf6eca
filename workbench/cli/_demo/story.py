"""The demo's story: one number, carried through every representation of one model."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.cli._demo.configs import TASK_TOKENS, Scale, finetune_toml, pretrain_toml
from workbench.cli.common import Output, time_text
from workbench.errors import VerificationError, WorkbenchError
from workbench.spec.layout import ParallelLayout

PROMPT = "def __init__(self"
NEW_TOKENS = 32
LAYOUTS = {"tp2": ParallelLayout(tp=2), "pp2": ParallelLayout(pp=2), "tp2 pp2": ParallelLayout(tp=2, pp=2)}


@dataclass
class Story:
    """Tells the story in `folder`; `found` gathers its numbers."""

    out: Output
    folder: Path
    scale: Scale
    found: dict[str, Any] = field(default_factory=dict)

    def tell(self) -> dict[str, Any]:
        """Runs every chapter and returns the numbers; VerificationError when a number changed on its way."""
        started = time.monotonic()
        chapters: dict[str, Callable[[], None]] = {
            "Corpus: the Python standard library on this machine": self.corpus,
            "Pretrain: 1 M parameters over two tensor-parallel ranks": self.pretrain,
            "Reshard: TP=2 to PP=2 to TP=2 x PP=2 and back": self.reshard,
            "Finetune: is this statement valid Python?": self.finetune,
            "Export: a fresh, offline process with plain transformers": self.export,
        }
        for number, (title, chapter) in enumerate(chapters.items(), start=1):
            self.out.say(f"\n{number}. {title}")
            chapter()
        self.found["seconds"] = time.monotonic() - started
        self.out.say(f"\nThat took {time_text(self.found['seconds'])}. Everything is in {self.folder}/.")
        return self.found

    def corpus(self) -> None:
        """Tokenizer, token files, minimal pairs and a classification task, each split by file."""
        folder, scale = self.folder, self.scale
        self.run("tokenizer", "train", "stdlib:train", f"{folder}/tokenizer", "--vocab-size", "2050")
        for split in ("train", "valid"):
            words = ("data", "build", f"stdlib:{split}", f"{folder}/data/{split}")
            self.run(*words, "--tokenizer", f"{folder}/tokenizer")
        self._statements(scale)

    def pretrain(self) -> None:
        """The model before and after training, by minimal pairs."""
        self._write("pretrain.toml", pretrain_toml(self.folder, self.scale))
        self.run("pretrain", f"{self.folder}/pretrain.toml", "run.steps=0", f"run.dir={self.folder}/untrained")
        before = self._pairs("untrained", ParallelLayout(tp=2))
        self.run("pretrain", f"{self.folder}/pretrain.toml")
        self.found["pairs"] = {"untrained": before, "tp2": self._pairs("pretrain", LAYOUTS["tp2"])}
        self.out.say(
            f"PyBLiMP, {self.scale.num_pairs} real statements against a broken copy of each: "
            f"{before:.3f} before training, {self.found['pairs']['tp2']:.3f} after"
        )

    def reshard(self) -> None:
        """Each layout from the one before; the last is back where the first was, bit for bit."""
        folder = self.folder
        self.run("reshard", f"{folder}/pretrain", f"{folder}/pp2", "--tp", "1", "--pp", "2")
        self.run("reshard", f"{folder}/pp2", f"{folder}/tp2pp2", "--tp", "2", "--pp", "2")
        self.run("reshard", f"{folder}/tp2pp2", f"{folder}/tp2", "--tp", "2", "--pp", "1")
        self.run("diff", f"{folder}/pretrain", f"{folder}/tp2")
        for name in ("pp2", "tp2 pp2"):
            self.found["pairs"][name] = self._pairs(name.replace(" ", ""), LAYOUTS[name])
            self.out.say(f"PyBLiMP at {name}: {self.found['pairs'][name]:.3f}")

    def finetune(self) -> None:
        """Full fine-tuning and LoRA, beside three controls."""
        folder, scale = self.folder, self.scale
        runs = {
            "full": ("pretrain", False),
            "lora": ("pretrain", True),
            "scratch": ("untrained", False),
        }
        accuracy: dict[str, dict[str, float]] = {}
        for name, (base, lora) in runs.items():
            text = finetune_toml(folder, scale, name=name, base=f"{folder}/{base}", lora=lora)
            self._write(f"{name}.toml", text)
            self.run("finetune", f"{folder}/{name}.toml")
            last = _last_evaluation(folder / name / "metrics.jsonl")
            accuracy[name] = {"accuracy": last["test/accuracy"], "error": last["test/accuracy_error"]}
            accuracy["majority"] = {"accuracy": last["test/majority"], "error": 0.0}
        accuracy["bag of tokens"] = self._bag_of_tokens()
        self.found["pycola"] = accuracy
        self.out.say(f"PyCoLA, {scale.num_test} statements of files that no training saw:")
        for name, value in accuracy.items():
            self.out.say(f"  {name:<14} {value['accuracy']:.3f} +- {value['error']:.3f}")
        self.out.say("A model of 1 M parameters shows that the plumbing holds, and no more than that.")

    def export(self) -> None:
        """The exported folders answer as the checkpoints did."""
        folder = self.folder
        self.run("export", f"{folder}/pretrain", f"{folder}/hf")
        self.run("export", f"{folder}/full", f"{folder}/hf-classifier")
        self.run("export", f"{folder}/lora", f"{folder}/peft", "--to", "peft")
        answer = _plain_transformers(
            language_model=f"{folder}/hf",
            pairs=f"{folder}/pyblimp/pairs.jsonl",
            prompt=PROMPT,
            new_tokens=NEW_TOKENS,
            classifiers={"full": [f"{folder}/hf-classifier", None], "lora": [f"{folder}/hf", f"{folder}/peft"]},
            rows=f"{folder}/pycola/test.jsonl",
            max_tokens=TASK_TOKENS,
        )
        self.found["pairs"]["transformers"] = answer["pairs"]
        self.found["transformers"] = answer
        self._require_equal(answer)
        self.out.say(f"transformers goes on from {PROMPT!r} with the same {NEW_TOKENS} tokens as wb generate")
        told = ", ".join(f"{name} {value:.3f}" for name, value in answer["accuracy"].items())
        self.out.say(f"PyCoLA in transformers and peft: {told}, as above")

    def _require_equal(self, answer: dict[str, Any]) -> None:
        trained = {name: value for name, value in self.found["pairs"].items() if name != "untrained"}
        here = self._continuation()
        faults = []
        if len(set(trained.values())) > 1:
            faults.append(f"minimal pairs differ: {trained}")
        if answer["text"] != here:
            faults.append(f"greedy text differs: {here!r} here, {answer['text']!r} in transformers")
        for name, there in answer["accuracy"].items():
            if abs(there - self.found["pycola"][name]["accuracy"]) > 1e-9:
                faults.append(f"{name}: accuracy {self.found['pycola'][name]['accuracy']} here, {there} there")
        if faults:
            raise VerificationError("; ".join(faults))

    def closing_line(self) -> str:
        """One number, however the model lies."""
        return " = ".join(f"{value:.3f} ({name})" for name, value in self.found["pairs"].items() if name != "untrained")

    def run(self, *words: str) -> None:
        """Runs a command of `wb` as a user would; a failure ends the story."""
        from workbench.cli.main import main

        shown = " ".join(f"'{word}'" if " " in word else word for word in words)
        self.out.say(f"$ wb {shown}")
        with contextlib.ExitStack() as stack:
            if self.out.json:  # its one object is the only thing that may stand there
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            code = main([*words, "-q"] if self.out.quiet or self.out.json else list(words))
        if code == 130:
            raise KeyboardInterrupt
        if code:
            raise WorkbenchError(f"`wb {shown}` ended with exit code {code}; the message above says why")

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def _statements(self, scale: Scale) -> None:
        from pretrain.data.jsonl import write_jsonl
        from pretrain.data.pyblimp import minimal_pairs
        from pretrain.data.pycola import pycola
        from pretrain.data.statements import statement_pool
        from pretrain.data.stdlib import stdlib_documents

        pool = statement_pool(stdlib_documents())
        pairs = minimal_pairs(pool, count=scale.num_pairs)
        task = pycola(pool, num_train=scale.num_train, num_test=scale.num_test)
        write_jsonl(self.folder / "pyblimp" / "pairs.jsonl", pairs)
        write_jsonl(self.folder / "pycola" / "train.jsonl", task.train)
        write_jsonl(self.folder / "pycola" / "test.jsonl", task.test)
        self.out.say(
            f"PyBLiMP: {len(pairs)} minimal pairs such as {pairs[0].good!r} against {pairs[0].bad!r}; "
            f"PyCoLA: {len(task.train)} statements to train on, {len(task.test)} to test on"
        )

    def _pairs(self, name: str, layout: ParallelLayout) -> float:
        from workbench.cli._demo.scoring import score_pairs

        return score_pairs(self.folder / name, self.folder / "pyblimp" / "pairs.jsonl", layout)

    def _continuation(self) -> str:
        from converters.open import open_checkpoint
        from workbench.models.generate import Sampling, generate, load_model
        from workbench.tokenizer import Tokenizer

        opened = open_checkpoint(self.folder / "pretrain")
        assert opened.tokenizer is not None
        words = Tokenizer.load(opened.tokenizer)
        stop = {token for token in (opened.model.eos_token_id, words.eos_id) if token is not None}
        stage = load_model(opened.model, opened.source)
        sampling = Sampling(0.0, 0, 1.0, 0)
        tokens = generate(stage, words.encode(PROMPT), max_new_tokens=NEW_TOKENS, sampling=sampling, stop=stop)
        return words.decode(list(tokens))

    def _bag_of_tokens(self) -> dict[str, float]:
        from pretrain.data.baseline import bag_of_tokens
        from workbench.tokenizer import Tokenizer

        words = Tokenizer.load(self.folder / "tokenizer")
        parts = {}
        for split in ("train", "test"):
            lines = (self.folder / "pycola" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            parts[split] = (words.encode_batch([row["text"] for row in rows]), [row["label"] for row in rows])
        found = bag_of_tokens(
            *parts["train"], test_ids=parts["test"][0], test_labels=parts["test"][1], vocab_size=words.vocab_size
        )
        return {"accuracy": found.accuracy, "error": found.standard_error}


def _last_evaluation(metrics: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found: dict[str, Any] = next(row for row in reversed(rows) if "test/accuracy" in row)
    return found


def _plain_transformers(**request: Any) -> dict[str, Any]:
    """What a fresh process with plain transformers answers."""
    script = Path(__file__).with_name("plain_transformers.py")
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "request.json"), Path(scratch, "answer.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-I", str(script), str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise VerificationError(f"transformers failed on {request}:\n{done.stderr.strip()[-2000:]}")
        found: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
        return found
