"""What a task trains is what transformers loads: the class for its head, what its outputs mean, and the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.job import JobOptions, make_job
from converters.open import get_format, open_checkpoint
from tests.finetune.adapters import write_base
from tests.helpers.models import gated_model, masked_model
from workbench.models.batch import Batch
from workbench.models.generate import load_model
from workbench.spec.layout import ParallelLayout

TOKENS: dict[str, Any] = {"num_labels": 3, "label_tokens": True, "problem_type": "single_label_classification"}
SEVERAL: dict[str, Any] = {"num_labels": 3, "problem_type": "multi_label_classification"}
CASES = {
    "llama tokens": (gated_model(**TOKENS), "LlamaForTokenClassification"),
    "llama several": (gated_model(**SEVERAL, pad_token_id=0), "LlamaForSequenceClassification"),
    "llama body": (gated_model(lm_head=False), "LlamaModel"),
    "bert tokens": (masked_model(**TOKENS, pooler=False, tie_word_embeddings=True), "BertForTokenClassification"),
    "bert several": (masked_model(**SEVERAL, tie_word_embeddings=True), "BertForSequenceClassification"),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_transformers_loads_the_head_and_gives_the_same(case: str, tmp_path: Path) -> None:
    import transformers

    model, name = CASES[case]
    opened = open_checkpoint(write_base(tmp_path / "native", model))
    options = JobOptions(layout=ParallelLayout(), optimizer="drop")
    make_job(opened, get_format("huggingface"), tmp_path / "hf", options, operation="export").run()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == [name] and config.get("problem_type") == model.problem_type
    assert open_checkpoint(tmp_path / "hf").model.model_dump(
        include={"num_labels", "label_tokens", "problem_type"}
    ) == {"num_labels": model.num_labels, "label_tokens": model.label_tokens, "problem_type": model.problem_type}
    theirs, report = getattr(transformers, name).from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    ids = torch.arange(1, 21).view(2, 10)
    with torch.inference_mode():
        ours = load_model(model, opened.source)(None, Batch(ids), "logits")
        found = theirs.eval()(input_ids=ids)
        torch.testing.assert_close(ours, found.last_hidden_state if case == "llama body" else found.logits)
