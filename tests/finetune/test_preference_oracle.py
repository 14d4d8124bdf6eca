"""Losses and gradients of preferences are those of the papers, written naively over transformers' log-probabilities.

The formulas are checked against TRL (trl/trainer/dpo_trainer.py, kto_trainer.py, reward_trainer.py and
trl/experimental/orpo/orpo_trainer.py at f2cd577). All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedModel

from converters.open import open_checkpoint
from finetune.objective import TaskEvaluation, TaskObjective, pad
from finetune.reference import base_logps
from finetune.task import IGNORE, Example, Prepared
from finetune.tasks._preference_loss import Kto, PairPreference, RewardJudge
from pretrain.engine import Pipeline, Share, schedule_named, to_batch
from pretrain.tally import Tally
from workbench.models.build import build_stage
from workbench.models.state import load
from workbench.parallel.mesh import Mesh

# Without rotations and root-mean-square norms, which transformers computes in float32.
SIZES: dict[str, Any] = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
BETA, SMOOTHING, DESIRABLE, UNDESIRABLE, MARGIN = 0.3, 0.1, 1.3, 0.7, 0.25


def model_of(kind: type[PreTrainedModel], folder: Path, seed: int, **more: Any) -> PreTrainedModel:
    """A model with random weights, kept in `folder`."""
    torch.manual_seed(seed)
    model = kind(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model.double().eval()


def pipeline_of(folder: Path, judge: Any = None) -> Pipeline:
    opened = open_checkpoint(folder)
    built = build_stage(opened.model, Mesh.single(), dtype=torch.float64)
    load(built.parameters, opened.source)
    return Pipeline(built, Mesh.single(), schedule_named("1f1b"), judge)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel, Path, PreTrainedModel]:
    root = tmp_path_factory.mktemp("oracle")
    pair = [(root / name, model_of(GPT2LMHeadModel, root / name, seed)) for seed, name in enumerate(("model", "base"))]
    return (*pair[0], *pair[1])


def answers() -> list[Example]:
    """Eight rows of uneven length: four pairs, or four answers each with a mismatched one."""
    generator = torch.Generator().manual_seed(8)
    rows = []
    for n in range(8):
        ids = torch.randint(0, SIZES["vocab_size"], (7 + n * 5 % 9,), generator=generator).numpy()
        labels = ids[1:].copy()
        labels[: 2 + n % 3] = IGNORE
        rows.append(Example(ids[:-1], labels, values={"desirable": float(n // 2 % 3 > 0)}))
    return rows


def naive_logps(model: PreTrainedModel, rows: Sequence[Example]) -> torch.Tensor:
    """One row at a time, unpadded, from all logits."""
    found = []
    for row in rows:
        logits = model(torch.from_numpy(row.input_ids)[None]).logits[0]
        labels = torch.from_numpy(row.labels)
        taken = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        found.append((taken * (labels != IGNORE)).sum())
    return torch.stack(found)


def dpo(logps: torch.Tensor, base: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    gain = torch.sigmoid(BETA * ((logps - base)[0::2] - (logps - base)[1::2]))
    return -((1 - SMOOTHING) * gain.log() + SMOOTHING * (1 - gain).log()).mean()


def ipo(logps: torch.Tensor, base: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    means = (logps - base) / lengths
    return ((means[0::2] - means[1::2] - 1 / (2 * BETA)) ** 2).mean()


def orpo(logps: torch.Tensor, base: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    p = (logps / lengths).exp()
    odds = p / (1 - p)
    return (-p[0::2].log() - BETA * torch.sigmoid((odds[0::2] / odds[1::2]).log()).log()).mean()


def kto(logps: torch.Tensor, base: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    ratios = logps - base
    kl = ratios[1::2].mean().detach().clamp(min=0)
    assert kl > 0
    losses = []
    for row, ratio in zip(answers()[0::2], ratios[0::2], strict=True):
        if row.values["desirable"]:
            losses.append(DESIRABLE * (1 - torch.sigmoid(BETA * (ratio - kl))))
        else:
            losses.append(UNDESIRABLE * (1 - torch.sigmoid(BETA * (kl - ratio))))
    return torch.stack(losses).mean()


JUDGES = {
    "dpo": (dpo, PairPreference("dpo", beta=BETA, label_smoothing=SMOOTHING)),
    "ipo": (ipo, PairPreference("ipo", beta=BETA, label_smoothing=0.0)),
    "orpo": (orpo, PairPreference("orpo", beta=BETA, label_smoothing=0.0)),
    "kto": (kto, Kto(beta=BETA, desirable_weight=DESIRABLE, undesirable_weight=UNDESIRABLE)),
}


def with_base(rows: list[Example], judge: Any, folder: Path) -> list[Example]:
    prepared = Prepared(rows, {}, judge, num_labels=0, pad_id=0, group=2)
    values = base_logps(pipeline_of(folder), TaskEvaluation("all", rows, prepared), len(rows), micro_size=3)
    return [replace(r, values={**r.values, "reference": v}) for r, v in zip(rows, values.tolist(), strict=True)]


def learn(pipeline: Pipeline, rows: list[Example], judge: Any, micro_size: int) -> float:
    """The mean loss of all rows; leaves its gradient."""
    prepared = Prepared(rows, {}, judge, num_labels=0, pad_id=0, criterion=judge, group=2)
    objective = TaskObjective(prepared, seed=1)
    share = Share(micro_size, 0, 1)
    some = objective.train_rows(share, step=0, first_sample=0, global_size=len(rows) // 2)
    count = sum(one.num_labels for one in some)
    assert count == len(rows) // 2
    batches = [to_batch(one, torch.device("cpu")) for one in some]
    return float(pipeline.train(batches, torch.tensor(1 / count, dtype=torch.float64))) / count


def assert_gradients(pipeline: Pipeline, model: PreTrainedModel) -> None:
    theirs = {
        "embed_tokens.weight": model.transformer.wte.weight,
        "layers.0.input_layernorm.weight": model.transformer.h[0].ln_1.weight,
        "norm.weight": model.transformer.ln_f.weight,
    }
    ours = {one.path: one.require_grad() for one in pipeline.built.parameters}
    for name, parameter in theirs.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
        found = ours[name][: len(parameter)]
        torch.testing.assert_close(found, parameter.grad, rtol=1e-10, atol=1e-10 * float(parameter.grad.abs().max()))


@pytest.mark.parametrize("micro_size", [1, 4])
@pytest.mark.parametrize("name", JUDGES)
def test_loss_and_gradient_are_those_of_the_paper(name: str, micro_size: int, models: Any) -> None:
    folder, model, base_folder, base = models
    formula, judge = JUDGES[name]
    rows = with_base(answers(), judge, base_folder)
    pipeline = pipeline_of(folder, judge)
    found = learn(pipeline, rows, judge, micro_size)
    with torch.no_grad():
        base_values = naive_logps(base, rows)
    assert [row.values["reference"] for row in rows] == pytest.approx(base_values.tolist(), rel=1e-10)
    lengths = torch.tensor([row.num_labels for row in rows])
    expected = formula(naive_logps(model, rows), base_values, lengths)
    model.zero_grad()
    expected.backward()
    assert found == pytest.approx(expected.item(), rel=1e-10)
    assert_gradients(pipeline, model)


@pytest.mark.parametrize("center", [0.0, 0.2])
def test_rewards_are_learned_as_bradley_and_terry_have_it(center: float, tmp_path: Path) -> None:
    model = model_of(GPT2ForSequenceClassification, tmp_path, 2, num_labels=1, pad_token_id=0)
    label, judge = np.array(0, dtype=np.int64), RewardJudge(center)
    # Without token 0, which transformers takes for padding.
    ids = [np.maximum(row.input_ids, 1) for row in answers()]
    rows = [Example(one, label, values={"margin": MARGIN * (n // 2)}) for n, one in enumerate(ids)]
    pipeline = pipeline_of(tmp_path, judge)
    found = learn(pipeline, rows, judge, 2)
    rewards = torch.stack([model(torch.from_numpy(row.input_ids)[None]).logits[0, 0] for row in rows])
    margins = torch.tensor([row.values["margin"] for row in rows[::2]], dtype=torch.float64)
    losses = -F.logsigmoid(rewards[0::2] - rewards[1::2] - margins) + center * (rewards[0::2] + rewards[1::2]) ** 2
    losses.mean().backward()
    assert found == pytest.approx(losses.mean().item(), rel=1e-10)
    assert_gradients(pipeline, model)


def test_the_metrics_are_those_of_the_naive_rewards(models: Any) -> None:
    folder, model, base_folder, base = models
    with torch.no_grad():
        ratios = (naive_logps(model, answers()) - naive_logps(base, answers())).numpy()
    chosen, rejected = BETA * ratios[0::2], BETA * ratios[1::2]
    found = judged("dpo", folder, base_folder)
    assert found["rewards/chosen"] == pytest.approx(chosen.mean(), rel=1e-10)
    assert found["rewards/rejected"] == pytest.approx(rejected.mean(), rel=1e-10)
    assert found["rewards/margins"] == pytest.approx((chosen - rejected).mean(), rel=1e-10)
    assert (found["rewards/accuracies"], found["pairs"]) == ((chosen > rejected).mean(), 4)
    found = judged("kto", folder, base_folder)
    desirable = np.array([row.values["desirable"] for row in answers()[::2]]) > 0
    assert found["rewards/chosen"] == pytest.approx(chosen[desirable].mean(), rel=1e-10)
    assert found["rewards/rejected"] == pytest.approx(chosen[~desirable].mean(), rel=1e-10)
    assert found["kl"] == pytest.approx(max(ratios[1::2].mean(), 0.0), rel=1e-10)
    with torch.no_grad():
        expected = kto(naive_logps(model, answers()), naive_logps(base, answers()), torch.ones(8))
    assert (found["loss"], found["rows"]) == (pytest.approx(expected.item(), rel=1e-10), 4)


def judged(name: str, folder: Path, base_folder: Path) -> dict[str, float]:
    """The metrics of all rows, three at a time, so that the last batch is filled up."""
    judge = JUDGES[name][1]
    rows = with_base(answers(), judge, base_folder)
    evaluation = TaskEvaluation("all", rows, Prepared(rows, {}, judge, num_labels=0, pad_id=0, group=2))
    tally = Tally()
    for some in evaluation.batches(Share(3, 0, 1), num_microbatches=1, max_samples=None):
        batches = [to_batch(one, torch.device("cpu")) for one in some]
        pipeline_of(folder).evaluate(batches, "token_losses", lambda b, out: tally.put(evaluation.tally(b, out)))
    return evaluation.metrics(tally.total(Mesh.single()))


def test_an_answer_that_is_certain_costs_no_infinite_loss() -> None:
    rows = [Example(np.array([1, 2]), np.array([2, 3])) for _ in range(2)]
    batch = to_batch(pad(rows, range(2), 0), torch.device("cpu"))
    losses = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    loss = PairPreference("orpo", beta=BETA, label_smoothing=0.0).loss(batch, losses, Mesh.single())
    loss.backward()
    assert losses.grad is not None and math.isfinite(loss.item()) and losses.grad.isfinite().all()
