"""What Megatron's distributed optimizer holds of a weight, found by its contents in buckets that name nobody.

A weight is its 32-bit master, rounded. So where numbers round to the rows of a weight, one after another from where a
piece of a bucket begins, Adam's state of these rows lies: neither the order of modules nor the rule by which buckets
are filled, which the format's reader follows, is repeated here.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

import torch

from converters.independent._dcp_chunks import DcpTensors
from converters.independent._megatron_model import MASTER

Place = tuple[str, int]
"""A bucket of masters and an element of it."""


class NotTold(Exception):
    """Several weights have these contents, and Adam's state of them differs, as with norms that never moved."""


class Buckets:
    """The buckets of a folder. cuts: into how many columns the ranks may have cut a weight."""

    def __init__(self, found: DcpTensors, cuts: Collection[int]) -> None:
        self._found, self._cuts = found, cuts

    def state(self, kind: str, weight: torch.Tensor) -> torch.Tensor | None:
        """`kind` of a weight; None when no bucket holds it. NotTold when several do, and not the same."""
        for cut in self._cuts:
            columns = weight.reshape(len(weight), -1).chunk(cut, 1)
            found = [part for one in columns if (part := self._of_columns(kind, one)) is not None]
            if len(found) == len(columns):
                return torch.cat(found, 1).reshape(weight.shape)
        return None

    @cached_property
    def _begins(self) -> tuple[list[Place], torch.Tensor]:
        """Where pieces begin, as parameters do, and the first number of each."""
        masters = [name for name in self._found.names if ".bucket_idx_" in name and name.endswith(f".{MASTER}")]
        places = [(name, start) for name in masters for start in self._found.begins(name)]
        return places, torch.cat([self._found.run(name, start, start + 1) for name, start in places])

    def _of_columns(self, kind: str, rows: torch.Tensor) -> torch.Tensor | None:
        """`kind` of rows of which each rank has some, and one rank all elements of each."""
        (places, firsts), width, done = self._begins, rows.shape[1], 0
        found: list[torch.Tensor] = []
        ends: list[Place] = []
        while done < len(rows):
            begins = (firsts.to(rows.dtype) == rows[done, 0]).nonzero().flatten().tolist()
            lengths = {place: self._length(place, rows[done:]) for place in [places[i] for i in begins] + ends}
            if not (longest := max(lengths.values(), default=0)):
                return None
            best = [place for place, length in lengths.items() if length == longest]
            runs = [self._run(name, kind, start, longest * width) for name, start in best]
            if not all(run.equal(runs[0]) for run in runs):
                raise NotTold
            found.append(runs[0].view(longest, width))
            ends += [(name, start + longest * width) for name, start in best]
            done += longest
        return torch.cat(found)

    def _length(self, place: Place, rows: torch.Tensor) -> int:
        """How many of the rows lie at a place, one after another."""
        (name, start), done, more, width = place, 0, 1, rows.shape[1]
        while done < len(rows):
            wanted = rows[done : done + more]
            found = self._run(name, MASTER, start + done * width, wanted.numel()).view(wanted.shape)
            equal = (found.to(rows.dtype) == wanted).all(1)
            if not equal.all():
                return done + int(equal.int().argmin())
            done, more = done + len(wanted), 2 * more
        return done

    def _run(self, name: str, kind: str, start: int, numel: int) -> torch.Tensor:
        return self._found.run(f"{name.removesuffix(MASTER)}{kind}", start, start + numel)
