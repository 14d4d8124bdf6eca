"""Run as a script, by itself: the logits of a Hugging Face folder as plain transformers computes them, offline.

usage: python reference.py FOLDER TASK SEQUENCES.json OUTPUT.npz
Nothing of Workbench is imported here: what this process sees is what any user of the folder sees.
"""

import json
import os
import sys


def main(folder: str, task: str, sequences: str, output: str) -> int:
    """Writes one array of logits per sequence, in fp32; exit code 1 and a line on stderr when weights do not fit."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    loader = {"causal_lm": AutoModelForCausalLM, "sequence_classification": AutoModelForSequenceClassification}[task]
    model, report = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    faults = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if faults:
        print(f"transformers loads the folder with {faults}", file=sys.stderr)
        return 1
    model.eval()
    with open(sequences) as file:
        rows = json.load(file)
    found = {}
    with torch.inference_mode():
        for index, row in enumerate(rows):
            found[str(index)] = model(input_ids=torch.tensor([row])).logits[0].float().numpy()
    np.savez(output, **found)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
