"""Adam's state in Megatron's checkpoints, in whatever way it was saved, as pieces of the tensors of a whole model.

Moments and 32-bit master weights become global tensors of the same names as the weights, so that one table of rules
leads from either to the logical tensors. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from converters.megatron.buckets import Bucket, FlatParameter, fill_buckets, fit_buckets, joined
from converters.megatron.flat import Place, Whole, unflatten
from converters.megatron.modules import Held, LocalParameter, ranks_of_experts, ranks_of_the_rest
from converters.megatron.ranks import Rank
from converters.names import summarise
from converters.untrusted.dcp import DcpFolder, DcpTensor
from converters.untrusted.torch_file import StridedTensor
from workbench.errors import CheckpointError

MOMENTS: Final = ("exp_avg", "exp_avg_sq")
MASTER: Final = "param"
"""The kind of the 32-bit weights that an optimizer keeps when the model has 16 bits."""
KINDS: Final = (MASTER, *MOMENTS)
_WHOLE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(fp32_param|param|exp_avg|exp_avg_sq)\.(.+)")
_FLAT = re.compile(
    r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)"
    r"\.gbuf_idx_(\d+)\.dtype_\((.+)\)\.bucket_idx_(\d+)\.(param|exp_avg|exp_avg_sq)"
)
_OBJECT = re.compile(
    r"(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.(?:optimizer|per_bucket_numel(?:_unpadded)?)/shard_0_1"
)

Pieces = Mapping[str, Mapping[str, Sequence[Place]]]
"""By kind, then by name of the tensor of a whole model: the places that together hold it."""


def is_optimizer_key(key: str) -> bool:
    """Whether a tensor or object of a torch_dist folder belongs to the optimizer."""
    return re.match(r"(?:chained_\d+\.)?optimizer\.", key) is not None


def whole_tensors(folder: DcpFolder) -> dict[str, dict[str, DcpTensor]]:
    """Optimizer state of a torch_dist folder that is stored like the weights: by kind, then by the weight's key.

    Written by `fully_reshardable`, and without a distributed optimizer.
    """
    found: dict[str, dict[str, DcpTensor]] = {}
    for key, tensor in folder.tensors.items():
        if match := _WHOLE.fullmatch(key):
            found.setdefault(MASTER if match[1] == "fp32_param" else match[1], {})[match[2]] = tensor
    return found


def require_known_keys(folder: DcpFolder) -> None:
    """CheckpointError for optimizer state that is stored in none of the ways that this module reads."""
    keys = [key for key in (*folder.tensors, *folder.objects) if is_optimizer_key(key)]
    strange = [key for key in keys if not any(known.fullmatch(key) for known in (_WHOLE, _FLAT, _OBJECT))]
    if strange:
        raise CheckpointError(
            f"{folder.path}: {summarise(strange, 'is', 'are')} of an optimizer, and not Adam's in a mode that is read "
            "(dp_reshardable, fully_reshardable, without a distributed optimizer); save it in one of them, or convert "
            "with --optimizer drop"
        )


def flat_pieces(folder: DcpFolder, held: Held) -> Pieces:
    """The optimizer state of a torch_dist folder in mode `dp_reshardable`; empty when there is none.

    CheckpointError when the sizes or borders in the folder are not those of this model at this layout.
    """
    stored: dict[BufferId, dict[int, dict[str, DcpTensor]]] = {}
    for key, tensor in folder.tensors.items():
        if match := _FLAT.fullmatch(key):
            buffer = (int(match[1] or 0), int(match[2]), int(match[3]))
            stored.setdefault(buffer, {}).setdefault(int(match[5]), {})[match[6]] = tensor
    found: dict[str, dict[str, list[Place]]] = {}
    for buffer, parameters in _buffers(held).items() if stored else ():
        buckets = stored.pop(buffer, {})
        where = f"{folder.path}: dp_group_idx_{buffer[1]}.gbuf_idx_{buffer[2]}"
        if any(set(buckets.get(index, ())) != set(KINDS) for index in range(len(buckets))):
            raise CheckpointError(f"{where}: not every bucket has {', '.join(KINDS)}; the checkpoint is incomplete")
        for kind in KINDS:
            tensors = [buckets[index][kind] for index in range(len(buckets))]
            fitted = fit_buckets(_line(parameters), [tensor.shape[0] for tensor in tensors], where)
            pairs = [(bucket, tensor.pieces) for bucket, tensor in zip(fitted, tensors, strict=True)]
            _require_borders(pairs, where)
            _add(found.setdefault(kind, {}), unflatten(parameters, pairs))
    if stored:
        names = ", ".join(f"dp_group_idx_{group}.gbuf_idx_{index}" for _, group, index in sorted(stored)[:4])
        raise CheckpointError(f"{folder.path}: {len(stored)} buffers ({names}) belong to no rank of this layout")
    return found


def rank_file_pieces(states: Mapping[Rank, tuple[Any, str]], held: Held, bucket_size: int | None) -> Pieces:
    """The optimizer state of `distrib_optim.pt` files: content and path, by rank.

    bucket_size: of the first chunk of the first stage, as in `fill_buckets`; there is one bucket in all others.
    CheckpointError when a buffer's size is not that of this model at this layout.
    """
    found: dict[str, dict[str, list[Place]]] = {}
    for (optimizer, group, index), parameters in _buffers(held).items():
        rank = dict(_groups(held)[optimizer])[group]
        content, where = next(states[r] for r in sorted(states) if _holds(states[r][0], optimizer, r, rank, held))
        state = content[optimizer] if isinstance(content, list) else content
        if "buckets_coalesced" not in state or index not in state:
            raise CheckpointError(
                f"{where}: has no buffer {index} in the form that Megatron writes since February 2024; let Megatron "
                "update it with --ckpt-convert-update-legacy-dist-opt-format"
            )
        (tensors,) = state[index].values()
        buffer = joined(fill_buckets(_line(parameters), bucket_size if rank.stage == index == 0 else None))
        for kind in KINDS:
            tensor = tensors.get(kind)
            if not isinstance(tensor, StridedTensor) or tensor.shape != (buffer.numel,):
                shape = list(tensor.shape) if isinstance(tensor, StridedTensor) else None
                raise CheckpointError(
                    f"{where}: {kind} of buffer {index} has shape {shape}, but its {len(parameters)} parameters fill "
                    f"[{buffer.numel}]; these are not the buffers of this model at this layout"
                )
            _add(found.setdefault(kind, {}), unflatten(parameters, [(buffer, [Whole(tensor)])]))
    return found


def _holds(content: Any, optimizer: int, at: Rank, wanted: Rank, held: Held) -> bool:
    """Whether the file of rank `at` holds this optimizer's state of `wanted`."""
    if isinstance(content, list):
        if optimizer >= len(content) or content[optimizer] is None:
            return False
    elif optimizer > 0:
        return False
    tp = held.grid.etp if optimizer else held.grid.tp
    experts = optimizer == 0 or at.ep_rank == wanted.ep_rank
    return at.stage == wanted.stage and at.tp_rank % tp == wanted.tp_rank and experts


BufferId = tuple[int, int, int]
"""Optimizer (1: of experts), index of the rank in its group, index of the buffer on the rank."""


def _groups(held: Held) -> tuple[list[tuple[int, Rank]], list[tuple[int, Rank]]]:
    """The ranks that hold different parts for each optimizer, by index."""
    return list(ranks_of_the_rest(held.grid)), list(ranks_of_experts(held.grid))


def _buffers(held: Held) -> dict[BufferId, list[LocalParameter]]:
    """The parameters of every buffer: one for each chunk of a rank and each type."""
    found: dict[BufferId, list[LocalParameter]] = {}
    for optimizer, ranks in enumerate(_groups(held)):
        for group, rank in ranks:
            by_type: dict[tuple[int, str], list[LocalParameter]] = {}
            for chunk in range(held.num_chunks):
                for parameter in held.parameters(rank, chunk):
                    if parameter.expert == (optimizer == 1):
                        by_type.setdefault((chunk, parameter.dtype), []).append(parameter)
            found |= {(optimizer, group, index): parameters for index, parameters in enumerate(by_type.values())}
    return found


def _line(parameters: Sequence[LocalParameter]) -> list[FlatParameter]:
    return [FlatParameter(p.name, p.numel, p.alone) for p in parameters]


def _add(found: dict[str, list[Place]], pieces: Iterable[tuple[str, Place]]) -> None:
    for name, place in pieces:
        found.setdefault(name, []).append(place)


def _require_borders(buckets: Sequence[tuple[Bucket, Sequence[Place]]], where: str) -> None:
    """Raises CheckpointError unless a piece begins where each parameter does, which Megatron writes one by one."""
    for index, (bucket, places) in enumerate(buckets):
        begins = {place.box.offset[0] for place in places}
        for name, start in bucket.starts.items():
            if start not in begins:
                raise CheckpointError(
                    f"{where}: {name!r} should begin at element {start} of bucket {index}, where no piece begins; the "
                    "modules of this model were in another order"
                )
