"""Running averages of gradients, one for each parameter: where they live between updates, and in which type.

They lie like the parameter itself, so its shards say which boxes of `optim.<kind>/<name>` they hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pretrain.config import OptimTable
from workbench.parallel.hashing import hash_grid, hash_text
from workbench.parallel.live import LiveParameter


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
            for parameter, *values in zip(some, *found, strict=True):
                self._put_to_rest(parameter, values, step)

    def _put_to_rest(self, parameter: LiveParameter, values: Sequence[torch.Tensor], step: int) -> None:
        resting = [kept[parameter.path] for kept in self.at_rest.values()]
        if resting[0] is values[0]:
            return
        if resting[0].dtype == torch.bfloat16:
            values = self._rounded(parameter, values, step)
        for kept, value in zip(resting, values, strict=True):
            kept.copy_(value, non_blocking=True)

    def _rounded(self, parameter: LiveParameter, values: Sequence[torch.Tensor], step: int) -> list[torch.Tensor]:
        """The values in bf16. Each element's noise depends on its place in the logical tensor, so that copies of a box
        stay equal and another layout rounds alike."""
        found = [torch.zeros_like(value, dtype=torch.bfloat16) for value in values]
        for shard in parameter.shards:
            start = torch.tensor(hash_text(f"{self._seed}/{step}/{shard.name}"), device=values[0].device)
            noise = hash_grid(start, [torch.arange(s.start, s.stop, device=start.device) for s in shard.box.slices])
            for kind, (value, rounded) in enumerate(zip(values, found, strict=True)):
                local = shard.local.slices
                # 16 of the 64 bits for each kind.
                rounded[local] = stochastic_bf16(value[local], noise >> (16 * kind))
        return found


def stochastic_bf16(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """`values` in bf16, rounded up in magnitude with the probability that makes the mean exact.

    noise: int64, of which 16 bits are used. Finite values stay finite but for the last half step below infinity.
    """
    bits = values.to(torch.float32).view(torch.int32) + (noise & 0xFFFF).to(torch.int32)
    rounded = (bits & -0x10000).view(torch.float32).to(torch.bfloat16)
    # The bits of a NaN would wrap around and become a zero.
    return torch.where(values.isnan(), values.to(torch.bfloat16), rounded)
