"""Adam's state in Megatron's rank folders: in `distrib_optim.pt`, or beside the weights. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from converters.megatron.buckets import default_bucket_size, fill_buckets, joined
from converters.megatron.buffers import KINDS, MASTER, MOMENTS, Found, State, buffers, groups, line
from converters.megatron.flat import unflatten
from converters.megatron.modules import LocalParameter, Modules, decays
from converters.megatron.pieces import PlacedPiece, within
from converters.megatron.rank_files import RankFile
from converters.megatron.ranks import Rank
from converters.untrusted.torch_file import StridedTensor, read_torch
from workbench.errors import CheckpointError
from workbench.spec.geometry import Box

DISTRIBUTED: Final = "distrib_optim.pt"


def rank_file_state(files: Sequence[RankFile], modules: Modules, arguments: Mapping[str, Any]) -> State:
    """The optimizer state of rank folders: of `distrib_optim.pt`, or beside the weights; empty when there is none.

    CheckpointError when files are missing, or too old, or a size in them is not that of this model at this layout.
    """
    paths = {file.rank: file.path.with_name(DISTRIBUTED) for file in files}
    shared_out = {rank: (read_torch(path), str(path)) for rank, path in paths.items() if path.is_file()}
    beside = {file.rank: (file.state["optimizer"], str(file.path)) for file in files if file.state.get("optimizer")}
    plain = any(holds_parameters(state) for state, _ in beside.values())
    if (shared_out or plain) and (version := files[0].state.get("checkpoint_version", 0)) < 2:
        raise CheckpointError(
            f"{files[0].path}: checkpoint_version={version:g} keeps queries, keys and values in another order, in "
            "which optimizer state is not read"
        )
    found = Found(modules)
    for (optimizer, group, index), (chunk, parameters) in buffers(modules).items() if shared_out else ():
        rank = dict(groups(modules)[optimizer])[group]
        state, where = _state_of(shared_out, optimizer, rank, modules)
        if "buckets_coalesced" not in state or index not in state:
            raise CheckpointError(
                f"{where}: has no buffer {index} in the form that Megatron writes since February 2024; let Megatron "
                "update it with --ckpt-convert-update-legacy-dist-opt-format"
            )
        bucket_size = _bucket_size(arguments, modules, rank) if rank.stage == chunk == 0 else None
        tensors, *others = state[index].values()
        if any(other != tensors for other in others):
            raise CheckpointError(f"{where}: buffer {index} holds {len(others) + 1} sets of tensors, not one")
        _add_buffer(found, parameters, tensors, bucket_size, f"{where}: buffer {index}")
    if plain and not shared_out:
        for optimizer, ranks in enumerate(groups(modules)):
            for _, rank in ranks:
                parameters = modules.trained(rank, experts=optimizer == 1)
                if parameters:
                    _add_parameters(found, parameters, *_state_of(beside, optimizer, rank, modules))
    return found.state(str(files[0].path.parent.parent))


def holds_parameters(state: Any) -> bool:
    """Whether the plain state of an optimizer has more than its settings."""
    if isinstance(state, list):
        return any(holds_parameters(one) for one in state)
    return isinstance(state, Mapping) and bool(_inner(state).get("state"))


def _inner(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """torch's own state, which Megatron's optimizers for 16 bits wrap."""
    found: Mapping[str, Any] = state.get("optimizer", state)
    return found


def _add_buffer(
    found: Found,
    parameters: Sequence[LocalParameter],
    tensors: Mapping[str, Any],
    bucket_size: int | None,
    where: str,
) -> None:
    """Takes a buffer of `distrib_optim.pt`."""
    buffer = joined(fill_buckets(line(parameters), bucket_size))
    for kind in KINDS:
        tensor = tensors.get(kind)
        if not isinstance(tensor, StridedTensor) or tensor.shape != (buffer.numel,):
            shape = list(tensor.shape) if isinstance(tensor, StridedTensor) else None
            raise CheckpointError(
                f"{where} holds {kind} of shape {shape}, but its {len(parameters)} parameters fill [{buffer.numel}]; "
                "these are not the buffers of this model at this layout"
            )
        flat = PlacedPiece(Box.whole(tensor.shape), tensor)
        found.add(kind, tensor.dtype, unflatten(parameters, [(buffer, [flat])]))


def _add_parameters(found: Found, parameters: Sequence[LocalParameter], state: Mapping[str, Any], where: str) -> None:
    """Takes the state of an optimizer that counts parameters: group by group, each in the order of the modules."""
    inner = _inner(state)
    masters = state.get("fp32_from_fp16_params", ())
    for index, group in enumerate(inner["param_groups"]):
        decayed = group.get("wd_mult", 1.0) != 0
        here = [parameter for parameter in parameters if decays(parameter) == decayed]
        if len(here) != len(group["params"]):
            raise CheckpointError(
                f"{where}: group {index} of the optimizer has {len(group['params'])} parameters, but {len(here)} of "
                f"this model's {'have' if decayed else 'lack'} weight decay"
            )
        halves = [parameter for parameter in here if parameter.dtype != "F32"]
        if halves and masters:
            for parameter, tensor in zip(halves, masters[index], strict=True):
                _add_parameter(found, MASTER, parameter, tensor, where)
        for parameter, number in zip(here, group["params"], strict=True):
            for kind in MOMENTS:
                _add_parameter(found, kind, parameter, inner["state"][number].get(kind), where)


def _add_parameter(found: Found, kind: str, parameter: LocalParameter, tensor: Any, where: str) -> None:
    if not isinstance(tensor, StridedTensor) or tensor.shape != parameter.shape:
        shape = list(tensor.shape) if isinstance(tensor, StridedTensor) else None
        raise CheckpointError(f"{where}: {kind} of {parameter.name!r} has shape {shape}, not {list(parameter.shape)}")
    if not parameter.copy:
        pieces = (PlacedPiece(whole, within(tensor, local)) for whole, local in parameter.pairs)
        found.add(kind, tensor.dtype, ((parameter.name, piece) for piece in pieces))


def _state_of(
    states: Mapping[Rank, tuple[Any, str]], optimizer: int, wanted: Rank, modules: Modules
) -> tuple[Mapping[Any, Any], str]:
    """The state of an optimizer (1: of experts) that ranks like `wanted` have, and the file that it is in."""
    tp = modules.grid.etp if optimizer else modules.grid.tp
    for rank, (content, where) in sorted(states.items()):
        same = (rank.stage, rank.tp_rank % tp) == (wanted.stage, wanted.tp_rank)
        if not same or (optimizer and rank.ep_rank != wanted.ep_rank):
            continue
        state = content[optimizer] if isinstance(content, list) else content if optimizer == 0 else None
        if isinstance(state, Mapping):
            return state, where
    files = ", ".join(where for _, where in states.values())
    raise CheckpointError(f"no optimizer state of {wanted} in {files}; is a file missing?")


def _bucket_size(arguments: Mapping[str, Any], modules: Modules, rank: Rank) -> int | None:
    """The elements of a bucket of the first chunk (`get_model` of megatron/training/training.py)."""
    if not arguments.get("overlap_grad_reduce"):
        return None
    if size := arguments.get("ddp_bucket_size"):
        return int(size)
    if count := arguments.get("ddp_num_buckets"):
        both = (modules.trained(rank, experts=experts) for experts in (False, True))
        return sum(parameter.numel for trained in both for parameter in trained) // int(count)
    replicas = arguments.get("data_parallel_size") or 1
    return default_bucket_size(int(replicas) * int(arguments.get("context_parallel_size") or 1))
