"""A case of the parity matrix: a choice in each dimension, and the model and configuration that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.config import EngineConfig
from pretrain.schedules import schedule_named
from tests.helpers.models import (
    answering_model,
    biased_model,
    gated_model,
    grouped_latent_model,
    grouped_model,
    masked_model,
    parallel_model,
    post_norm_model,
    sliding_model,
    sparse_model,
)
from tests.helpers.pairwise import Case
from workbench.errors import LayoutError
from workbench.spec.model import ModelConfig

RANKS = 8
SAMPLES, TOKENS, STEPS, LABELS = 8, 16, 3, 5
MODELS = {
    "gated": gated_model,
    "biased": biased_model,
    "sliding": sliding_model,
    "post": post_norm_model,
    "parallel": parallel_model,
    "masked": masked_model,
    "answering": answering_model,
    "sparse": sparse_model,
    "grouped": grouped_model,
    "latent": grouped_latent_model,
}
WITH_EXPERTS = ("sparse", "grouped", "latent")

DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "model": tuple(MODELS),
    "tied": (True, False),
    "head": ("vocabulary", "labels"),
    "documents": (False, True),
    "optimizer": ("adamw", "muon"),
    "tp": (1, 2),
    "sp": (False, True),
    "cp": (1, 2),
    "context": ("all_gather", "ring"),
    "pp": (1, 2, 4),
    "schedule": ("gpipe", "1f1b", "interleaved", "zb_h1", "interleaved_zb", "zbv", "dualpipev"),
    "vpp": (1, 2),
    "dp": (1, 2, 4),
    "ep": (1, 2, 4),
    "etp": (None, 1),
    "shard": ("none", "zero1", "zero2", "zero3"),
    "shard_size": (None, 2),
    "recompute": ("none", "selective", "full"),
    "loss_chunk": (0, 5),
}
PLACES = {
    "optimizer": "optim.name",
    "tp": "parallel.tp",
    "sp": "parallel.sequence_parallel",
    "cp": "parallel.cp",
    "context": "parallel.context",
    "pp": "parallel.pp",
    "schedule": "parallel.schedule",
    "vpp": "parallel.vpp",
    "dp": "parallel.dp",
    "ep": "parallel.ep",
    "etp": "parallel.etp",
    "shard": "parallel.shard",
    "shard_size": "parallel.shard_size",
    "recompute": "recompute.mode",
    "loss_chunk": "kernels.loss_chunk_tokens",
}
"""Which key of the configuration a dimension sets; those not named here belong to the model or the data."""
PLAIN: Case = {name: values[0] for name, values in DIMENSIONS.items()}


NEEDED: dict[str, tuple[tuple[str, ...], Any]] = {
    "sp": (("tp",), 1),
    "context": (("cp",), 1),
    "schedule": (("pp",), 1),
    "vpp": (("pp",), 1),
    "shard": (("dp", "cp"), 1),
    "etp": (("sp",), False),
}
"""Choices of which one must be another than this, or the choice changes nothing or is refused."""


def model_of(case: Mapping[str, Any]) -> ModelConfig:
    """The features of a case, those of eight layers."""
    chosen = {**PLAIN, **case}
    labels = LABELS if chosen["head"] == "labels" else 0
    return MODELS[chosen["model"]](tie_word_embeddings=chosen["tied"], num_labels=labels, num_hidden_layers=8)


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
    """Why a case, complete or not, is not one to run: the configuration refuses it, it needs more than RANKS ranks, or
    a choice in it could not show anything."""
    ranks = case.get("tp", 1) * case.get("pp", 1) * case.get("cp", 1) * case.get("dp", 1)
    if ranks > RANKS:
        return f"more than {RANKS} ranks"
    for name, (other, idle) in NEEDED.items():
        if case.get(name, PLAIN[name]) != PLAIN[name] and all(case.get(axis) == idle for axis in other):
            return f"{name}={case[name]} does nothing at {' and '.join(f'{axis}={idle}' for axis in other)}"
    if fault := _fault_of_some(case):
        return fault
    if not case.keys() >= DIMENSIONS.keys():
        return None
    try:
        config_of(case, "nowhere").resolve_layout(model_of(case), ranks)
    except (LayoutError, ValueError) as error:
        return str(error)
    return None


def _fault_of_some(case: Mapping[str, Any]) -> str | None:
    """What the choices made so far already rule out; else the search for a whole case would try every other choice."""
    if case.get("head") == "labels" and (case.get("tied") or case.get("loss_chunk")):
        return "a head of labels has no vocabulary to tie or to cut into chunks"
    if case.get("model") == "answering" and (case.get("head") == "labels" or case.get("cp", 1) > 1):
        return "an encoder with a decoder has no head of labels and no context parallelism"
    if case.get("model", "sparse") not in WITH_EXPERTS and (case.get("ep", 1) > 1 or case.get("etp")):
        return "the model has no experts to share"
    if {"ep", "dp", "cp"} <= case.keys() and case["dp"] * case["cp"] % case["ep"]:
        return "ep divides dp x cp"
    if {"ep", "shard_size"} <= case.keys() and (case["shard_size"] or case["ep"]) % case["ep"]:
        return "shard_size is a multiple of ep"
    if {"schedule", "vpp"} <= case.keys() and (faults := schedule_named(case["schedule"]).faults(case["vpp"])):
        return faults[0]
    if {"shard", "shard_size"} <= case.keys() and case["shard_size"] and case["shard"] == "none":
        return "shard_size has no meaning without sharding"
    return None


def reference_of(case: Mapping[str, Any]) -> Case:
    """The case on one process that must give the same numbers."""
    kept = ("model", "tied", "head", "optimizer", "documents")
    return {**PLAIN, **{name: value for name, value in case.items() if name in kept}}


def name_of(case: Mapping[str, Any]) -> str:
    """What is not plain in a case."""
    words = [f"{name}={value}" for name, value in case.items() if value != PLAIN.get(name)]
    return " ".join(words) or "plain"
