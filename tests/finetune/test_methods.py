"""What each method trains, at which rate, and what it refuses before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.adapter import require_fit
from finetune.adapters.freeze import ADAPTER as FREEZE
from finetune.adapters.freeze import FreezeTable
from finetune.adapters.full import ADAPTER as FULL
from finetune.adapters.full import FullTable
from finetune.adapters.lora import ADAPTER as LORA
from finetune.adapters.lora import LoraTable
from finetune.run import Finetuning
from tests.finetune.data import config_of
from tests.finetune.test_runs import arrays, base_of, folder, labels, train_at
from tests.helpers.models import answering_model, gated_model, sparse_model
from tests.helpers.ranks import run_ranks
from workbench.errors import ConfigError
from workbench.models.build import build_stage
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import LoraSpec, adapter_specs
from workbench.spec.model import ModelConfig
from workbench.spec.schema import parameter_specs

assert folder  # a fixture

DORA = {"kind": "lora", "r": 3, "dora": True, "dropout": 0.1}


def trained(table: FreezeTable, model: ModelConfig) -> set[str]:
    built = build_stage(model, Mesh.single(), adapt=lambda stage: FREEZE.attach(table, stage))
    return {part.name for p in built.parameters if p.trainable for part in p.spec.parts}


def test_freezing_leaves_the_upper_layers_and_the_head_to_be_trained() -> None:
    model = gated_model(num_hidden_layers=4)
    upper = trained(FreezeTable(first=3), model)
    assert upper == trained(FreezeTable(last=1), model)
    assert {name.split(".")[0] for name in upper} == {"layers", "norm", "lm_head"}
    assert {name.split(".")[1] for name in upper if name.startswith("layers.")} == {"3"}
    assert "embed_tokens.weight" in trained(FreezeTable(first=3, embeddings=False), model)
    assert "embed_tokens.weight" not in trained(FreezeTable(last=0), gated_model(tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [({}, "either first"), ({"first": 1, "last": 1}, "either first"), ({"first": 3}, "first=3, but the model has 2")],
)
def test_freezing_is_asked_for_in_one_way(values: dict[str, int], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        FREEZE.check(FreezeTable.model_validate(values), gated_model(num_hidden_layers=2))


def test_rates_fall_towards_the_embeddings_and_b_has_its_own() -> None:
    model = gated_model(num_hidden_layers=2)
    rates = {s.path: FULL.rate(FullTable(layer_decay=0.5), model, s) for s in parameter_specs(model, ParallelLayout())}
    assert rates["lm_head.weight"] == rates["norm.weight"] == 1.0
    assert [rates[f"layers.{n}.mlp.up_proj.weight"] for n in (1, 0)] == [0.5, 0.25]
    assert rates["embed_tokens.weight"] == 0.125
    table = LoraTable(b_lr_ratio=16, dora=True, targets=("q_proj",))
    specs = adapter_specs(model.with_labels(2), table.spec, ParallelLayout())
    found = {spec.path.rpartition(".")[2]: LORA.rate(table, model, spec) for spec in specs}
    assert found == {"lora_A": 1.0, "lora_B": 16.0, "magnitude": 1.0, "weight": 1.0}


@pytest.mark.parametrize(
    ("method", "tables", "model", "message"),
    [
        ({"targets": ["lm_haed"]}, {}, gated_model(), r"no projection 'lm_haed'; did you mean 'lm_head'\? \(it has "),
        ({"targets": ["layers.9.*"]}, {}, gated_model(), r"no projection 'layers.9.\*'"),
        ({"rank_pattern": {"q_porj": 2}}, {}, gated_model(), "rank_pattern: the model has no projection 'q_porj'; did"),
        ({"targets": ["embed_tokens"], "dora": True}, {}, gated_model(), "no magnitudes of 'embed_tokens'"),
        ({"targets": ["lm_head"]}, {"kernels": {"loss_chunk_tokens": 8}}, gated_model(), "loss_chunk_tokens=8 multip"),
        ({"dropout": 0.1}, {"kernels": {"compile": True}}, gated_model(), "dropout=0.1 and kernels.compile=true"),
        ({"dropout": 0.1}, {}, sparse_model(), "dropout=0.1 of experts"),
        ({"dropout": 0.1}, {}, answering_model(), "dropout=0.1 with an encoder"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    method: dict[str, Any], tables: dict[str, Any], model: ModelConfig, message: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path, {"kind": "sft", "train": "x"}, {"kind": "lora", **method}, **tables)
    with pytest.raises(ConfigError, match=message):
        require_fit(LORA, config.method, config, model)


def test_a_fresh_adapter_with_magnitudes_leaves_the_loss_as_it_was(folder: Path, tmp_path: Path) -> None:
    run = Finetuning(labels(folder, DORA, tmp_path / "a"), base_of(folder), Mesh.single(), dtype=torch.float64)
    plain = Finetuning(
        labels(folder, {"kind": "lora"}, tmp_path / "b"), base_of(folder), Mesh.single(), dtype=torch.float64
    )
    assert run.test() == pytest.approx(plain.test(), rel=1e-12)
    expected = sum(
        part.shape[0] * (part.shape[1] if len(part.shape) > 1 else 1)
        for spec in adapter_specs(run.model, LoraSpec(r=3, dora=True), ParallelLayout())
        for part in spec.parts
    )
    assert run.num_trained == expected


def test_an_adapter_with_magnitudes_goes_on_at_another_layout(folder: Path, tmp_path: Path) -> None:
    whole = labels(folder, DORA, tmp_path / "a", run={"steps": 4})
    expected = arrays(Finetuning(whole, base_of(folder), Mesh.single(), dtype=torch.float64).run().checkpoint)
    run_ranks(2, train_at, labels(folder, DORA, tmp_path / "b", run={"steps": 2}), folder, ParallelLayout(tp=2))
    rest = labels(folder, DORA, tmp_path / "b", run={"steps": 4})
    found = arrays(Finetuning(rest, base_of(folder), Mesh.single(), dtype=torch.float64).run().checkpoint)
    assert set(found) == set(expected) and any("lora_magnitude_vector" in name for name in found)
    for name, values in expected.items():
        assert abs(found[name] - values).max() <= 1e-9 * max(abs(values).max(), 1e-30)
