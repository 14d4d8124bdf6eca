"""Several examples in a row, in which they do not see each other: less padding, the same loss. No torch.

Which share a row is a function of their lengths and the seed: not of ranks, batch size or steps.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from finetune.task import Example, Prepared
from pretrain.data.permutation import Permutation
from workbench.spec.model import ModelConfig


def packing_faults(model: ModelConfig, row_tokens: int) -> list[str]:
    """Why examples of the model cannot share rows of `row_tokens` tokens, if they cannot."""
    scaling = model.rope_scaling
    change = None if scaling is None else scaling.change_length(model.max_position_embeddings)
    if scaling is None or change is None or row_tokens <= change:
        return []
    return [
        f"batch.packing=true and batch.seq_len={row_tokens}: model.rope_scaling '{scaling.kind}' turns positions "
        f"otherwise in sequences of more than {change} tokens, so a long example changes the short ones of its row; "
        f"lower seq_len to {change} or set packing = false"
    ]


def packed(prepared: Prepared, row_tokens: int, *, seed: int) -> Prepared:
    """The data with its training examples in fewer rows of at most `row_tokens` tokens, each a document of its row."""
    bins = bins_of([len(example.input_ids) for example in prepared.train], row_tokens, seed=seed)
    rows = [joined([prepared.train[index] for index in one]) for one in bins]
    return replace(prepared, train=rows, identity={**prepared.identity, "packed_tokens": row_tokens})


def joined(examples: Sequence[Example]) -> Example:
    """The examples as one row."""
    return Example(
        np.concatenate([example.input_ids for example in examples]),
        np.concatenate([example.labels for example in examples]),
        documents=np.repeat(np.arange(len(examples)), [len(example.input_ids) for example in examples]),
    )


def bins_of(lengths: Sequence[int], capacity: int, *, seed: int) -> list[list[int]]:
    """Every index of `lengths` in one bin, the lengths of a bin adding up to at most `capacity`, which none exceeds.

    As few bins as the longest first, each into the fullest bin that has room, need (at most 11/9 of the least and one
    more; Johnson, "Near-Optimal Bin Packing Algorithms", 1973); and where they fit in equally many, equally full ones.
    """
    shuffled = Permutation(len(lengths), key=f"seed {seed}/bins")
    order = sorted(map(shuffled, range(len(lengths))), key=lambda index: -lengths[index])
    tight = _fullest_first(order, lengths, capacity)
    return _emptiest_first(order, lengths, capacity, len(tight)) or tight


def _fullest_first(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    rooms: list[int] = []  # ascending, each once
    with_room: dict[int, list[int]] = {}
    for index in order:
        length = lengths[index]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            chosen, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del rooms[at], with_room[room]
        bins[chosen].append(index)
        if room > length:
            if room - length not in with_room:
                insort(rooms, room - length)
            with_room.setdefault(room - length, []).append(chosen)
    return bins


def _emptiest_first(order: Sequence[int], lengths: Sequence[int], capacity: int, count: int) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, number) for number in range(count)]
    for index in order:
        tokens, chosen = filled[0]
        if tokens + lengths[index] > capacity:
            return None
        bins[chosen].append(index)
        heapq.heapreplace(filled, (tokens + lengths[index], chosen))
    return bins
