"""Adam's state in Megatron's checkpoints, in whatever way it was saved, as pieces of the tensors of a whole model.

Moments and 32-bit master weights become global tensors of the same names as the weights, so that one table of rules
leads from either to the logical tensors. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from converters.cast import cast_array
from converters.megatron.buckets import Bucket, FlatParameter, default_bucket_size, fill_buckets, fit_buckets, joined
from converters.megatron.flat import unflatten
from converters.megatron.modules import BUFFERS, Held, LocalParameter, ranks_of_experts, ranks_of_the_rest
from converters.megatron.pieces import ForeignTensor, Piece, PieceSource, PlacedPiece, within
from converters.megatron.rank_files import RankFile
from converters.megatron.ranks import Rank
from converters.names import summarise
from converters.rules import Rule
from converters.untrusted.dcp import DcpFolder, DcpTensor
from converters.untrusted.torch_file import StridedTensor, read_torch
from workbench.errors import CheckpointError
from workbench.spec.geometry import Box, LogicalTensor, coverage_fault
from workbench.spec.schema import OPTIMIZER_PREFIX

MOMENTS: Final = ("exp_avg", "exp_avg_sq")
MASTER: Final = "param"
"""The kind of the 32-bit weights that an optimizer keeps when the model has 16 bits."""
KINDS: Final = (MASTER, *MOMENTS)
DISTRIBUTED: Final = "distrib_optim.pt"
_WHOLE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(fp32_param|param|exp_avg|exp_avg_sq)\.(.+)")
_FLAT = re.compile(
    r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)"
    r"\.gbuf_idx_(\d+)\.dtype_\((.+)\)\.bucket_idx_(\d+)\.(param|exp_avg|exp_avg_sq)"
)
_OBJECT = re.compile(
    r"(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.(?:optimizer|per_bucket_numel(?:_unpadded)?)/shard_0_1"
)

State = Mapping[str, Mapping[str, ForeignTensor]]
"""By kind, then by name of the tensor of a whole model."""


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


def flat_pieces(folder: DcpFolder, held: Held) -> State:
    """The optimizer state of a torch_dist folder in mode `dp_reshardable`; empty when there is none.

    CheckpointError when the sizes or borders in the folder are not those of this model at this layout.
    """
    stored: dict[BufferId, dict[int, dict[str, DcpTensor]]] = {}
    for key, tensor in folder.tensors.items():
        if match := _FLAT.fullmatch(key):
            buffer = (int(match[1] or 0), int(match[2]), int(match[3]))
            stored.setdefault(buffer, {}).setdefault(int(match[5]), {})[match[6]] = tensor
    found = _Found(held)
    for buffer, (_, parameters) in _buffers(held).items() if stored else ():
        buckets = stored.pop(buffer, {})
        where = f"{folder.path}: dp_group_idx_{buffer[1]}.gbuf_idx_{buffer[2]}"
        if any(set(buckets.get(index, ())) != set(KINDS) for index in range(len(buckets))):
            raise CheckpointError(f"{where}: not every bucket has {', '.join(KINDS)}; the checkpoint is incomplete")
        for kind in KINDS:
            tensors = [buckets[index][kind] for index in range(len(buckets))]
            fitted = fit_buckets(_line(parameters), [tensor.shape[0] for tensor in tensors], where)
            pairs = [(bucket, tensor.pieces) for bucket, tensor in zip(fitted, tensors, strict=True)]
            _require_borders(pairs, where)
            found.add(kind, tensors[0].dtype, unflatten(parameters, pairs))
    if stored:
        names = ", ".join(f"dp_group_idx_{group}.gbuf_idx_{index}" for _, group, index in sorted(stored)[:4])
        raise CheckpointError(f"{folder.path}: {len(stored)} buffers ({names}) belong to no rank of this layout")
    return found.state(str(folder.path))


def rank_file_state(files: Sequence[RankFile], held: Held, arguments: Mapping[str, Any]) -> State:
    """The optimizer state of rank folders: of `distrib_optim.pt`, or beside the weights; empty when there is none.

    CheckpointError when files are missing, or a size in them is not that of this model at this layout.
    """
    paths = {file.rank: file.path.with_name(DISTRIBUTED) for file in files}
    shared_out = {rank: (read_torch(path), str(path)) for rank, path in paths.items() if path.is_file()}
    beside = {file.rank: (file.state["optimizer"], str(file.path)) for file in files if file.state.get("optimizer")}
    found = _Found(held)
    for (optimizer, group, index), (chunk, parameters) in _buffers(held).items() if shared_out else ():
        rank = dict(_groups(held)[optimizer])[group]
        state, where = _state_of(shared_out, optimizer, rank, held)
        if "buckets_coalesced" not in state or index not in state:
            raise CheckpointError(
                f"{where}: has no buffer {index} in the form that Megatron writes since February 2024; let Megatron "
                "update it with --ckpt-convert-update-legacy-dist-opt-format"
            )
        bucket_size = _bucket_size(arguments, held, rank) if rank.stage == chunk == 0 else None
        (tensors,) = state[index].values()
        _add_buffer(found, parameters, tensors, bucket_size, f"{where}: buffer {index}")
    if not shared_out and any(holds_parameters(state) for state, _ in beside.values()):
        for optimizer, ranks in enumerate(_groups(held)):
            for _, rank in ranks:
                parameters = [p for p in _trained(held, rank) if p.expert == (optimizer == 1)]
                if parameters:
                    _add_parameters(found, parameters, *_state_of(beside, optimizer, rank, held))
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
    found: _Found,
    parameters: Sequence[LocalParameter],
    tensors: Mapping[str, Any],
    bucket_size: int | None,
    where: str,
) -> None:
    """Takes a buffer of `distrib_optim.pt`."""
    buffer = joined(fill_buckets(_line(parameters), bucket_size))
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


def _add_parameters(found: _Found, parameters: Sequence[LocalParameter], state: Mapping[str, Any], where: str) -> None:
    """Takes the state of an optimizer that counts parameters: group by group, each in the order of the modules."""
    inner = _inner(state)
    masters = state.get("fp32_from_fp16_params", ())
    for index, group in enumerate(inner["param_groups"]):
        decays = group.get("wd_mult", 1.0) != 0
        here = [p for p in parameters if (len(p.shape) > 1 and not p.name.endswith(".bias")) == decays]
        if len(here) != len(group["params"]):
            raise CheckpointError(
                f"{where}: group {index} of the optimizer has {len(group['params'])} parameters, but {len(here)} of "
                f"this model's {'have' if decays else 'lack'} weight decay; convert with --optimizer drop"
            )
        halves = [p for p in here if p.dtype != "F32"] if masters else []
        kept = masters[index] if masters else ()
        for parameter, tensor in zip(halves, kept, strict=True):
            _add_parameter(found, MASTER, parameter, tensor, where)
        for parameter, number in zip(here, group["params"], strict=True):
            for kind in MOMENTS:
                _add_parameter(found, kind, parameter, inner["state"][number].get(kind), where)


def _add_parameter(found: _Found, kind: str, parameter: LocalParameter, tensor: Any, where: str) -> None:
    if not isinstance(tensor, StridedTensor) or tensor.shape != parameter.shape:
        shape = list(tensor.shape) if isinstance(tensor, StridedTensor) else None
        raise CheckpointError(f"{where}: {kind} of {parameter.name!r} has shape {shape}, not {list(parameter.shape)}")
    if not parameter.copy:
        pieces = (PlacedPiece(whole, within(tensor, local)) for whole, local in parameter.pairs)
        found.add(kind, tensor.dtype, ((parameter.name, piece) for piece in pieces))


def _state_of(
    states: Mapping[Rank, tuple[Any, str]], optimizer: int, wanted: Rank, held: Held
) -> tuple[Mapping[str, Any], str]:
    """The state of an optimizer (1: of experts) that ranks like `wanted` have, and the file that it is in."""
    tp = held.grid.etp if optimizer else held.grid.tp
    for rank, (content, where) in sorted(states.items()):
        same = (rank.stage, rank.tp_rank % tp) == (wanted.stage, wanted.tp_rank)
        if not same or (optimizer and rank.ep_rank != wanted.ep_rank):
            continue
        state = content[optimizer] if isinstance(content, list) else content if optimizer == 0 else None
        if isinstance(state, Mapping):
            return state, where
    files = ", ".join(where for _, where in states.values())
    raise CheckpointError(f"no optimizer state of {wanted} in {files}; is a file missing?")


def _bucket_size(arguments: Mapping[str, Any], held: Held, rank: Rank) -> int | None:
    """The elements of a bucket of the first chunk (`get_model` of megatron/training/training.py)."""
    if not arguments.get("overlap_grad_reduce"):
        return None
    if size := arguments.get("ddp_bucket_size"):
        return int(size)
    if count := arguments.get("ddp_num_buckets"):
        return sum(parameter.numel for parameter in _trained(held, rank)) // int(count)
    replicas = arguments.get("data_parallel_size") or 1
    return default_bucket_size(int(replicas) * int(arguments.get("context_parallel_size") or 1))


def _trained(held: Held, rank: Rank) -> list[LocalParameter]:
    return [parameter for chunk in range(held.num_chunks) for parameter in held.parameters(rank, chunk)]


BufferId = tuple[int, int, int]
"""Optimizer (1: of experts), index of the rank in its group, index of the buffer on the rank."""


def _groups(held: Held) -> tuple[list[tuple[int, Rank]], list[tuple[int, Rank]]]:
    """The ranks that hold different parts for each optimizer, by index."""
    return list(ranks_of_the_rest(held.grid)), list(ranks_of_experts(held.grid))


def _buffers(held: Held) -> dict[BufferId, tuple[int, list[LocalParameter]]]:
    """Chunk and parameters of every buffer: one for each chunk of a rank and each type."""
    found: dict[BufferId, tuple[int, list[LocalParameter]]] = {}
    for optimizer, ranks in enumerate(_groups(held)):
        for group, rank in ranks:
            by_type: dict[tuple[int, str], list[LocalParameter]] = {}
            for chunk in range(held.num_chunks):
                for parameter in held.parameters(rank, chunk):
                    if parameter.expert == (optimizer == 1):
                        by_type.setdefault((chunk, parameter.dtype), []).append(parameter)
            for index, ((chunk, _), parameters) in enumerate(by_type.items()):
                found[optimizer, group, index] = (chunk, parameters)
    return found


def _line(parameters: Sequence[LocalParameter]) -> list[FlatParameter]:
    return [FlatParameter(p.name, p.numel, p.alone) for p in parameters]


class _Found:
    """Pieces of optimizer state while they are collected from ranks."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._pieces: dict[tuple[str, str], list[Piece]] = {}
        self._dtypes: dict[str, set[str]] = {}

    def add(self, kind: str, dtype: str, pieces: Iterable[tuple[str, Piece]]) -> None:
        """Takes named pieces of one kind."""
        self._dtypes.setdefault(kind, set()).add(dtype)
        for name, piece in pieces:
            self._pieces.setdefault((kind, name), []).append(piece)

    def state(self, where: str) -> State:
        """All of it; CheckpointError unless each tensor is covered exactly once, in one type for each kind."""
        found: dict[str, dict[str, ForeignTensor]] = {}
        for (kind, name), pieces in self._pieces.items():
            shape = self._held.tensors[name].shape
            fault = coverage_fault(shape, [piece.box for piece in pieces])
            if len(self._dtypes[kind]) > 1:
                fault = f"it is of types {', '.join(sorted(self._dtypes[kind]))}"
            if fault:
                raise CheckpointError(f"{where}: {kind} of {name!r}: {fault}")
            (dtype,) = self._dtypes[kind]
            found.setdefault(kind, {})[name] = ForeignTensor(shape, dtype, pieces)
        return found


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


def with_state(
    rules: Mapping[str, Rule], shapes: Mapping[str, tuple[int, ...]], foreign: Mapping[str, ForeignTensor], state: State
) -> tuple[dict[str, Rule], dict[str, tuple[int, ...]], dict[str, ForeignTensor]]:
    """Rules, logical shapes and foreign tensors of weights, and of the moments beside them.

    Where the optimizer keeps 32-bit masters of weights, they are the weights: rounded, they are what the model has.
    CheckpointError when a trained weight has no moments.
    """
    rules, shapes, foreign = dict(rules), dict(shapes), dict(foreign)
    trained = {name: rule for name, rule in rules.items() if not rule.foreign.endswith(BUFFERS)}
    foreign |= {name: tensor for name, tensor in state.get(MASTER, {}).items() if foreign[name].dtype != tensor.dtype}
    for kind in MOMENTS if state else ():
        tensors = state.get(kind, {})
        if missing := sorted({rule.foreign for rule in trained.values()} - tensors.keys()):
            raise CheckpointError(
                f"{summarise(missing, 'has', 'have')} no {kind} in the optimizer's state: frozen parameters have no "
                "place in a run here; convert with --optimizer drop"
            )
        for name, rule in trained.items():
            moment = f"{OPTIMIZER_PREFIX}{kind}/{name}"
            rules[moment] = Rule(moment, f"{kind}/{rule.foreign}", rule.view)
            shapes[moment] = shapes[name]
        foreign |= {f"{kind}/{name}": tensor for name, tensor in tensors.items()}
    return rules, shapes, foreign


def compare_masters(foreign: Mapping[str, ForeignTensor], state: State, where: str) -> None:
    """Raises CheckpointError unless weights are their masters, rounded: in the first row of every piece of a master.

    Any other order of parameters in the buffers, and any shift of them, shows there.
    """
    for name, master in state.get(MASTER, {}).items():
        weights = foreign[name]
        rule = {name: Rule(name, name)}
        schema = {name: LogicalTensor(name, weights.shape, weights.dtype)}
        source = PieceSource(schema, rule, {name: weights})
        for piece in master.pieces:
            box = Box(
                piece.box.offset,
                tuple(1 if dim < len(piece.box.size) - 1 else n for dim, n in enumerate(piece.box.size)),
            )
            kept = piece.locate().read(box.relative_to(piece.box))
            if cast_array(kept, master.dtype, weights.dtype).tobytes() != source.read(name, box).tobytes():
                raise CheckpointError(
                    f"{where}: {name!r} differs from its 32-bit master in the optimizer's state, rounded: the optimizer "
                    "belongs to other weights, or was damaged as it was saved (fully_reshardable of megatron-core 0.16 "
                    "with several buckets); convert with --optimizer drop"
                )
        source.close()
