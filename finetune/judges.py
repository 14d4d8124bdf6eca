"""Metrics of tasks (`Judge`), each from sums, or from rows, that do not depend on how ranks divided the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from finetune.losses import choices, widened
from finetune.spans import spans
from finetune.task import IGNORE
from workbench.models.batch import Batch
from workbench.models.decoder import Output
from workbench.models.pooling import Pooling


class TextLoss:
    """Mean loss of the tokens that count."""

    output: Output = "loss"

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        assert batch.labels is not None
        return _vector(output, (batch.labels != IGNORE).sum())

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        loss = sums[0] / max(sums[1], 1.0)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": sums[1]}


class AnswerJudge(TextLoss):
    """Also the share of tokens, and of whole answers, that the model would choose itself.

    When every token of an answer is the likeliest after those before it, then greedy decoding gives just this answer,
    and its end; so exact match costs no decoding.
    """

    output: Output = "logits"

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        assert batch.labels is not None
        real = batch.labels != IGNORE
        loss = F.cross_entropy(
            widened(output).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        right = (output.argmax(dim=-1) == batch.labels) & real
        answers = real.any(dim=1)
        whole = answers & (right | ~real).all(dim=1)
        return _vector(loss, real.sum(), right.sum(), whole.sum(), answers.sum())

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        loss, tokens, right, whole, answers = sums
        return {
            **super().metrics([loss, tokens]),
            "token_accuracy": right / max(tokens, 1.0),
            **_share("exact_match", whole, max(answers, 1.0)),
            "answers": answers,
        }


class LabelJudge:
    """Accuracy with its standard error, beside that of always saying the commonest label of the training rows; F1 of
    the second of two labels, and its mean over all; Matthews' correlation."""

    output: Output = "logits"

    def __init__(self, common: int) -> None:
        self._common = common

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        assert batch.labels is not None
        loss = F.cross_entropy(widened(output), batch.labels, ignore_index=IGNORE, reduction="sum")
        common = (batch.labels == self._common).sum()
        return torch.cat([_vector(loss, common), _counts(output.argmax(dim=-1), batch.labels, output.shape[-1])])

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        right, said, true = _thirds(sums[2:])
        rows = max(float(true.sum()), 1.0)
        scores = _f1(right, said, true)
        return {
            "loss": sums[0] / rows,
            **_share("accuracy", float(right.sum()), rows),
            **({"f1": float(scores[1])} if len(scores) == 2 else {}),
            "f1_macro": _mean_of_seen(scores, said, true),
            "mcc": matthews(right, said, true),
            **_share("majority", sums[1], rows),
            "rows": float(true.sum()),
        }


class MultiLabelJudge:
    """How often all labels of a row are right, beside that of always saying the commonest set; F1 over labels."""

    output: Output = "logits"

    def __init__(self, common: Sequence[float]) -> None:
        self._common = common

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        assert batch.labels is not None
        real_B = batch.labels != IGNORE
        logits_BN, true_BN = widened(output)[real_B], batch.values["target"][real_B] > 0
        said_BN = logits_BN > 0
        loss = F.binary_cross_entropy_with_logits(logits_BN, true_BN.to(logits_BN.dtype), reduction="sum")
        common_N = torch.tensor(self._common, device=output.device) > 0
        exact, same = (said_BN == true_BN).all(dim=-1).sum(), (true_BN == common_N).all(dim=-1).sum()
        counts = [(said_BN & true_BN).sum(dim=0), said_BN.sum(dim=0), true_BN.sum(dim=0)]
        head = _vector(loss / logits_BN.shape[-1], exact, same, real_B.sum())
        return torch.cat([head, *(count.double() for count in counts)])

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        rows = max(sums[3], 1.0)
        right, said, true = _thirds(sums[4:])
        return {
            "loss": sums[0] / rows,
            **_share("accuracy", sums[1], rows),
            "f1_micro": float(_f1(right.sum(), said.sum(), true.sum())),
            "f1_macro": _mean_of_seen(_f1(right, said, true), said, true),
            **_share("majority", sums[2], rows),
            "rows": sums[3],
        }


class TokenJudge:
    """Accuracy of tokens; F1 of whole entities where labels are B-, I- and O, else its mean over labels.

    `names`: the labels in order. An entity is right when its kind, its first and its last token are.
    """

    output: Output = "logits"

    def __init__(self, names: Sequence[str], *, common: int, entities: bool) -> None:
        self._names, self._common, self._entities = names, common, entities

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        assert batch.labels is not None
        labels, said = batch.labels, output.argmax(dim=-1)
        loss = F.cross_entropy(widened(output).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        head = _vector(loss, (labels == self._common).sum(), *self._entity_counts(said, labels))
        return torch.cat([head, _counts(said, labels, output.shape[-1])])

    def _entity_counts(self, said_BS: torch.Tensor, labels_BS: torch.Tensor) -> tuple[int, int, int]:
        """Entities that are right, that are said, and that there are."""
        if not self._entities:
            return 0, 0, 0
        right = said_count = true_count = 0
        for said_S, labels_S in zip(said_BS.cpu(), labels_BS.cpu(), strict=True):
            here = labels_S != IGNORE
            said, true = ({*spans([self._names[i] for i in row[here].tolist()])} for row in (said_S, labels_S))
            right, said_count, true_count = right + len(said & true), said_count + len(said), true_count + len(true)
        return right, said_count, true_count

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        right, said, true = _thirds(sums[5:])
        tokens = max(float(true.sum()), 1.0)
        found = {"loss": sums[0] / tokens, **_share("accuracy", float(right.sum()), tokens)}
        if self._entities:
            hits, said_count, true_count = sums[2:5]
            found |= {"precision": hits / max(said_count, 1.0), "recall": hits / max(true_count, 1.0)}
            found |= {"f1": float(_f1(*np.array(sums[2:5]))), "entities": true_count}
        else:
            found |= {"f1_macro": _mean_of_seen(_f1(right, said, true), said, true)}
        return {**found, **_share("majority", sums[1], tokens), "tokens": float(true.sum())}


class NumberJudge:
    """Mean squared error, beside that of always saying the training rows' mean; correlations of values and of ranks,
    with their standard errors (1 - r^2) / sqrt(n - 1)."""

    output: Output = "logits"

    def __init__(self, mean: float) -> None:
        self._mean = mean

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        assert batch.labels is not None
        return torch.cat([output.double(), batch.values["target"].double()], dim=-1)[batch.labels != IGNORE]

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        said, true = np.reshape(sums, (-1, 2)).T
        rows = max(len(true), 1)
        found = {"mse": float(np.square(said - true).sum() / rows)}
        for name, r in (("pearson", correlation(said, true)), ("spearman", correlation(ranks(said), ranks(true)))):
            found |= {name: r, f"{name}_error": (1 - r * r) / math.sqrt(max(rows - 1, 1))}
        return {**found, "mse_of_mean": float(np.square(true - self._mean).sum() / rows), "rows": float(len(true))}


class ChoiceJudge:
    """How often the right choice has the highest score, beside blind guessing."""

    output: Output = "logits"

    def __init__(self, group: int) -> None:
        self._group = group

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        scores_SG, labels_S = choices(output, batch, self._group)
        loss = F.cross_entropy(scores_SG, labels_S, reduction="sum", ignore_index=IGNORE)
        real_S = labels_S != IGNORE
        chance_S = 1 / batch.values["target"].view(-1, self._group).sum(dim=-1).clamp(min=1)
        right = (scores_SG.argmax(dim=-1) == labels_S).sum()
        return _vector(loss, right, chance_S[real_S].sum(), real_S.sum())

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        loss, right, chance, rows = sums
        count = max(rows, 1.0)
        return {"loss": loss / count, **_share("accuracy", right, count), "chance": chance / count, "rows": rows}


class VectorJudge:
    """How often, among all candidates of the held-out rows, the one nearest to a query is its own; and the mean of one
    over its place (MRR)."""

    def __init__(self, pooling: Pooling, group: int) -> None:
        self.output: Output = pooling
        self._group = group

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        assert batch.labels is not None
        vectors = F.normalize(output.double(), dim=-1).view(-1, self._group * output.shape[-1])
        width = vectors.new_full((len(vectors), 1), vectors.shape[-1])
        return torch.cat([width, vectors], dim=-1)[batch.labels.view(-1, self._group)[:, 0] != IGNORE]

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        if not len(sums):
            return {"recall_at_1": 0.0, "recall_at_1_error": 0.0, "mrr": 0.0, "rows": 0.0}
        records = np.reshape(sums, (-1, int(sums[0]) + 1))[:, 1:].reshape(-1, self._group, int(sums[0]) // self._group)
        scores = records[:, 0] @ records[:, 1:].reshape(-1, records.shape[-1]).T
        own = scores[np.arange(len(records)), np.arange(len(records)) * (self._group - 1)]
        # Among equals, whatever the rounding, one is drawn: vectors that are all alike are no better than guessing.
        nearer = (scores > own[:, None] + 1e-9).sum(axis=1)
        equal = (np.abs(scores - own[:, None]) <= 1e-9).sum(axis=1)
        found = _share("recall_at_1", float(((nearer == 0) / equal).sum()), float(len(records)))
        return {**found, "mrr": float((1 / (nearer + (equal + 1) / 2)).mean()), "rows": float(len(records))}


def matthews(right: np.ndarray, said: np.ndarray, true: np.ndarray) -> float:
    """Matthews' correlation for any number of classes, from how often each was right, said and true (Gorodkin 2004)."""
    total = true.sum()
    spread = (total**2 - (said**2).sum()) * (total**2 - (true**2).sum())
    return float((right.sum() * total - (said * true).sum()) / math.sqrt(spread)) if spread > 0 else 0.0


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 where one side does not vary."""
    if len(x) < 2:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    spread = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / spread if spread > 0 else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """The place of each value among all; equal ones share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    found: np.ndarray = (counts.cumsum() - (counts - 1) / 2)[inverse]
    return found


def _counts(said: torch.Tensor, labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """How often each label was right, then said, then true, among those that count."""
    real = labels != IGNORE
    said, labels = said[real], labels[real]
    kinds = (labels[said == labels], said, labels)
    return torch.cat([torch.bincount(kind, minlength=num_labels).double() for kind in kinds])


def _vector(*values: torch.Tensor | int) -> torch.Tensor:
    device = next((value.device for value in values if isinstance(value, torch.Tensor)), None)
    return torch.stack([torch.as_tensor(value, device=device).double() for value in values])


def _thirds(sums: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    right, said, true = np.reshape(sums, (3, -1))
    return right, said, true


def _f1(right: np.ndarray, said: np.ndarray, true: np.ndarray) -> np.ndarray:
    found: np.ndarray = 2 * right / np.maximum(said + true, 1.0)
    return found


def _mean_of_seen(scores: np.ndarray, said: np.ndarray, true: np.ndarray) -> float:
    seen = (said + true) > 0
    return float(scores[seen].mean()) if seen.any() else 0.0


def _share(name: str, count: float, of: float) -> dict[str, float]:
    """A share and its standard error."""
    share = count / of
    return {name: share, f"{name}_error": math.sqrt(share * (1 - share) / of)}
