"""Run as a script, by itself: what plain transformers and peft make of the exported folders, offline.

usage: python plain_transformers.py REQUEST.json ANSWER.json
Nothing of Workbench is imported here: what this process sees is what any user of the folders sees.
The request is {"language_model": folder, "pairs": jsonl, "prompt": text, "new_tokens": n,
"classifiers": {name: [folder, adapter folder or null]}, "rows": jsonl, "max_tokens": n}.
"""

import json
import os
import sys


def main(request: str, answer: str) -> int:
    """Writes accuracies and the greedy continuation."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import torch

    torch.set_num_threads(1)  # the model is so small that threads would mostly wait for each other
    with open(request, encoding="utf-8") as file:
        asked = json.load(file)
    with torch.inference_mode():
        found = language_model(asked)
        found["accuracy"] = {name: classifier(asked, *folders) for name, folders in asked["classifiers"].items()}
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(found, file)
    return 0


def language_model(asked: dict) -> dict:
    """Accuracy on minimal pairs, in float64, and the greedy continuation of the prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asked["language_model"])
    model = AutoModelForCausalLM.from_pretrained(asked["language_model"]).double().eval()

    def mean_loss(text: str) -> float:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        logits = model(input_ids=ids[:, :-1]).logits[0]
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()

    rows = read_rows(asked["pairs"])
    right = sum(mean_loss(row["good"]) < mean_loss(row["bad"]) for row in rows)
    prompt = tokenizer(asked["prompt"], add_special_tokens=False, return_tensors="pt")
    prompt.pop("token_type_ids", None)
    ids = model.float().generate(**prompt, max_new_tokens=asked["new_tokens"], do_sample=False)
    text = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])
    return {"pairs": right / len(rows), "text": text}


def classifier(asked: dict, folder: str, adapter: str | None) -> float:
    """The share of rows whose label the exported classifier (with its adapter, if there is one) finds."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, **({"num_labels": 2} if adapter else {}))
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    right = 0
    rows = read_rows(asked["rows"])
    for row in rows:
        ids = torch.tensor([tokenizer(row["text"], truncation=True, max_length=asked["max_tokens"])["input_ids"]])
        right += int(model(input_ids=ids).logits[0].argmax()) == row["label"]
    return right / len(rows)


def read_rows(path: str) -> list:
    """The objects of a JSON-lines file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
