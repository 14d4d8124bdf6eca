"""What a user should know of the data before any rank starts: how much is learned, and which rows are suspicious."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.packing import bins_of
from finetune.rows import places
from finetune.task import IGNORE, Example, Prepared


@dataclass(frozen=True)
class Survey:
    """facts: JSON values by name. told: the same in lines. warnings: what is suspicious, with rows and remedy."""

    facts: dict[str, Any]
    told: Sequence[str]
    warnings: Sequence[str]


def survey(prepared: Prepared, *, seed: int, packed_tokens: int | None = None) -> Survey:
    """What the encoded rows hold; packed_tokens as in `TaskObjective`."""
    parts = {"train": prepared.train, **prepared.held_out}
    facts: dict[str, Any] = {"rows": {name: len(examples) // prepared.group for name, examples in parts.items()}}
    told = [f"{name:<10} {prepared.read_as.get(name) or f'{len(examples)} rows'}" for name, examples in parts.items()]
    facts["row_tokens"] = _spread([len(example.input_ids) for example in prepared.train])
    told.append(f"tokens     {_shown(facts['row_tokens'])} a row of train")
    if names := prepared.identity.get("labels"):
        counts = Counter(label for example in prepared.train for label in _labels(example))
        total = counts.total() - counts[IGNORE]
        facts["labels"] = {str(name): counts[index] for index, name in enumerate(names)}
        told.append("labels     " + ", ".join(f"{name} {_share(n, total)}" for name, n in facts["labels"].items()))
    else:
        facts["supervised_tokens"] = _spread([example.num_labels for example in prepared.train])
        told.append(f"supervised {_shown(facts['supervised_tokens'])} tokens a row of train")
    if packed_tokens is not None:
        lengths = [len(example.input_ids) for example in prepared.train]
        facts["packed_rows"] = len(bins_of(lengths, packed_tokens, seed=seed))
        full = sum(lengths) / (facts["packed_rows"] * packed_tokens)
        told.append(f"packing    {len(lengths)} examples in {facts['packed_rows']} rows, {full:.0%} full")
    return Survey(facts, told, [*prepared.notes, *_repeated(prepared), *_unseen(facts.get("labels", {}))])


def _labels(example: Example) -> list[int]:
    """The labels of a row by number: of several, those that it has."""
    if "target" in example.values:
        return np.flatnonzero(example.values["target"]).tolist()
    found: list[int] = example.labels.ravel().tolist()
    return found


def _repeated(prepared: Prepared) -> list[str]:
    """Samples that stand twice in train, and samples to judge by that stand in train."""
    found = []
    seen: set[bytes] = set()
    again = []
    for first, key in _keyed(prepared.train, prepared.group):
        if key in seen:
            again.append(first)
        seen.add(key)
    if again:
        found.append(f"{len(again)} rows of train are there before, word for word ({places(again)}); remove them")
    for name, examples in prepared.held_out.items():
        keyed = _keyed(examples, prepared.group)
        if leaked := [first for first, key in keyed if key in seen]:
            found.append(
                f"{len(leaked)} of {len(keyed)} rows of {name} are rows of train ({places(leaked)}), so their score "
                "says little of other rows; remove them from one of the two"
            )
    return found


def _keyed(examples: Sequence[Example], group: int) -> list[tuple[Example, bytes]]:
    """The first row of each sample, and what tells the sample from others."""
    samples = [examples[at : at + group] for at in range(0, len(examples), group)]
    return [
        (sample[0], b"/".join(part.tobytes() for row in sample for part in (row.input_ids, row.labels)))
        for sample in samples
    ]


def _unseen(labels: dict[str, int]) -> list[str]:
    if missing := [name for name, count in labels.items() if not count]:
        return [f"no row of train has the label {', '.join(missing)}; add some, or take it out of task.labels"]
    return []


def _spread(counts: Sequence[int]) -> dict[str, float]:
    return {"min": min(counts), "median": float(np.median(counts)), "max": max(counts)}


def _shown(spread: dict[str, float]) -> str:
    return f"{spread['min']} to {spread['max']}, median {spread['median']:g},"


def _share(count: int, total: int) -> str:
    return f"{count} ({count / max(total, 1):.0%})"
