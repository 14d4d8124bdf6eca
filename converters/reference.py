"""Run as a script, by itself: logits of a Hugging Face folder by plain transformers, offline.

usage: python reference.py REQUEST.json OUTPUT.npz
REQUEST holds: folder, task ("causal_lm" or "sequence_classification") and sequences.
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
    loader = loaders[request["task"]]
    model, report = loader.from_pretrained(request["folder"], dtype=torch.float32, output_loading_info=True)
    return model, {kind: sorted(map(str, names)) for kind, names in report.items() if names}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
