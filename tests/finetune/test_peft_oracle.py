"""Adapters compute what peft's compute: loss and gradients of attached adapters, the norm of DoRA held constant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from converters.open import open_checkpoint
from finetune.adapters._lora_layers import attach
from tests.converters.formats.test_peft import exported
from tests.helpers.models import gated_model
from workbench.models.batch import Batch
from workbench.models.build import build_stage
from workbench.models.state import load
from workbench.parallel.live import shard_views
from workbench.parallel.mesh import Mesh
from workbench.spec.lora import LoraSpec, is_factor

PREFIX = "base_model.model."
TOLERANCE = 1e-6  # transformers norms and rotates in fp32, whatever its weights are
CASES = {
    "rank-stabilised": LoraSpec(r=3, rslora=True),
    "magnitudes": LoraSpec(r=3, dora=True, targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head")),
    "embedding and head": LoraSpec(r=4, targets=("embed_tokens", "lm_head", "k_proj"), rank_pattern={"k_proj": 2}),
}


def engine_gradients(
    native: Path, adapter: Path, lora: LoraSpec, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[float, dict[str, torch.Tensor]]:
    base, trained = open_checkpoint(native), open_checkpoint(adapter)
    built = build_stage(base.model, Mesh.single(), dtype=torch.float64, adapt=lambda stage: attach(stage, lora))
    factors = [p for p in built.parameters if is_factor(p.spec.parts[0].name)]
    load([p for p in built.parameters if p not in factors], base.source)
    load(factors, trained.source)
    loss = built.module(None, Batch(ids, labels))
    loss.backward()
    found = {s.name: view for p in factors for s, view in shard_views(p, p.require_grad())}
    return loss.item(), found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_peft(name: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora, generator = CASES[name], torch.Generator().manual_seed(1)
    _, base, folder = exported(tmp_path, gated_model(), lora)
    ids, labels = (torch.randint(0, gated_model().vocab_size, (2, 9), generator=generator) for _ in range(2))
    loss, gradients = engine_gradients(tmp_path / "native", tmp_path / "adapter", lora, ids, labels)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float64), folder, is_trainable=True
    ).double()
    theirs = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    theirs.backward()
    assert theirs.item() == pytest.approx(loss, rel=TOLERANCE)
    found = {
        key.removeprefix(PREFIX).removeprefix("model.").replace(".default", "").removesuffix(".weight"): p.grad
        for key, p in model.named_parameters()
        if p.requires_grad
    }
    assert set(found) == {key.removesuffix(".weight") for key in gradients}
    for key, ours in gradients.items():
        expected = found[key.removesuffix(".weight")]
        assert expected is not None and expected.abs().max() > 0
        torch.testing.assert_close(ours, expected, rtol=0, atol=10 * TOLERANCE * float(expected.abs().max()))
