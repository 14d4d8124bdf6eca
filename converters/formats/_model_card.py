"""The README.md of an exported folder. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from converters.auto import auto_class
from converters.family import Family
from converters.format import WriteRequest


def model_card(request: WriteRequest, family: Family, dtype: str) -> str:
    """What the model is, where it came from, and how to load it."""
    model = request.model
    elements = sum(math.prod(tensor.shape) for tensor in request.schema.values())
    loader = auto_class(model)
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {loader.task}",
        "tags:",
        "- workbench",
        "---",
        "",
        f"# {request.path.name}",
        "",
        f"A {family.architecture(model)} of {elements:,} parameters in {dtype}: {model.num_hidden_layers} layers, "
        f"hidden size {model.hidden_size}, {model.num_attention_heads} heads "
        f"({model.num_key_value_heads} for keys and values), "
        f"vocabulary of {model.vocab_size}.",
        "",
        "```python",
        f"from transformers import AutoTokenizer, {loader.name}",
        "",
        f'model = {loader.name}.from_pretrained("{request.path.name}")',
        *([f'tokenizer = AutoTokenizer.from_pretrained("{request.path.name}")'] if request.tokenizer else []),
        "```",
        "",
        "## Where it comes from",
        "",
        *(f"- {line}" for line in _provenance(request)),
    ]
    if left_out := family.left_out(model):
        said = ", ".join(f"`{name}={value}`" for name, value in left_out.items())
        lines += ["", f"Used in training and not part of this configuration: {said}."]
    return "\n".join([*lines, ""])


def _provenance(request: WriteRequest) -> list[str]:
    found = [line for entry in request.lineage if (line := _line(entry))]
    if request.training is not None:
        found.append(
            f"trained with Workbench: step {request.training.step:,}, {request.training.tokens:,} tokens, "
            f"seed {request.training.seed}"
        )
    return [*found, "exported by Workbench"]


def _line(entry: Mapping[str, Any]) -> str:
    """One ancestor in words; without paths, which mean nothing on another machine."""
    if isinstance(entry.get("config"), Mapping):
        return f"weights of the Hugging Face folder `{entry.get('name')}`"
    if "operation" not in entry:
        return ""
    step = f" of step {entry['step']:,}" if isinstance(entry.get("step"), int) else ""
    layout = entry.get("layout")
    where = f" at tp={layout.get('tp')} pp={layout.get('pp')}" if isinstance(layout, Mapping) else ""
    return f"{entry['operation']}{step} from a {entry.get('format', 'foreign')} checkpoint{where}"
