"""Run as a script, by itself: logits of a Hugging Face folder by plain transformers, offline.

usage: python reference.py REQUEST.json OUTPUT.npz
REQUEST holds: folder, loader (a class of transformers), inputs (by name, one set a sequence) and outputs (names); or
states, names of tuples of hidden states that are written instead.
Nothing of Workbench is imported here: what this process sees is what any user of the folder sees.
"""

import json
import os
import sys
from typing import Any


def main(request_path: str, output: str) -> int:
    """Writes the arrays; exit code 1 and a line on stderr when weights do not fit."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    import numpy as np

    with open(request_path) as file:
        request = json.load(file)
    model, faults = load(request)
    if faults:
        print(f"it loads with {faults}", file=sys.stderr)
        return 1
    np.savez(output, *arrays(model, request))
    return 0


def arrays(model: Any, request: dict[str, Any]) -> list[Any]:
    """Each output of each sequence, in fp32, the sequences of one output together; or each hidden state."""
    import torch

    model.eval()
    with torch.inference_mode():
        rows = [{name: torch.tensor([ids]) for name, ids in row.items()} for row in request["inputs"]]
        results = [model(**row, output_hidden_states="states" in request) for row in rows]
    if "states" in request:
        return [state[0].float().numpy() for name in request["states"] for result in results for state in result[name]]
    return [result[name][0].float().numpy() for name in request["outputs"] for result in results]


def load(request: dict[str, Any]) -> tuple[Any, dict[str, list[str]]]:
    """The model, and what does not fit, by kind."""
    import torch
    import transformers

    loader = getattr(transformers, request["loader"])
    model, report = loader.from_pretrained(request["folder"], dtype=torch.float32, output_loading_info=True)
    return model, {kind: sorted(map(str, names)) for kind, names in report.items() if names}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
