"""Adam's state in torch_dist folders, in every mode that Megatron saves it in. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from converters.megatron.buckets import Bucket, fit_buckets
from converters.megatron.buffers import KINDS, MASTER, BufferId, Found, State, buffers, line
from converters.megatron.flat import unflatten
from converters.megatron.modules import Modules
from converters.megatron.pieces import Piece
from converters.names import summarise
from converters.untrusted.dcp import DcpFolder, DcpTensor
from workbench.errors import CheckpointError

_WHOLE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(fp32_param|param|exp_avg|exp_avg_sq)\.(.+)")
_FLAT = re.compile(
    r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)"
    r"\.gbuf_idx_(\d+)\.dtype_\((.+)\)\.bucket_idx_(\d+)\.(param|exp_avg|exp_avg_sq)"
)
_OBJECT = re.compile(
    r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_\d+"
    r"\.(optimizer|grad_scaler|per_bucket_numel(?:_unpadded)?)/shard_0_1"
)


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
            "(dp_reshardable, fully_reshardable, without a distributed optimizer); save it in one of them"
        )


def plain_state(folder: DcpFolder, common: Mapping[str, Any]) -> list[Any]:
    """What the optimizers say of themselves beside their tensors; `dp_reshardable` has each rank's own."""
    objects: dict[tuple[str | None, str], str] = {}
    for key in folder.objects:
        if (match := _OBJECT.fullmatch(key)) and match[2] in ("optimizer", "grad_scaler"):
            objects.setdefault((match[1], match[2]), key)
    found = [{kind: folder.read_object(key)} for (_, kind), key in objects.items()]
    return [common.get("optimizer"), *found]


def flat_state(folder: DcpFolder, modules: Modules) -> State:
    """The optimizer state of a torch_dist folder in mode `dp_reshardable`; empty when there is none.

    CheckpointError when the sizes or borders in the folder are not those of this model at this layout.
    """
    stored: dict[BufferId, dict[int, dict[str, DcpTensor]]] = {}
    for key, tensor in folder.tensors.items():
        if match := _FLAT.fullmatch(key):
            buffer = (int(match[1] or 0), int(match[2]), int(match[3]))
            stored.setdefault(buffer, {}).setdefault(int(match[5]), {})[match[6]] = tensor
    found = Found(modules)
    for buffer, (_, parameters) in buffers(modules).items() if stored else ():
        buckets = stored.pop(buffer, {})
        where = f"{folder.path}: dp_group_idx_{buffer[1]}.gbuf_idx_{buffer[2]}"
        if any(set(buckets.get(index, ())) != set(KINDS) for index in range(len(buckets))):
            raise CheckpointError(f"{where}: not every bucket has {', '.join(KINDS)}; the checkpoint is incomplete")
        for kind in KINDS:
            tensors = [buckets[index][kind] for index in range(len(buckets))]
            fitted = fit_buckets(line(parameters), [tensor.shape[0] for tensor in tensors], where)
            pairs = [(bucket, tensor.pieces) for bucket, tensor in zip(fitted, tensors, strict=True)]
            _require_borders(pairs, where)
            found.add(kind, tensors[0].dtype, unflatten(parameters, pairs))
    if stored:
        names = ", ".join(f"dp_group_idx_{group}.gbuf_idx_{index}" for _, group, index in sorted(stored)[:4])
        raise CheckpointError(f"{folder.path}: {len(stored)} buffers ({names}) belong to no rank of this layout")
    return found.state(str(folder.path))


def _require_borders(buckets: Sequence[tuple[Bucket, Sequence[Piece]]], where: str) -> None:
    """Raises CheckpointError unless a piece begins where each parameter does, which Megatron writes one by one."""
    for index, (bucket, pieces) in enumerate(buckets):
        begins = {piece.box.offset[0] for piece in pieces}
        for name, start in bucket.starts.items():
            if start not in begins:
                raise CheckpointError(
                    f"{where}: {name!r} should begin at element {start} of bucket {index}, where no piece begins; the "
                    "modules of this model were in another order"
                )
