"""The page of capabilities: every pair of features, and what the check of configurations says of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pretrain.config import EngineConfig
from tests.helpers.models import gated_model
from workbench.cli._tables import toml
from workbench.errors import LayoutError

PAGE = Path(__file__).parents[2] / "docs" / "capabilities.md"
ROPE = "`tests/parity/test_rope_and_residual.py`"
MATRIX, FORMATS = "[parity](parity.md)", "`tests/parity/test_formats.py`"


@dataclass(frozen=True)
class Feature:
    """A choice of the user: the settings that switch it on, and those that it needs to mean anything.

    kind: features of one kind exclude each other. proof: where the tests show that it runs with the others.
    """

    kind: str
    name: str
    proof: str
    settings: Mapping[str, Any]
    needs: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)


def _schedule(name: str, vpp: int = 1) -> Feature:
    settings = {"parallel.schedule": name, "parallel.vpp": vpp}
    return Feature("schedule", name, MATRIX, settings, {"parallel.pp": 2})


def _linear(name: str, proof: str) -> Feature:
    kernels = {"kernels.backend": "te"} if name.startswith("te:") else {}
    return Feature("linear layers", name, proof, {"precision.linear": name, "precision.compute": "bf16"}, kernels)


ATTENTION = "`tests/models/test_attention_features.py`"
TE = "`tests/parallel/backends/test_te.py`, on a GPU `test_te_gpu.py`"
EXPERTS = "`tests/models/test_moe.py`"
SPARSE = {"moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}}
FEATURES = (
    Feature("tensor", "tensor parallelism", MATRIX, {"parallel.tp": 2}),
    Feature(
        "tensor", "tensor and sequence parallelism", MATRIX, {"parallel.tp": 2, "parallel.sequence_parallel": True}
    ),
    Feature("context", "context parallelism by all_gather", MATRIX, {"parallel.cp": 2}),
    Feature("context", "context parallelism in a ring", MATRIX, {"parallel.cp": 2, "parallel.context": "ring"}),
    _schedule("gpipe"),
    _schedule("1f1b"),
    _schedule("interleaved", 2),
    _schedule("zb_h1"),
    _schedule("interleaved_zb", 2),
    _schedule("zbv", 2),
    _schedule("dualpipev", 2),
    *(
        Feature("data parallelism", name, MATRIX, {"parallel.shard": shard, **size}, {"parallel.dp": 4})
        for name, shard, size in (
            ("replicated", "none", {}),
            ("zero1", "zero1", {}),
            ("zero2", "zero2", {}),
            ("zero3", "zero3", {}),
            ("hybrid zero3", "zero3", {"parallel.shard_size": 2}),
        )
    ),
    Feature("experts", "experts", EXPERTS, {}, model=SPARSE),
    Feature("experts", "expert parallelism", EXPERTS, {"parallel.ep": 2}, {"parallel.dp": 4}, SPARSE),
    Feature("recompute", "recompute selective", MATRIX, {"recompute.mode": "selective"}),
    Feature("recompute", "recompute full", MATRIX, {"recompute.mode": "full"}),
    Feature("loss", "loss in chunks", MATRIX, {"kernels.loss_chunk_tokens": 5}),
    Feature("optimizer", "Muon", MATRIX, {"optim.name": "muon"}),
    Feature("moments", "moments in bf16", FORMATS, {"optim.moments": "bf16"}),
    Feature("compute", "bf16", FORMATS, {"precision.compute": "bf16"}),
    Feature("compute", "fp16", FORMATS, {"precision.compute": "fp16"}),
    Feature("gradients", "gradients summed in bf16", FORMATS, {"precision.grad_reduce": "bf16"}),
    _linear("fp8_tensorwise", FORMATS),
    _linear("fp8_rowwise", FORMATS),
    _linear("te:current", TE),
    _linear("te:delayed", TE),
    Feature("backend", "Transformer Engine", TE, {"kernels.backend": "te"}),
    Feature("compile", "torch.compile", "`tests/models/test_compile.py`", {"kernels.compile": True}),
    Feature(
        "attention", "tokens that see all others", "`tests/pretrain/test_masked_parity.py`", {}, model={"causal": False}
    ),
    Feature(
        "attention",
        "an encoder with a decoder",
        "`tests/pretrain/test_answering_parity.py`",
        {},
        model={"num_encoder_layers": 4, "position_embedding": "relative", "num_key_value_heads": 4},
    ),
    Feature(
        "dropout", "dropout on hidden states", "`tests/pretrain/test_parity.py`", {}, model={"hidden_dropout": 0.1}
    ),
    Feature("dropout", "dropout in attention", "`tests/pretrain/test_parity.py`", {}, model={"attention_dropout": 0.1}),
    Feature("window", "sliding window", ATTENTION, {}, model={"sliding_window": 5}),
    Feature("norms of heads", "normed heads", ATTENTION, {}, model={"qk_norm": "head"}),
    Feature("norms of heads", "queries and keys normed whole", ATTENTION, {}, model={"qk_norm": "full"}),
    Feature("caps", "capped scores", ATTENTION, {}, model={"attn_logit_softcapping": 50.0}),
    Feature("caps of logits", "capped logits", ATTENTION, {}, model={"final_logit_softcapping": 30.0}),
    Feature("norms", "norms after attention and MLP", ATTENTION, {}, model={"norm_placement": "post"}),
    Feature("norms", "norms on both sides", ATTENTION, {}, model={"norm_placement": "sandwich"}),
    Feature("turned share", "a share of each head turns", ROPE, {}, model={"partial_rotary_factor": 0.5}),
    *(
        Feature("scaled positions", f"positions scaled {kind}", ROPE, {}, model={"rope_scaling": scaling})
        for kind, scaling in (
            ("linear", {"kind": "linear", "factor": 2.0}),
            ("by_length", {"kind": "by_length", "factor": 2.0}),
            ("by_parts", {"kind": "by_parts", "factor": 2.0}),
            ("ramp", {"kind": "ramp", "factor": 2.0}),
        )
    ),
    Feature("residual", "parallel residual", ROPE, {}, model={"parallel_residual": True}),
    Feature(
        "residual", "parallel residual of one norm", ROPE, {}, model={"parallel_residual": True, "shared_norm": True}
    ),
)


def refusal(*features: Feature) -> str | None:
    """Why a configuration with these features is refused, or None when it runs."""
    settings: dict[str, Any] = {
        "batch.global_size": 16,
        "batch.micro_size": 1,
        "batch.seq_len": 16,
        "run.dir": "nowhere",
        "run.steps": 1,
    }
    model: dict[str, Any] = {"num_hidden_layers": 8, "intermediate_size": 64}
    for feature in features:
        settings |= feature.needs
        model |= feature.model
    for feature in features:
        settings |= feature.settings
    tables: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        table, name = key.split(".")
        tables.setdefault(table, {})[name] = value
    config = EngineConfig.model_validate(tables)
    try:
        config.resolve_layout(gated_model(**model), config.parallel.num_ranks())
    except LayoutError as error:
        return str(error)
    except ValidationError as error:
        return "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
    return None


def exclude_each_other(one: Feature, other: Feature) -> bool:
    """Whether two features are choices of the same thing."""
    return one.kind == other.kind or any(
        one.settings[key] != other.settings[key] for key in one.settings.keys() & other.settings.keys()
    )


def refused_pairs() -> Iterator[tuple[Feature, Feature, str]]:
    """The pairs that do not run, of features that could be asked for together."""
    for one, other in combinations(FEATURES, 2):
        if not exclude_each_other(one, other) and (why := refusal(one, other)) is not None:
            yield one, other, why


def page() -> str:
    """The text of docs/capabilities.md."""
    lines = [
        "# Capabilities",
        "",
        "<!-- Written by `make parity`; a test keeps it current. -->",
        "",
        "What runs with what. The check of a configuration refuses what is in the second table, with that reason,",
        "before any process starts (`pretrain/capabilities.py`). Every other pair of features of the first table runs.",
        "",
        "| feature | settings | shown by |",
        "|---|---|---|",
    ]
    for feature in FEATURES:
        words = {**feature.needs, **feature.settings, **{f"model.{key}": v for key, v in feature.model.items()}}
        settings = ", ".join(f"`{key} = {toml(value)}`" for key, value in words.items())
        lines.append(f"| {feature.name} | {settings} | {feature.proof} |")
    lines += ["", "## Refused", "", "| feature | with | why |", "|---|---|---|"]
    lines += [f"| {these} | {those} | {why} |" for these, those, why in _grouped(refused_pairs())]
    return "\n".join(lines) + "\n"


def _grouped(pairs: Iterable[tuple[Feature, Feature, str]]) -> Iterator[tuple[str, str, str]]:
    """The pairs with one line for each reason and all that it keeps from running with the same features."""
    partners: dict[tuple[str, str], list[str]] = {}
    for one, other, why in pairs:
        partners.setdefault((why, one.name), []).append(other.name)
    lines: dict[tuple[str, str], list[str]] = {}
    for (why, one_name), others in partners.items():
        lines.setdefault((why, ", ".join(others)), []).append(one_name)
    for (why, others_names), ones in lines.items():
        yield ", ".join(ones), others_names, why


if __name__ == "__main__":
    PAGE.write_text(page())
