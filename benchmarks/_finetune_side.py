"""One fine-tuning run by one program in a process of its own: `python _finetune_side.py SIDE FOLDER`, JSON on stdout.

FOLDER holds case.json (method, rows in the order of training, held-out rows), the base in both formats, a tokenizer.
Sides: workbench, workbench-packed (as many tokens a step, in full rows), transformers (with peft where the method is
LoRA), transformers-grouped (on our microbatches), trl.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

IGNORE = -100
LR, BETAS, RANK, ALPHA = 1e-3, (0.9, 0.95), 8, 16.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WARM_STEPS = 2


def memory_bytes(key: str) -> int:
    """VmRSS, or VmHWM, the peak of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


class Clock:
    """When each step ended, and the peak of memory by then; a Watcher of our trainer."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.peak = 0
        self.labels = 0

    def started(self, facts: Any) -> None: ...
    def measured(self, row: Any) -> None: ...
    def saved(self, checkpoint: Path) -> None: ...

    def stepped(self, done: int, total: int | None) -> None:
        self.times.append(time.perf_counter())
        self.peak = memory_bytes("VmHWM")

    def seconds(self) -> float:
        return self.times[-1] - self.times[WARM_STEPS - 1]


def workbench(folder: Path, case: dict[str, Any], clock: Clock, *, packing: bool = False) -> dict[str, float]:
    """Metrics of our run."""
    from converters.open import open_checkpoint
    from finetune.run import Base, Finetuning
    from pretrain.engine import Share
    from tests.finetune.data import config_of
    from workbench.parallel.mesh import Mesh

    rows = {"train": str(folder / "train.jsonl"), "valid": str(folder / "valid.jsonl")}
    method = {"kind": "lora", "r": RANK, "alpha": ALPHA} if case["lora"] else {"kind": "full"}
    batch = {name: case[name] for name in ("global_size", "micro_size", "seq_len")}
    if packing:
        batch |= {"global_size": case["packed_rows"], "micro_size": case["packed_rows"] // 2, "packing": True}
    config = config_of(
        folder,
        {"kind": case["task"], **rows},
        method,
        batch=batch,
        optim={"lr": LR, "warmup": 0, "betas": BETAS},
        checkpoint={"optimizer": False},
        log={"every": 1000, "tensorboard": False},
        run={"dir": str(folder / f"run-{time.time_ns()}"), "steps": case["steps"]},
    )
    opened = open_checkpoint(folder / "base")
    base = Base(opened.model, opened.source, opened.tokenizer, str(folder / "base"), "")
    run = Finetuning(config, base, Mesh.single(), watcher=clock)
    metrics = dict(run.run().metrics)
    share, size = Share(config.batch.micro_size, 0, 1), config.batch.global_size
    for step in range(WARM_STEPS, case["steps"]):
        some = run.trainer.objective.train_rows(share, step=step, first_sample=step * size, global_size=size)
        clock.labels += sum(one.num_labels for one in some)
    return metrics


def peer(folder: Path, case: dict[str, Any], clock: Clock, side: str) -> dict[str, float]:
    """Metrics of the run of transformers' Trainer, or of TRL's, on the same rows in each step."""
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    loader = AutoModelForCausalLM if case["task"] == "sft" else AutoModelForSequenceClassification
    words = {} if case["task"] == "sft" else {"num_labels": 2, "pad_token_id": case["pad"]}
    model = loader.from_pretrained(folder / "hf", **words)
    if case["lora"]:
        from peft import LoraConfig, get_peft_model

        kind = "CAUSAL_LM" if case["task"] == "sft" else "SEQ_CLS"
        model = get_peft_model(
            model, LoraConfig(task_type=kind, r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS))
        )

    class Told(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            clock.stepped(state.global_step, None)

    common = {
        "output_dir": str(folder / "peer"),
        "per_device_train_batch_size": case["micro_size"],
        "gradient_accumulation_steps": case["global_size"] // case["micro_size"],
        "max_steps": case["steps"],
        "learning_rate": LR,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
    }
    given = {"model": model, "data_collator": lambda rows: collate(rows, case["pad"]), "callbacks": [Told()]}
    listed = case["grouped" if side.endswith("grouped") else "train"]
    if side == "trl":
        from datasets import Dataset
        from pyarrow import Table
        from trl import SFTConfig as Arguments
        from trl import SFTTrainer as Trainer

        common["dataset_kwargs"] = {"skip_prepare_dataset": True}
        # Named here: some versions of datasets and pyarrow cannot hash a table together.
        rows: Any = Dataset(Table.from_pylist(listed), fingerprint="rows")
        given["processing_class"] = AutoTokenizer.from_pretrained(folder / "hf")
    else:
        from transformers import Trainer
        from transformers import TrainingArguments as Arguments

        rows = listed

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(rows)

    InOrder(args=Arguments(**common), train_dataset=rows, **given).train()
    return judged(model.eval(), case)


def collate(rows: Sequence[dict[str, Any]], pad: int) -> dict[str, Any]:
    """Rows padded at their ends to the longest."""
    import torch

    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

    by_token = isinstance(rows[0]["labels"], list)
    return {
        "input_ids": padded("input_ids", pad),
        "attention_mask": padded("attention_mask", 0),
        "labels": padded("labels", IGNORE) if by_token else torch.tensor([row["labels"] for row in rows]),
    }


def judged(model: Any, case: dict[str, Any]) -> dict[str, float]:
    """What our judges measure of the held-out rows, of a model of transformers."""
    import torch

    right = counted = 0
    with torch.inference_mode():
        for first in range(0, len(case["valid"]), 16):
            batch = collate(case["valid"][first : first + 16], case["pad"])
            labels = batch.pop("labels")
            said = model(**batch).logits.argmax(dim=-1)
            if labels.dim() > 1:
                labels, said = labels[:, 1:], said[:, :-1]
            right += int(((said == labels) & (labels != IGNORE)).sum())
            counted += int((labels != IGNORE).sum())
    return {"valid/token_accuracy" if case["task"] == "sft" else "valid/accuracy": right / counted, "counted": counted}


def run(side: str, folder: Path) -> dict[str, Any]:
    import torch

    torch.set_num_threads(2)
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    clock = Clock()
    if side.startswith("workbench"):
        metrics = workbench(folder, case, clock, packing=side.endswith("packed"))
    else:
        metrics = peer(folder, case, clock, side)
    return {"seconds": clock.seconds(), "peak_bytes": clock.peak, "labels": clock.labels, "metrics": metrics}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], Path(sys.argv[2]))))
