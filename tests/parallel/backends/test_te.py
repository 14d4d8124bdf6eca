"""The wiring of Transformer Engine, against a stand-in with its interface: what it computes is for a GPU to show."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers import fake_transformer_engine
from tests.helpers.models import biased_model, gated_model, post_norm_model
from tests.helpers.ranks import run_ranks
from workbench.errors import LaunchError
from workbench.models.batch import Batch
from workbench.models.build import BuiltStage, build_stage, initialise
from workbench.models.state import stored_boxes
from workbench.parallel.backends import choose_backend
from workbench.parallel.gradients import complete_gradients
from workbench.parallel.mesh import Mesh
from workbench.spec.execution import StageOptions, te_faults
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
MODELS = {
    "gated": gated_model(**SIZES),
    "biased": biased_model(**SIZES, num_key_value_heads=2),
    "post": post_norm_model(**SIZES, sliding_window=None),
    "normed": gated_model(**SIZES, norm_placement="sandwich", norm_unit_offset=True, qk_norm="head"),
}
LINEARS = 4 * 2  # of both layers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"tp": 2, "sequence_parallel": True}], ids=str)
def test_loss_and_gradients_are_those_of_torch(name: str, layout: dict[str, Any]) -> None:
    for found, expected in run_ranks(layout.get("tp", 1), _both, MODELS[name], layout):
        assert found.keys() == expected.keys()
        for path, values in expected.items():
            torch.testing.assert_close(found[path], values, rtol=1e-10, atol=1e-10, msg=path)


def test_names_and_boxes_are_those_of_torch() -> None:
    with fake_transformer_engine.installed():
        built = _built(MODELS["gated"], backend="te")
        other = _built(MODELS["gated"])
        assert [box.tensor for box in stored_boxes(built.parameters)] == [
            box.tensor for box in stored_boxes(other.parameters)
        ]
        assert built.module.state_dict().keys() == other.module.state_dict().keys()


def test_every_layer_is_executed_by_it_and_holds_no_weight_of_its_own() -> None:
    with fake_transformer_engine.installed() as seen:
        built = _built(MODELS["gated"], backend="te")
        _step(built)
    assert len(seen.linears) == LINEARS and seen.attended == 2
    made = [type(module).__name__ for module in seen.made]
    assert (made.count("Linear"), made.count("RMSNorm"), made.count("DotProductAttention")) == (LINEARS, 5, 2)
    assert all(module.weight.is_meta for module in seen.made if type(module).__name__ == "Linear")


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("delayed", "DelayedScaling"), ("current", "Float8CurrentScaling"), ("blockwise", "Float8BlockScaling")],
)
def test_a_recipe_holds_in_the_layers_and_ends_once_a_forward(recipe: str, name: str) -> None:
    with fake_transformer_engine.installed() as seen:
        built = _built(MODELS["gated"], backend="te", linear=f"te:{recipe}")
        seen.outermost_exits = 0
        _step(built)
        assert [one for one, _ in seen.linears] == [name] * LINEARS
        assert all(depth == 2 for _, depth in seen.linears) and seen.outermost_exits == 1


@pytest.mark.parametrize("recipe", ["current", "blockwise"])
def test_a_layer_that_is_computed_again_is_computed_in_the_same_recipe(recipe: str) -> None:
    with fake_transformer_engine.installed() as seen:
        built = _built(MODELS["gated"], backend="te", linear=f"te:{recipe}", recompute="full")
        expected = _step(_built(MODELS["gated"]))
        found = _step(built)
        assert len(seen.linears) == 2 * LINEARS and len({name for name, _ in seen.linears}) == 1
    for path, values in expected.items():
        torch.testing.assert_close(found[path], values, rtol=1e-10, atol=1e-10, msg=path)


def test_a_recipe_that_the_gpu_lacks_is_refused_with_its_reason() -> None:
    with fake_transformer_engine.installed():
        with pytest.raises(LaunchError, match=r"te:mxfp8' does not run on this GPU: Device compute capability 10.0"):
            _built(MODELS["gated"], backend="te", linear="te:mxfp8")


def test_asked_for_in_vain_it_names_the_remedy() -> None:
    with pytest.raises(LaunchError, match=r"runs on NVIDIA GPUs, and this run is on a CPU.*backend = 'torch'"):
        choose_backend("te", "cpu")
    with pytest.raises(LaunchError, match=r"not installed; pip install 'workbench\[te\]'"):
        choose_backend("te", "cuda")


def test_auto_takes_torch_where_it_must_and_says_why() -> None:
    assert choose_backend("torch", "cuda").backend == "torch"
    choice = choose_backend("auto", "cuda")
    assert choice.backend == "torch" and "not installed" in choice.reason
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workbench.parallel.backends.find_spec", lambda name: object())
        assert choose_backend("auto", "cuda").backend == "te"
        choice = choose_backend("auto", "cuda", ["cp=2 is not for it"])
        assert (choice.backend, choice.reason) == ("torch", "cp=2 is not for it")


@pytest.mark.parametrize(
    ("options", "model", "layout", "message"),
    [
        ({"split_backward": True}, {}, {}, "computes both gradients of a layer at once"),
        ({}, {"attention_dropout": 0.1}, {}, "model.attention_dropout=0.1"),
        ({}, {}, {"cp": 2}, "cp=2"),
        ({"linear": "te:delayed", "recompute": "full"}, {}, {}, "would count its largest values twice"),
        ({"linear": "te:current", "backend": "torch"}, {}, {}, "needs kernels.backend = 'te', not 'torch'"),
    ],
)
def test_what_it_cannot_execute_is_refused(
    options: dict[str, Any], model: dict[str, Any], layout: dict[str, int], message: str
) -> None:
    (fault,) = te_faults(
        StageOptions(**{"backend": "te", **options}), gated_model(**SIZES, **model), ParallelLayout(**layout)
    )
    assert message in fault


def _both(model: ModelConfig, layout: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    with fake_transformer_engine.installed():
        return _step(_built(model, layout, backend="te")), _step(_built(model, layout))


def _built(model: ModelConfig, layout: dict[str, Any] | None = None, **options: Any) -> BuiltStage:
    mesh = Mesh.create(ParallelLayout(**layout or {}), torch.device("cpu"))
    built = build_stage(model, mesh, dtype=torch.float64, options=StageOptions(**options))
    initialise(built.parameters, model, seed=6)
    return built


def _step(built: BuiltStage) -> dict[str, torch.Tensor]:
    ids = torch.arange(32).view(2, 16)
    loss = built.module(None, Batch(ids, ids.flip(1)))
    loss.backward()
    complete_gradients(built.parameters, built.module.mesh)
    return {"loss": loss.detach(), **{one.path: one.require_grad().clone() for one in built.parameters}}
