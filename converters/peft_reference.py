"""Run as a script, by itself: what plain peft makes of a Hugging Face folder and a PEFT folder.

usage: python peft_reference.py REQUEST.json OUTPUT.npz FACTS.json
REQUEST holds: base and adapter (folders), loader (a class of transformers), num_labels, inputs (by name, one set a
sequence) and outputs (names). FACTS gets the names that peft misses or does not know, those whose values are not the
file's, and the scale of each adapted module: peft passes over all of this in silence. Logits follow if names fit.
Nothing of Workbench is imported here: what this process sees is what any user of the two folders sees.
"""

import json
import os
import sys
from typing import Any


def main(request_path: str, output: str, facts_path: str) -> int:
    """Writes the facts, and one array of logits per sequence, in fp32."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(request_path) as file:
        request = json.load(file)
    model = load(request)
    found = facts(model, os.path.join(request["adapter"], "adapter_model.safetensors"))
    with open(facts_path, "w") as file:
        json.dump(found, file)
    if not (found["missing"] or found["unexpected"] or found["other"]):
        write_logits(model, request, output)
    return 0


def load(request: dict[str, Any]) -> Any:
    """The base under the adapter."""
    import torch
    import transformers
    from peft import PeftModel

    labels = {"num_labels": request["num_labels"]} if request["num_labels"] else {}
    loader = getattr(transformers, request["loader"])
    return PeftModel.from_pretrained(
        loader.from_pretrained(request["base"], dtype=torch.float32, **labels), request["adapter"]
    ).eval()


def facts(model: Any, path: str) -> dict[str, Any]:
    """What peft holds beside what the file holds."""
    import torch
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file

    file, held = load_file(path), get_peft_model_state_dict(model, save_embedding_layers=False)
    own = {key for key in file if not key.endswith(".base_layer.weight")}
    return {
        "missing": sorted(set(held) - own),
        "unexpected": sorted(own - set(held)),
        "other": sorted(k for k in set(held) & own if not torch.equal(held[k].float(), file[k].float())),
        "scaling": {
            name: module.scaling["default"]
            for name, module in model.named_modules()
            if isinstance(getattr(module, "scaling", None), dict) and "default" in module.scaling
        },
    }


def write_logits(model: Any, request: dict[str, Any], output: str) -> None:
    """Each output of each sequence, the sequences of one output together."""
    import numpy as np
    import torch

    with torch.inference_mode():
        rows = [{name: torch.tensor([ids]) for name, ids in row.items()} for row in request["inputs"]]
        results = [model(**row) for row in rows]
    np.savez(output, *(result[name][0].float().numpy() for name in request["outputs"] for result in results))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
