"""What Megatron's optimizers save in the folder of a rank, and where the tensors are in it. Pure; no torch.

Without a distributed optimizer that is one tensor for each moment of each parameter, beside the weights. With one it is
flat buffers in a file of their own, which the first of the replicas writes that share them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from converters.containers.torch_zip import Storage, StoredTensor, new_tensor, torch_dtype
from converters.megatron.buckets import fill_buckets, joined
from converters.megatron.buffers import KINDS, MOMENTS, buffers_of, line
from converters.megatron.modules import LocalParameter, Modules, decays
from converters.megatron.ranks import Rank
from converters.megatron.saved_optimizer import grad_scaler, param_group, plain_state
from workbench.checkpoint.manifest import TrainingState

RankMoment = tuple[str, LocalParameter, StoredTensor]
"""A kind of optimizer state, the parameter of the rank that it is of, and where it is stored."""

_TYPES: Final = tuple(
    (torch_dtype(weights), torch_dtype(gradients))
    for weights, gradients in (("BF16", "F32"), ("BF16", "BF16"), ("F16", "F32"), ("F16", "F16"), ("F32", "F32"))
)
"""What a run may have in a buffer, by which it looks the buffer up; the state is the same for all."""


def whole_state(
    modules: Modules, rank: Rank, weights: Mapping[str, StoredTensor], training: TrainingState
) -> tuple[Any, list[RankMoment]]:
    """What the optimizers of a rank save where none is distributed, and the moments in it.

    Whoever trains with 32-bit weights looks for torch's state at the top, whoever trains with 16 bits under
    `optimizer`; so it is said twice, and stored once. weights: of the rank by name, which are their own masters. As
    Transformer Engine's Adam has it, groups count steps and parameters do not. ConversionError as of `common_state`.
    """
    optimizers: list[dict[str, Any]] = []
    moments: list[RankMoment] = []
    for expert in _optimizers(modules):
        state: dict[int, dict[str, StoredTensor]] = {}
        groups, masters = [], []
        trained = modules.trained(rank, experts=expert)
        for decayed in modules.decay_groups(experts=expert):
            here = [parameter for parameter in trained if decays(parameter) == decayed]
            numbers = range(len(state), len(state) + len(here))
            for number, parameter in zip(numbers, here, strict=True):
                state[number] = {kind: new_tensor("F32", parameter.shape) for kind in MOMENTS}
                moments += [(kind, parameter, tensor) for kind, tensor in state[number].items()]
            groups.append({**param_group(training, expert=expert, decayed=decayed), "params": list(numbers)})
            masters.append([weights[parameter.name] for parameter in here])
        inner = {"state": state, "param_groups": groups}
        optimizers.append({**inner, "optimizer": inner, "fp32_from_fp16_params": masters, **grad_scaler(training)})
    return _one_or_all(optimizers), moments


def settings_of_distributed(modules: Modules, training: TrainingState) -> Any:
    """What distributed optimizers save beside the weights; ConversionError as of `common_state`."""
    return _one_or_all([plain_state(training, expert=expert) for expert in _optimizers(modules)])


def buffers_of_distributed(modules: Modules, rank: Rank) -> tuple[Any, list[RankMoment]]:
    """What a rank saves of distributed optimizers in a file of its own, and the state in it; None when it has no part.

    Each buffer is one bucket, as in a run that does not overlap the reduction of gradients. Buckets change nothing
    where parameters are multiples of 64 elements; elsewhere the buffer of a run with other ones has another size, which
    Megatron notices.
    """
    states: list[dict[Any, Any] | None] = []
    moments: list[RankMoment] = []
    for expert in _optimizers(modules):
        if not modules.grid.leads(rank, experts=expert):
            states.append(None)
            continue
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for index, (_, parameters) in enumerate(buffers_of(modules, rank, experts=expert)):
            tensors, held = _buffer(parameters)
            state[index] = dict.fromkeys(_TYPES, tensors)
            moments += held
        states.append(state)
    return _one_or_all(states) if any(states) else None, moments


def _buffer(parameters: Sequence[LocalParameter]) -> tuple[dict[str, Any], list[RankMoment]]:
    """A buffer as it is saved, and the parameters in it as views."""
    bucket = joined(fill_buckets(line(parameters), None))
    tensors: dict[str, Any] = {"numel_unpadded": bucket.numel}
    moments: list[RankMoment] = []
    for kind in KINDS:
        storage = Storage("F32", bucket.numel)
        tensors[kind] = StoredTensor(storage, (bucket.numel,))
        moments += [(kind, p, StoredTensor(storage, p.shape, bucket.starts[p.name])) for p in parameters]
    return tensors, moments


def _optimizers(modules: Modules) -> Iterable[bool]:
    """For each optimizer of a rank whether it is that of experts."""
    return (False, True) if modules.grid.ep > 1 else (False,)


def _one_or_all(optimizers: Sequence[Any]) -> Any:
    """What Megatron saves of several optimizers, or of one."""
    return optimizers[0] if len(optimizers) == 1 else list(optimizers)
