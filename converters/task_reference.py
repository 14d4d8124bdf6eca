"""Run as a script, by itself: how plain transformers, or peft, scores the labelled rows of a task, offline.

usage: python task_reference.py REQUEST.json ANSWER.json
REQUEST holds: folder, adapter (a folder, or null), tokenizer (a folder, or null), loader (a class of transformers),
num_labels, output (a name), rows (a JSON-lines file of {"inputs": by name, "labels": a class number, or one for each
token, "text", "ids": those of the text}) and near (two logits that differ by less, times a tenth of the larger one if
that is above 10, may be told apart otherwise elsewhere). ANSWER gets the metrics and the shares of labels and of rows
that were near, or a "fault": of which row's text the tokenizer makes other ids.
Nothing of Workbench is imported here: what this process sees is what any user of the folders sees.
"""

import json
import os
import sys
from typing import Any

IGNORE = -100


def main(request_path: str, answer: str) -> int:
    """Writes the metrics."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    import torch

    with open(request_path) as file:
        request = json.load(file)
    with open(request["rows"]) as rows:
        fault = tokenizer_fault(request["tokenizer"], map(json.loads, rows)) if request["tokenizer"] else None
    if fault is None:
        model = load(request)
        with open(request["rows"]) as rows, torch.inference_mode():
            found: dict[str, Any] = score(model, map(json.loads, rows), request["output"], request["near"])
    else:
        found = {"fault": fault}
    with open(answer, "w") as file:
        json.dump(found, file)
    return 0


def tokenizer_fault(folder: str, rows: Any) -> str | None:
    """The first row of whose text transformers' tokenizer makes other ids, and where they part."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for number, row in enumerate(rows):
        there, here = tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"], row["ids"]
        if there != here:
            at = next(i for i in range(len(there) + len(here)) if there[: i + 1] != here[: i + 1])
            return (
                f"the text of held-out row {number}: transformers makes {len(there)} tokens of it, the engine "
                f"{len(here)}; token {at} is {there[at : at + 1]} there and {here[at : at + 1]} here"
            )
    return None


def load(request: dict[str, Any]) -> Any:
    """The model, under its adapter if there is one."""
    import torch
    import transformers

    labels = {"num_labels": request["num_labels"]} if request["num_labels"] else {}
    model = getattr(transformers, request["loader"]).from_pretrained(request["folder"], dtype=torch.float32, **labels)
    if request["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, request["adapter"])
    return model.eval()


def score(model: Any, rows: Any, output: str, near: float) -> dict[str, float]:
    """Loss and accuracy over labels, the share of rows of which all labels are right, one row after another."""
    import torch

    loss = 0.0
    labels = right = close = num_rows = whole = unsure = 0
    for row in rows:
        inputs = {name: torch.tensor([values]) for name, values in row["inputs"].items()}
        logits = model(**inputs)[output][0].float()
        true = torch.tensor(row["labels"]).view(-1)
        real = true != IGNORE
        logits, true = logits.view(len(true), -1)[real], true[real]
        loss += torch.nn.functional.cross_entropy(logits, true, reduction="sum").item()
        hits = logits.argmax(dim=-1) == true
        best = logits.topk(2, dim=-1).values
        ties = best[:, 0] - best[:, 1] < near * (best[:, 0].abs() / 10).clamp(min=1)
        labels, right, close = labels + len(true), right + int(hits.sum()), close + int(ties.sum())
        num_rows, whole, unsure = num_rows + 1, whole + bool(hits.all()), unsure + bool(ties.any())
    accuracy = right / labels
    return {
        "loss": loss / labels,
        "accuracy": accuracy,
        "token_accuracy": accuracy,
        "exact_match": whole / num_rows,
        "near_labels": close / labels,
        "near_rows": unsure / num_rows,
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
