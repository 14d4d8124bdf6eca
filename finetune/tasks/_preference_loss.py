"""Losses that learn from which answers are preferred, each a sum over groups of two rows, and their judges.

The log-probability of an answer is minus the sum of its tokens' losses, which come from where the vocabulary is cut.
Legend: B rows, P pairs, S tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from finetune.task import IGNORE
from pretrain.engine import Criterion, Pipeline
from workbench.models.batch import Batch
from workbench.models.decoder import Output
from workbench.parallel.mesh import Mesh

FIRST, SECOND = slice(0, None, 2), slice(1, None, 2)
_OF_OTHERS = -1.0
"""The kind of a row whose answer belongs to another prompt; 1 and 0 are desirable and undesirable ones."""


def answer_logps(losses_BS: torch.Tensor) -> torch.Tensor:
    """The log-probability of each row's answer [B], in float64."""
    return -losses_BS.double().sum(dim=-1)


def answer_lengths(batch: Batch) -> torch.Tensor:
    """Tokens of each row's answer [B]; 0 of a row that fills up a batch."""
    assert batch.labels is not None
    return (batch.labels != IGNORE).sum(dim=-1)


@dataclass(frozen=True)
class Pairs:
    """What a loss sees of pairs of answers, the preferred ones first: [2, P] each.

    ratios: log-probabilities under the model, less those under the base. means: the mean of their tokens' own.
    """

    ratios_2P: torch.Tensor
    means_2P: torch.Tensor
    lengths_2P: torch.Tensor
    beta: float
    label_smoothing: float


def dpo(pairs: Pairs) -> torch.Tensor:
    """Eq. 7 of arXiv:2305.18290 [P]; with label smoothing, labels are wrong that often (Mitchell, "cDPO", eq. 3)."""
    margins_P = pairs.beta * (pairs.ratios_2P[0] - pairs.ratios_2P[1])
    wrong = pairs.label_smoothing
    return -(1 - wrong) * F.logsigmoid(margins_P) - wrong * F.logsigmoid(-margins_P)


def ipo(pairs: Pairs) -> torch.Tensor:
    """Eq. 17 of arXiv:2310.12036 [P], of log-ratios per token, as its authors have it in TRL (dpo_trainer.py)."""
    means_2P = pairs.ratios_2P / pairs.lengths_2P
    return (means_2P[0] - means_2P[1] - 1 / (2 * pairs.beta)).square()


def orpo(pairs: Pairs) -> torch.Tensor:
    """Eq. 6 of arXiv:2403.07691 [P], of mean log-probabilities (eq. 1): the preferred answer's loss and the odds."""
    # Certainty has infinite odds.
    odds_2P = pairs.means_2P - torch.log(-torch.expm1(pairs.means_2P.clamp(max=-1e-12)))
    return -pairs.means_2P[0] - pairs.beta * F.logsigmoid(odds_2P[0] - odds_2P[1])


PAIR_LOSSES = {"dpo": dpo, "ipo": ipo, "orpo": orpo}


class PairPreference(Criterion):
    """Criterion and judge of pairs: the rows of a batch are a preferred answer, the other one, and so on."""

    output: Output = "token_losses"

    def __init__(self, loss: str, *, beta: float, label_smoothing: float) -> None:
        self._loss, self._beta, self._label_smoothing = PAIR_LOSSES[loss], beta, label_smoothing
        self._averages = loss == "orpo"
        self.judge = self

    def loss(self, batch: Batch, output: torch.Tensor, mesh: Mesh) -> torch.Tensor:
        return self._loss(self._pairs(batch, output)).sum()

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        pairs, there_P = self._pairs(batch, output), answer_lengths(batch)[FIRST] > 0
        rewards_2P = self._beta * (pairs.means_2P if self._averages else pairs.ratios_2P)
        logps_2P = _in_pairs(answer_logps(output))
        right_P = (rewards_2P[0] > rewards_2P[1]).double()
        found = torch.stack((self._loss(pairs), *rewards_2P, right_P, *logps_2P, torch.ones_like(right_P)))
        return found.masked_fill(~there_P, 0.0).sum(dim=-1)

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        pairs = max(sums[-1], 1.0)
        loss, chosen, rejected, right, chosen_logp, rejected_logp = (value / pairs for value in sums[:-1])
        return {
            "loss": loss,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": right,
            "rewards/accuracies_error": math.sqrt(right * (1 - right) / pairs),
            "logps/chosen": chosen_logp,
            "logps/rejected": rejected_logp,
            "pairs": sums[-1],
        }

    def _pairs(self, batch: Batch, output: torch.Tensor) -> Pairs:
        logps_B, lengths_B = answer_logps(output), answer_lengths(batch).clamp(min=1)
        ratios_B = logps_B if self._averages else logps_B - batch.values["reference"]
        ratios_2P, means_2P, lengths_2P = map(_in_pairs, (ratios_B, logps_B / lengths_B, lengths_B))
        return Pairs(ratios_2P, means_2P, lengths_2P, self._beta, self._label_smoothing)


class Kto(Criterion):
    """Criterion and judge of single answers, desirable or not (arXiv:2402.01306, eq. 8).

    The rows of a batch are an answer to its own prompt, the same prompt with the answer to another, and so on. The
    second ones estimate how far the model is from the base; they are run forward before the step, and not learned from.
    """

    output: Output = "token_losses"

    def __init__(self, *, beta: float, desirable_weight: float, undesirable_weight: float) -> None:
        self._beta, self._weights = beta, (desirable_weight, undesirable_weight)
        self.judge = self

    def ready(self, pipeline: Pipeline, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The rows to learn from, each with the divergence from the base, which is that of all rows of the step."""
        mesh = pipeline.mesh
        sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)

        def take(batch: Batch, output: torch.Tensor) -> None:
            ratios_B = answer_logps(output) - batch.values["reference"]
            sums.add_(torch.stack((ratios_B.sum(), torch.ones_like(ratios_B).sum())))

        pipeline.evaluate([replace(batch.rows(SECOND), dropout=None) for batch in batches], self.output, take)
        # Ranks of tp and cp hold copies of the same sums.
        total = mesh.world.all_reduce(sums if mesh.tp.rank == mesh.cp.rank == 0 else torch.zeros_like(sums))
        kl = (total[0] / total[1]).clamp(min=0.0)
        matched = [batch.rows(FIRST) for batch in batches]
        return [replace(one, values={**one.values, "kl": kl.expand(len(one.input_ids))}) for one in matched]

    def loss(self, batch: Batch, output: torch.Tensor, mesh: Mesh) -> torch.Tensor:
        ratios_B = answer_logps(output) - batch.values["reference"]
        return self._losses(ratios_B, batch.values["desirable"] > 0, batch.values["kl"]).sum()

    def _losses(self, ratios_B: torch.Tensor, desirable_B: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
        gains_B = self._beta * (ratios_B - kl)
        values_B = torch.where(desirable_B, gains_B, -gains_B).sigmoid()
        weights_B = values_B.new_tensor(self._weights)[(~desirable_B).long()]
        return weights_B * (1 - values_B)

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        """[B, 2]: by how much each row is likelier than under the base, and its kind. Of a step, whose rows all have
        answers of their own, the divergence that it was learned with stands for those of others."""
        ratios_B, kinds_B = answer_logps(output) - batch.values["reference"], batch.values["desirable"].double()
        there_B = answer_lengths(batch) > 0
        if "kl" in batch.values:
            kl_B = batch.values["kl"]
            ratios_B, there_B = torch.cat((ratios_B, kl_B)), torch.cat((there_B, there_B))
            kinds_B = torch.cat((kinds_B, torch.full_like(kl_B, _OF_OTHERS)))
        else:
            kinds_B = kinds_B.clone()
            kinds_B[SECOND] = _OF_OTHERS
        return torch.stack((ratios_B, kinds_B), dim=-1)[there_B]

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        ratios, kinds = torch.tensor(sums, dtype=torch.float64).view(-1, 2).unbind(dim=-1)
        desirable, own = kinds > 0, kinds != _OF_OTHERS
        kl = _mean(ratios[~own]).clamp(min=0.0)
        chosen, rejected = (self._beta * float(_mean(ratios[own & kind])) for kind in (desirable, ~desirable))
        return {
            "loss": float(_mean(self._losses(ratios[own], desirable[own], kl))),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "kl": float(kl),
            "rows": float(own.sum()),
        }


class RewardJudge(Criterion):
    """Criterion and judge of pairs of rewards (Bradley and Terry, 1952): the better answer's less the other's, less the
    margin that it is better by (arXiv:2307.09288, eq. 2). The rows of a batch are the better one, the other, and so on.
    """

    output: Output = "logits"

    def __init__(self, center: float) -> None:
        self._center = center
        self.judge = self

    def loss(self, batch: Batch, output: torch.Tensor, mesh: Mesh) -> torch.Tensor:
        return self._losses(batch, output).sum()

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        assert batch.labels is not None
        chosen_P, rejected_P = output.double().view(-1, 2).unbind(dim=-1)
        rewards_2P = (chosen_P, rejected_P)
        right_P, one_P = (chosen_P > rejected_P).double(), torch.ones_like(chosen_P)
        found = torch.stack((self._losses(batch, output), right_P, *rewards_2P, one_P))
        return found.masked_fill(batch.labels[::2] == IGNORE, 0.0).sum(dim=-1)

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        pairs = max(sums[-1], 1.0)
        loss, accuracy, chosen, rejected = (value / pairs for value in sums[:-1])
        return {
            "loss": loss,
            "accuracy": accuracy,
            "accuracy_error": math.sqrt(accuracy * (1 - accuracy) / pairs),
            "margin": chosen - rejected,
            "mean_reward": (chosen + rejected) / 2,
            "pairs": sums[-1],
        }

    def _losses(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        chosen_P, rejected_P = output.double().view(-1, 2).unbind(dim=-1)
        losses_P = -F.logsigmoid(chosen_P - rejected_P - batch.values["margin"][::2])
        return losses_P + self._center * (chosen_P + rejected_P).square()


def _in_pairs(values_B: torch.Tensor) -> torch.Tensor:
    """[2, P]: the first rows of all pairs, then the second ones."""
    return torch.stack((values_B[FIRST], values_B[SECOND]))


def _mean(values: torch.Tensor) -> torch.Tensor:
    """The mean; 0 of nothing."""
    return values.sum() / max(len(values), 1)
