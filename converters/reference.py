"""Run as a script, by itself: logits of a Hugging Face folder by plain transformers (and peft), offline.

usage: python reference.py REQUEST.json OUTPUT.npz
REQUEST holds: folder, task ("causal_lm" or "sequence_classification"), sequences, adapter (a PEFT folder or null) and
num_labels (of a classifier on a base without a head, or null).
Nothing of Workbench is imported here: what this process sees is what any user of the folder sees.
"""

import json
import os
import sys
from typing import Any


def main(request_path: str, output: str) -> int:
    """Writes one array of logits per sequence, in fp32; exit code 1 and a line on stderr when weights do not fit."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    import numpy as np
    import torch

    with open(request_path) as file:
        request = json.load(file)
    model, faults = load(request)
    if faults:
        print(f"it loads with {faults}", file=sys.stderr)
        return 1
    model.eval()
    found = {}
    with torch.inference_mode():
        for index, row in enumerate(request["sequences"]):
            found[str(index)] = model(input_ids=torch.tensor([row])).logits[0].float().numpy()
    np.savez(output, **found)
    return 0


def load(request: dict[str, Any]) -> tuple[Any, dict[str, list[str]]]:
    """The model, and what does not fit, by kind."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    loaders = {"causal_lm": AutoModelForCausalLM, "sequence_classification": AutoModelForSequenceClassification}
    options = {} if request["num_labels"] is None else {"num_labels": request["num_labels"]}
    model, report = loaders[request["task"]].from_pretrained(
        request["folder"], dtype=torch.float32, output_loading_info=True, **options
    )
    faults = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if request["adapter"] is None:
        return model, faults
    if options:  # the head comes with the adapter, in place of the one for the vocabulary
        faults = {kind: left for kind, names in faults.items() if (left := [n for n in names if not is_head(n)])}
    adapted, more = add_adapter(model, request["adapter"])
    return adapted, faults | more


def is_head(name: str) -> bool:
    return name in ("score.weight", "lm_head.weight")


def add_adapter(model: Any, folder: str) -> tuple[Any, dict[str, list[str]]]:
    """The model with its adapter, and the tensors of the file that it lacks or has otherwise. peft itself is silent."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    adapted = PeftModel.from_pretrained(model, folder)
    loaded = get_peft_model_state_dict(adapted)
    stored = load_file(os.path.join(folder, "adapter_model.safetensors"))
    both = loaded.keys() & stored.keys()
    faults = {
        "missing_keys": sorted(loaded.keys() - stored.keys()),
        "unexpected_keys": sorted(stored.keys() - loaded.keys()),
        "different": sorted(key for key in both if not torch.equal(loaded[key].float(), stored[key].float())),
    }
    return adapted, {kind: names for kind, names in faults.items() if names}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
