"""Run as a script, by itself: the logits of a Hugging Face folder under a PEFT adapter, as plain peft computes them.

usage: python peft_reference.py BASE ADAPTER NUM_LABELS SEQUENCES.json OUTPUT.npz
Nothing of Workbench is imported here: what this process sees is what any user of the two folders sees. peft passes over
names that it misses or does not know in silence, so what it holds afterwards is compared with what the file holds.
"""

import json
import os
import sys


def main(base: str, adapter: str, num_labels: str, sequences: str, output: str) -> int:
    """Writes one array of logits per sequence, in fp32; exit code 1 and a line on stderr when names do not fit."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    import numpy as np
    import torch
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    labels = int(num_labels)
    if labels:
        model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=labels)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    file = load_file(os.path.join(adapter, "adapter_model.safetensors"))
    held = get_peft_model_state_dict(model)
    faults = {
        "missing keys": sorted(set(held) - set(file)),
        "unexpected keys": sorted(set(file) - set(held)),
        "other values for": sorted(
            k for k in set(held) & set(file) if not torch.equal(held[k].float(), file[k].float())
        ),
    }
    if any(faults.values()):
        shown = {kind: f"{len(names)}, {names[0]!r} the first" for kind, names in faults.items() if names}
        print(f"peft loads the adapter with {shown}", file=sys.stderr)
        return 1
    with open(sequences) as opened:
        rows = json.load(opened)
    found = {}
    with torch.inference_mode():
        for index, row in enumerate(rows):
            found[str(index)] = model(input_ids=torch.tensor([row])).logits[0].float().numpy()
    np.savez(output, **found)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
