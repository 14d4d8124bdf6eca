"""Latent attention: one process and many give the same numbers, in float64."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.helpers.models import grouped_model, latent_model
from tests.helpers.parity import ADAMW, SAMPLES, Observed, assert_observed, train_three_steps
from tests.helpers.ranks import run_ranks
from workbench.models.attend import attend
from workbench.models.attention import KeyValueCache
from workbench.models.batch import Batch
from workbench.models.blockwise import LONGEST
from workbench.models.build import build_stage, initialise
from workbench.models.scoring import visible
from workbench.parallel.axis import Axis
from workbench.parallel.mesh import Mesh
from workbench.spec.execution import StageOptions
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig
from workbench.spec.schema import layer_specs

Sent = tuple[str, str, tuple[int, ...]]

MODELS = {
    "latents": latent_model(),
    "no query latent": latent_model(q_lora_rank=None, attention_bias=False, attention_output_bias=False),
    "experts": latent_model(moe=grouped_model().moe),
    "windows": latent_model(sliding_window=4, layer_types=("sliding_attention", "full_attention") * 2),
    "dropout": latent_model(attention_dropout=0.2, hidden_dropout=0.1),
}
SP: dict[str, Any] = {"sequence_parallel": True}
RING: dict[str, Any] = {"context": "ring"}
VEE: dict[str, Any] = {"pp": 2, "vpp": 2, "placement": "vee"}
CASES: list[tuple[str, dict[str, Any], bool, str]] = [
    ("latents", {"tp": 2}, False, "none"),
    ("no query latent", {"tp": 2}, False, "none"),
    ("latents", {"tp": 2, **SP}, True, "full"),
    ("no query latent", {"tp": 2, **SP}, False, "selective"),
    ("latents", {"tp": 4}, False, "none"),
    ("latents", VEE, False, "none"),
    ("no query latent", {"tp": 2, **VEE, **SP}, True, "selective"),
    ("latents", {"cp": 2}, True, "selective"),
    ("latents", {"cp": 2, **RING}, True, "none"),
    ("no query latent", {"tp": 2, "cp": 2, **SP, **RING}, False, "full"),
    ("dropout", {"tp": 2, "cp": 2, **SP}, False, "none"),
    ("latents", {"dp": 2, "shard": "zero3"}, False, "none"),
    ("experts", {"tp": 2, "dp": 2, "ep": 2, **SP}, False, "selective"),
    ("windows", {"tp": 2, "cp": 2, **SP, **RING}, True, "none"),
    ("latents", {"tp": 2, "dp": 2, "shard": "zero3", **SP}, False, "none"),
]


@cache
def _reference(name: str, documents: bool) -> Observed:
    return train_three_steps(MODELS[name], ParallelLayout(), "gpipe", 1, documents)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "degrees", "documents", "recompute"), CASES, ids=str)
def test_three_steps_with_latents_equal_one_process(
    name: str, degrees: dict[str, Any], documents: bool, recompute: Any
) -> None:
    layout = ParallelLayout(**degrees)
    schedule = "zbv" if layout.placement == "vee" else "1f1b"
    options = StageOptions(recompute=recompute)
    seen = run_ranks(layout.world_size, train_three_steps, MODELS[name], layout, schedule, 1, documents, options)
    assert_observed(seen, _reference(name, documents))


@pytest.mark.parity
def test_muon_orthogonalises_what_every_tensor_rank_holds_whole() -> None:
    muon = ADAMW.model_copy(update={"name": "muon"})
    arguments = ("1f1b", 1, False, None, SAMPLES, muon)
    reference = train_three_steps(MODELS["latents"], ParallelLayout(), *arguments)
    layout = ParallelLayout(tp=2, sequence_parallel=True)
    assert_observed(run_ranks(2, train_three_steps, MODELS["latents"], layout, *arguments), reference)


def test_gradients_below_latents_are_whole_without_sequence_parallelism_and_partial_with_it() -> None:
    def partial(layout: ParallelLayout) -> set[str]:
        specs = layer_specs(MODELS["latents"], layout, 0)
        parts = [part for spec in specs for part in spec.parts if part.partial_grad and ".self_attn." in part.name]
        return {part.name.partition("self_attn.")[2] for part in parts}

    assert partial(ParallelLayout(tp=2)) == set()
    down = {f"{name}.{kind}" for name in ("q_a_proj", "kv_a_proj_with_mqa") for kind in ("weight", "bias")}
    norms = {"q_a_layernorm.weight", "kv_a_layernorm.weight"}
    assert partial(ParallelLayout(tp=2, **SP)) == {*down, *norms, "o_proj.bias"}


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        ({"tp": 2}, {("tp", "all_reduce", (2, 12, 26))}),
        ({"tp": 2, **SP}, {("tp", "all_gather", (2, 6, 26)), ("tp", "reduce_scatter", (2, 12, 26))}),
        ({"cp": 2}, {("cp", "all_gather", (2, 6, 14)), ("cp", "reduce_scatter", (2, 12, 14))}),
    ],
    ids=str,
)
def test_what_travels_into_the_heads_is_the_latents(degrees: dict[str, Any], expected: set[Sent]) -> None:
    """12 + 10 + 4 dimensions over tp, 10 + 4 over cp; hidden states have 32, keys and values 4 x (12 + 6)."""
    layout = ParallelLayout(**degrees)
    for found in run_ranks(2, _sent, MODELS["latents"], layout):
        assert found == expected


def test_decoding_keeps_the_latent_and_the_shared_key_alone() -> None:
    model = MODELS["latents"]
    built = build_stage(model, Mesh.single(), dtype=torch.float64)
    initialise(built.parameters, model, seed=7)
    ids = torch.randint(0, model.vocab_size, (2, 9), generator=torch.Generator().manual_seed(3))
    cache = KeyValueCache()
    with torch.no_grad():
        whole = built.module(None, Batch(ids), "logits")
        parts = [built.module(None, Batch(piece), "logits", cache) for piece in ids.split((4, 3, 1, 1), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)
    empty = torch.empty(2, 0, dtype=torch.float64)
    kept = cache.extend(3, empty.new_empty(2, 0, 10), empty.new_empty(2, 0, 4), None)
    assert [tuple(part.shape) for part in kept] == [(2, 9, 10), (2, 9, 4)]


def _sent(model: ModelConfig, layout: ParallelLayout) -> set[Sent]:
    """What the latent attention of a layer sends, forward and backward, other than the sum of its output."""
    mesh = Mesh.create(layout, torch.device("cpu"))
    built = build_stage(model, mesh, dtype=torch.float64)
    initialise(built.parameters, model, seed=7)
    found: set[Sent] = set()

    def spy(name: str) -> Any:
        plain = getattr(Axis, name)

        def spied(axis: Axis, tensor: torch.Tensor, *rest: Any, **named: Any) -> Any:
            if axis.size > 1 and tensor.dim() == 3 and tensor.shape[-1] < model.hidden_size:
                found.add((axis.name, name.removeprefix("start_"), tuple(tensor.shape)))
            return plain(axis, tensor, *rest, **named)

        return patch.object(Axis, name, spied)

    ids = torch.zeros(2, 12, dtype=torch.int64)
    with spy("all_reduce"), spy("start_all_gather"), spy("start_reduce_scatter"):
        built.module(None, Batch(ids, ids), "loss").backward()
    return found


@pytest.mark.parametrize("sizes", [(12, 6), (6, 12)])
@pytest.mark.parametrize("context", [None, "documents"])
def test_values_of_another_size_than_keys_keep_no_scores_of_long_rows(sizes: tuple[int, int], context: str | None):
    tokens = LONGEST + 6
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, tokens, 4, sizes[0], generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, tokens, 4, sizes[1], generator=generator, dtype=torch.float64)
    documents = None if context is None else torch.arange(tokens).expand(2, -1) // 130
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() if tensor.is_floating_point() else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = attend(q.requires_grad_(), k, v, documents)
    assert max(kept) < 2 * 4 * tokens * tokens
    mask = visible(0, tokens, 0, tokens, documents, q.device)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / sizes[0] ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    torch.testing.assert_close(found, torch.einsum("bhts,bshd->bthd", weights, v))
