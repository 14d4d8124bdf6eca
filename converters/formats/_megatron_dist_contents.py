"""What a torch_dist folder is made of when it is written: layers and experts stacked, in Transformer Engine's names, or
those that Megatron's own layers have there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from converters.containers.dcp import GlobalTensor, lay_out_dcp
from converters.containers.torch_zip import lay_out_torch
from converters.format import WriteRequest
from converters.formats._files import FileContent, Place, whole_file
from converters.formats._folder import FolderContents, WrittenPiece, WrittenTensor, foreign_tensors, padding_of
from converters.megatron.distributed import Stored, stored_now
from converters.megatron.rank_files import TRACKER, iteration_folder
from converters.megatron.saved_args import CHECKPOINT_VERSION, saved_args
from converters.megatron.saved_optimizer import CONTENT, common_state, saved_training, split_kind, with_moments
from converters.megatron.stages import padded_vocab
from converters.megatron.table import HEAD, LAYERS, NO_WEIGHTS, RENAMED, TE, McoreTensor, Table, has_scales, make_table
from workbench.checkpoint.manifest import TrainingState
from workbench.errors import ConversionError
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

METADATA: Final = "metadata.json"
COMMON: Final = "common.pt"
BACKEND: Final = "torch_dist"
_BACKENDS: Final = {
    "sharded_backend": BACKEND,
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def dist_folder(request: WriteRequest) -> FolderContents:
    """A folder for Megatron-Core in chunks of the request's layout: a release, or an iteration with its optimizer.

    ConversionError or LayoutError when Megatron cannot have this model at this layout.
    """
    model, layout = request.model, request.layout
    layout.validate_for(model)
    own_layers = request.megatron.own_layers
    table = make_table(model, RENAMED if own_layers else TE, padded_vocab=padded_vocab(model, layout))
    rules = with_moments(table.rules, request.schema, masters=True)
    wholes = foreign_tensors(request.schema, rules)
    places = {name: _place(name, table, model) for name in wholes}
    padding = padding_of(wholes, request.schema, rules)
    stages = {layer: s for s in range(layout.pp) for layer in layout.layers(model.num_hidden_layers, s)}
    chunks = {name: list(_chunks(table.tensors[split_kind(name)[1]], stages, layout)) for name in wholes}
    weights = {name: place for name, place in places.items() if name in table.tensors}
    laid = lay_out_dcp(_stacks(wholes, places, chunks, padding), _scales(weights, chunks, own_layers=own_layers))
    training = saved_training(request)
    root, word = iteration_folder(training.step if training else None)
    args = saved_args(request, training, ckpt_format=BACKEND)
    common = lay_out_torch(_common(args, training, layout), root=COMMON.removesuffix(".pt"))
    files = {
        **laid.files,
        COMMON: FileContent(common.num_bytes, common.known, common.checksums),
        METADATA: whole_file(json.dumps(_BACKENDS).encode()),
    }
    depths = {place.name: len(place.at) for place in places.values()}
    pieces = {stack: _by_index(tensor.pieces, depths[stack], root) for stack, tensor in laid.tensors.items()}
    tensors = {
        name: WrittenTensor(whole.dtype, whole.shape, pieces[places[name].name][places[name].at], padding[name])
        for name, whole in wholes.items()
    }
    inside = {f"{root}/{file}": content for file, content in files.items()}
    return FolderContents({TRACKER: whole_file(word.encode()), **inside}, tensors, rules)


def _place(name: str, table: Table, model: ModelConfig) -> Stored:
    """Where a weight is stored, or the optimizer's state of it."""
    kind, weight = split_kind(name)
    place = stored_now(table.tensors[weight], model)
    return replace(place, name=f"optimizer.state.{kind}.{place.name}") if kind else place


def _common(args: Any, training: TrainingState | None, layout: ParallelLayout) -> dict[str, Any]:
    content = {"singleton_local_shards": False}
    return {
        "args": args,
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0 if training is None else training.step,
        "content_metadata": content if training is None else {**content, **CONTENT},
        **({} if training is None else common_state(training, layout)),
    }


def _chunks(tensor: McoreTensor, stages: Mapping[int, int], layout: ParallelLayout) -> Iterator[tuple[Box, str]]:
    """The boxes of a tensor that ranks of `layout` write, each with the file of the rank."""
    stage = layout.last_stage if tensor.name.startswith(("decoder.final", HEAD)) else 0
    if tensor.name.startswith(LAYERS):
        stage = stages[int(tensor.name.split(".")[2])]
    tp, ep = (layout.expert_tp, layout.ep) if tensor.num_experts else (layout.tp, 1)
    for ep_rank in range(ep):
        for tp_rank in range(1 if tensor.dim is None else tp):
            rank = (stage * layout.ep + ep_rank) * layout.tp + tp_rank
            for box, _ in tensor.share(tp, tp_rank, ep, ep_rank):
                yield box, f"__{rank}_0.distcp"


def _stacks(
    wholes: Mapping[str, LogicalTensor],
    places: Mapping[str, Stored],
    chunks: Mapping[str, list[tuple[Box, str]]],
    padding: Mapping[str, int],
) -> dict[str, GlobalTensor]:
    """The tensors of the folder; ConversionError when those to be stacked are of several types."""
    members: dict[str, list[str]] = {}
    for name in wholes:
        members.setdefault(places[name].name, []).append(name)
    found = {}
    for stack, names in members.items():
        first = wholes[names[0]]
        if other := next((name for name in names if wholes[name].dtype != first.dtype), None):
            raise ConversionError(
                f"{other!r} is {wholes[other].dtype}, but {names[0]!r} is {first.dtype}; Megatron stacks all layers in "
                "one tensor: give all weights one type with --dtype"
            )
        found[stack] = GlobalTensor(
            first.dtype,
            (*places[names[0]].outer, *first.shape),
            tuple((_at(box, places[name]), file) for name in names for box, file in chunks[name]),
            padding=sum(padding[name] for name in names),
        )
    return found


def _scales(
    places: Mapping[str, Stored], chunks: Mapping[str, list[tuple[Box, str]]], *, own_layers: bool
) -> dict[str, tuple[str, list[None]]]:
    """The entries in which modules look for scaling factors of fp8: that there are none."""
    found: dict[str, tuple[str, list[None]]] = {}
    for name, place in places.items():
        module = place.name.rpartition(".")[0]
        owners = [module] if has_scales(module, own_layers=own_layers) else []
        if module.endswith(".linear_proj") and not own_layers:
            owners.append(module.replace("linear_proj", "core_attention"))
        index = ".".join(map(str, place.at or (0,))), ".".join(map(str, place.outer or (1,)))
        for owner in owners:
            found[f"{owner}.{NO_WEIGHTS}/shard_{index[0]}_{index[1]}"] = (chunks[name][0][1], [None])
    return found


def _at(box: Box, place: Stored) -> Box:
    """A box of a tensor as one of the stack that it lies in."""
    return Box((*place.at, *box.offset), (*(1 for _ in place.at), *box.size))


def _by_index(pieces: Iterable[WrittenPiece], depth: int, root: str) -> dict[tuple[int, ...], tuple[WrittenPiece, ...]]:
    """The pieces of a stack, by index in its `depth` leading dimensions, as pieces of what is stacked."""
    found: dict[tuple[int, ...], list[WrittenPiece]] = {}
    for piece in pieces:
        offset, size = piece.box.offset, piece.box.size
        places = tuple(Place(f"{root}/{place.file}", place.start) for place in piece.places)
        found.setdefault(offset[:depth], []).append(WrittenPiece(Box(offset[depth:], size[depth:]), places))
    return {index: tuple(own) for index, own in found.items()}
