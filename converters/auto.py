"""Which automatic class of transformers loads a model, and what that class calls our outputs. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from workbench.spec.model import ModelConfig

Outputs = Mapping[Literal["logits", "pair_logits"], str]


@dataclass(frozen=True)
class AutoClass:
    """A class of transformers, the hub's word for its task, and its name for each output of ours."""

    name: str
    task: str
    outputs: Outputs


def auto_class(model: ModelConfig) -> AutoClass:
    """The class that loads `model` with the heads that it has."""
    if model.label_tokens:
        return AutoClass("AutoModelForTokenClassification", "token-classification", {"logits": "logits"})
    if model.num_labels:
        return AutoClass("AutoModelForSequenceClassification", "text-classification", {"logits": "logits"})
    if model.num_encoder_layers:
        return AutoClass("AutoModelForSeq2SeqLM", "text2text-generation", {"logits": "logits"})
    if model.causal and not model.lm_head:
        return AutoClass("AutoModel", "feature-extraction", {"logits": "last_hidden_state"})
    if model.causal:
        return AutoClass("AutoModelForCausalLM", "text-generation", {"logits": "logits"})
    if model.next_sentence:
        both: Outputs = {"logits": "prediction_logits", "pair_logits": "seq_relationship_logits"}
        return AutoClass("AutoModelForPreTraining", "fill-mask", both)
    if model.lm_head:
        return AutoClass("AutoModelForMaskedLM", "fill-mask", {"logits": "logits"})
    return AutoClass("AutoModel", "feature-extraction", {"logits": "pooler_output"})
