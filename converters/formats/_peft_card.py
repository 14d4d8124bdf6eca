"""The README.md of an exported adapter. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.auto import auto_class
from converters.format import WriteRequest


def adapter_card(request: WriteRequest, config: Mapping[str, Any]) -> str:
    """What the adapter is, what it belongs to, and how to load it."""
    base, model = config["base_model_name_or_path"], request.model
    loader = auto_class(model).name
    labels = f", num_labels={model.num_labels}" if model.num_labels else ""
    targets = ", ".join(f"`{name}`" for name in (*config["target_modules"], *(config["target_parameters"] or ())))
    kind = "DoRA" if config["use_dora"] else "LoRA"
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {base}",
        "tags:",
        "- lora",
        "- workbench",
        "---",
        "",
        f"# {request.path.name}",
        "",
        f"A {kind} adapter of rank {config['r']} (alpha {config['lora_alpha']}) to {targets} of `{base}`.",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {loader}",
        "",
        f'base = {loader}.from_pretrained("{base}"{labels})',
        f'model = PeftModel.from_pretrained(base, "{request.path.name}")',
        "```",
    ]
    if request.training is not None:
        lines += ["", f"Trained with Workbench: step {request.training.step:,}, {request.training.tokens:,} tokens."]
    return "\n".join([*lines, ""])
