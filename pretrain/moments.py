"""Running averages of gradients, one for each parameter: where they live between updates, and in which type.

They lie like the parameter itself, so its shards say which boxes of `optim.<kind>/<name>` they hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pretrain.config import OptimTable
from workbench.parallel.hashing import hash_grid, hash_text
from workbench.parallel.live import LiveParameter, shard_views
from workbench.spec.geometry import Box


class Moments:
    """Averages of several kinds (`exp_avg`) for each of some parameters, zero at first.

    At work they have the type and the device of their parameter. At rest they may be bf16, rounded up or down at random
    so that many small changes add up as they should, and may lie in the memory of the host.
    """

    def __init__(
        self, kinds: Sequence[str], parameters: Sequence[LiveParameter], config: OptimTable, *, seed: int
    ) -> None:
        self._seed = seed
        self._parameters = list(parameters)
        self._rests_elsewhere = False
        self.at_rest: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in kinds}
        for parameter in parameters:
            data = parameter.data
            dtype = torch.bfloat16 if config.moments == "bf16" else data.dtype
            pinned = config.offload and data.is_cuda
            self._rests_elsewhere |= pinned or dtype != data.dtype
            for kind in kinds:
                self.at_rest[kind][parameter.path] = torch.zeros(
                    data.shape, dtype=dtype, device="cpu" if pinned else data.device, pin_memory=pinned
                )

    def at_work(self, step: int) -> Iterator[tuple[list[LiveParameter], list[list[torch.Tensor]]]]:
        """Some parameters at a time with their averages of each kind, to be changed in place in update number `step`.

        All at once, unless that would hold all averages twice. Between two values, what was changed is put to rest.
        """
        held = [parameter for parameter in self._parameters if parameter.data.numel()]
        for some in [[one] for one in held] if self._rests_elsewhere else [held] if held else []:
            found = [
                [kept[p.path].to(p.data.device, p.data.dtype, non_blocking=True) for p in some]
                for kept in self.at_rest.values()
            ]
            yield some, found
            for (kind, kept), values in zip(self.at_rest.items(), found, strict=True):
                for parameter, value in zip(some, values, strict=True):
                    self._put(kept[parameter.path], value, parameter, f"{self._seed}/{step}/{kind}")

    def _put(self, kept: torch.Tensor, value: torch.Tensor, parameter: LiveParameter, key: str) -> None:
        if kept is value:
            return
        if kept.dtype == torch.bfloat16:
            rounded = torch.zeros_like(value, dtype=torch.bfloat16)
            for shard, view in shard_views(parameter, value):
                # Each element's noise depends on its place in the logical tensor: copies of a box stay equal, and
                # another layout rounds alike.
                rounded[shard.local.slices] = stochastic_bf16(view, _noise(f"{key}/{shard.name}", shard.box, view))
            value = rounded
        kept.copy_(value, non_blocking=True)


def stochastic_bf16(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """`values` in bf16, rounded up in magnitude with the probability that makes the mean exact.

    noise: int64, of which 16 bits are used. Finite values stay finite but for the last half step below infinity.
    """
    bits = values.to(torch.float32).view(torch.int32) + (noise & 0xFFFF).to(torch.int32)
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)


def _noise(key: str, box: Box, like: torch.Tensor) -> torch.Tensor:
    start = torch.tensor(hash_text(key), dtype=torch.int64, device=like.device)
    return hash_grid(start, [torch.arange(o, e, device=like.device) for o, e in zip(box.offset, box.end, strict=True)])
