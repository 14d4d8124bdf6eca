"""A case of the parity matrix: a choice in each dimension, and the model and configuration that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.config import EngineConfig
from tests.helpers.models import biased_model, gated_model
from tests.helpers.pairwise import Case
from workbench.errors import LayoutError
from workbench.spec.model import ModelConfig

RANKS = 8
SAMPLES, TOKENS, STEPS = 8, 16, 3
MODELS = {"gated": gated_model, "biased": biased_model}

DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "model": ("gated", "biased"),
    "tied": (True, False),
    "tp": (1, 2, 4),
    "pp": (1, 2, 4),
    "dp": (1, 2),
    "schedule": ("gpipe", "1f1b"),
    "shard": ("none", "zero2", "zero3"),
}
PLACES = {
    "tp": "parallel.tp",
    "pp": "parallel.pp",
    "dp": "parallel.dp",
    "schedule": "parallel.schedule",
    "shard": "parallel.shard",
}
"""Which key of the configuration a dimension sets; those not named here belong to the model or the data."""
PLAIN: Case = {name: values[0] for name, values in DIMENSIONS.items()}


def model_of(case: Mapping[str, Any]) -> ModelConfig:
    """The features of a case, those of eight layers."""
    make = MODELS[case.get("model", PLAIN["model"])]
    return make(tie_word_embeddings=case.get("tied", PLAIN["tied"]), num_hidden_layers=8)


def config_of(case: Mapping[str, Any], folder: str) -> EngineConfig:
    """The configuration of a case, complete or not; what it does not choose is plain."""
    tables: dict[str, dict[str, Any]] = {
        "batch": {"global_size": SAMPLES, "micro_size": 1, "seq_len": TOKENS},
        "optim": {"lr": 1e-2, "weight_decay": 0.1, "clip": 1.0},
        "run": {"dir": folder, "steps": STEPS, "seed": 7, "resume": "never"},
    }
    for name, place in PLACES.items():
        table, key = place.split(".")
        tables.setdefault(table, {})[key] = case.get(name, PLAIN[name])
    return EngineConfig.model_validate(tables)


def refusal(case: Mapping[str, Any]) -> str | None:
    """Why the configuration of `case` is refused, or None when it runs on at most RANKS ranks."""
    ranks = case.get("tp", 1) * case.get("pp", 1) * case.get("cp", 1) * case.get("dp", 1)
    if ranks > RANKS:
        return f"more than {RANKS} ranks"
    try:
        config = config_of(case, "nowhere")
        config.resolve_layout(model_of(case), ranks)
    except (LayoutError, ValueError) as error:
        return str(error)
    return None


def reference_of(case: Mapping[str, Any]) -> Case:
    """The case on one process that must give the same numbers."""
    kept = ("model", "tied", "optimizer", "documents")
    return {**PLAIN, **{name: value for name, value in case.items() if name in kept}}


def name_of(case: Mapping[str, Any]) -> str:
    """What is not plain in a case."""
    words = [f"{name}={value}" for name, value in case.items() if value != PLAIN.get(name)]
    return " ".join(words) or "plain"
