"""What Megatron's rank folders are made of when they are written, for Transformer Engine's layers or its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from converters.containers.torch_zip import StoredTensor, lay_out_torch, new_tensor
from converters.format import MegatronRun, WriteRequest
from converters.formats._files import FileContent, Place, whole_file
from converters.formats._folder import FolderContents, WrittenPiece, WrittenTensor, foreign_tensors, padding_of
from converters.megatron.modules import LocalParameter, Modules
from converters.megatron.rank_files import FILE, TRACKER, iteration_folder, renumber
from converters.megatron.rank_optimizer import DISTRIBUTED
from converters.megatron.ranks import Rank, RankGrid
from converters.megatron.saved_args import CHECKPOINT_VERSION, saved_args
from converters.megatron.saved_optimizer import saved_training, schedule, with_moments
from converters.megatron.saved_rank_optimizer import buffers_of_distributed, settings_of_distributed, whole_state
from converters.megatron.stages import padded_vocab
from converters.megatron.table import HEAD, LOCAL, NO_WEIGHTS, TE, has_scales, make_table
from workbench.checkpoint.manifest import TrainingState
from workbench.spec.dtypes import ITEM_BYTES
from workbench.spec.geometry import Box
from workbench.spec.schema import tied_head

Stored = tuple[str, LocalParameter, StoredTensor]
"""The name of a tensor of the whole model, the parameter that a rank has of it, and where that lies."""


def rank_folders(request: WriteRequest) -> FolderContents:
    """Folders for Megatron-LM, without random numbers: a release, or an iteration with its optimizer.

    ConversionError or LayoutError when Megatron cannot have this model at this layout.
    """
    model, layout = request.model, request.layout
    layout.validate_for(model)
    run = request.megatron
    table = make_table(model, LOCAL if run.own_layers else TE, padded_vocab=padded_vocab(model, layout))
    rules = with_moments(table.rules, request.schema, masters=run.distributed_optimizer)
    tensors = foreign_tensors(request.schema, rules)
    grid = RankGrid(layout.tp, layout.pp, layout.ep, layout.expert_tp)
    modules = Modules(
        table.tensors,
        {name: tensor.dtype for name, tensor in tensors.items()},
        grid,
        layout.chunks(model.num_hidden_layers),
        grouped=False,
        tied=tied_head(model),
    )
    training = saved_training(request)
    args = saved_args(request, training, ckpt_format="torch")
    common = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": training.step if training else 0}
    common |= schedule(training) if training else {}
    folder, word = iteration_folder(training.step if training else None)
    files: dict[str, FileContent] = {TRACKER: whole_file(word.encode())}
    places: dict[str, dict[Box, list[Place]]] = {name: {} for name in tensors}
    for rank in grid.loading():
        trees, stored = _rank(modules, rank, model.moe.num_experts // grid.ep if model.moe else 0, training, run)
        trees[FILE] = {**common, **trees[FILE]}
        for name, tree in trees.items():
            file = f"{folder}/{grid.folder(rank)}/{name}"
            found = lay_out_torch(tree, root=name.removesuffix(".pt"))
            files[file] = FileContent(found.num_bytes, found.known, found.checksums)
            for whole, parameter, tensor in stored:
                if (start := found.storages.get(tensor.storage)) is not None:
                    for box, place in _places(parameter, tensor, file, start):
                        places[whole].setdefault(box, []).append(place)
    padding = padding_of(tensors, request.schema, rules)
    foreign = {
        name: WrittenTensor(
            whole.dtype,
            whole.shape,
            tuple(WrittenPiece(box, tuple(copies)) for box, copies in places[name].items()),
            padding[name],
        )
        for name, whole in tensors.items()
    }
    return FolderContents(files, foreign, rules)


def _rank(
    modules: Modules, rank: Rank, experts: int, training: TrainingState | None, run: MegatronRun
) -> tuple[dict[str, Any], list[Stored]]:
    """What a rank saves, by file: its model chunks under the names that these have, and its optimizers; and the tensors
    in it.

    experts: that the rank has of each layer. training: of the run whose optimizer is saved.
    """
    chunks: list[dict[str, Any]] = []
    weights: list[Stored] = []
    for chunk in range(modules.num_chunks):
        state, stored = _chunk(modules, rank, chunk, experts, own_layers=run.own_layers)
        chunks.append(state)
        weights += stored
    named = {f"model{chunk}": state for chunk, state in enumerate(chunks)} if len(chunks) > 1 else {"model": chunks[0]}
    if training is None:
        return {FILE: named}, weights
    if run.distributed_optimizer:
        optimizer = settings_of_distributed(modules, training)
        buffers, moments = buffers_of_distributed(modules, rank)
    else:
        optimizer, moments = whole_state(modules, rank, {name: tensor for name, _, tensor in weights}, training)
        buffers = None
    stored = [(f"{kind}/{parameter.name}", parameter, tensor) for kind, parameter, tensor in moments]
    trees = {FILE: {**named, "optimizer": optimizer}, DISTRIBUTED: buffers}
    return {file: tree for file, tree in trees.items() if tree is not None}, weights + stored


def _chunk(
    modules: Modules, rank: Rank, chunk: int, experts: int, *, own_layers: bool
) -> tuple[dict[str, Any], list[Stored]]:
    """The state of a model chunk, and the tensors in it."""
    state: dict[str, Any] = {}
    stored: list[Stored] = []
    first = modules.layers[rank.stage][chunk].start
    for module, parameter in modules.held(rank, chunk):
        name = renumber(module, -first, -experts * rank.ep_rank)
        state[name] = tensor = new_tensor(parameter.dtype, parameter.shape)
        stored.append((parameter.name, parameter, tensor))
        owner = name.rpartition(".")[0]
        if has_scales(owner, own_layers=own_layers):
            state[f"{owner}.{NO_WEIGHTS}"] = None
    if (rank.stage, chunk) == (modules.grid.pp - 1, modules.num_chunks - 1):
        state[HEAD.replace("weight", NO_WEIGHTS)] = None
    return state, stored


def _places(parameter: LocalParameter, tensor: StoredTensor, file: str, start: int) -> Iterator[tuple[Box, Place]]:
    """The boxes of the whole tensor that a rank's tensor holds, each in rows of it, and where these lie."""
    row = parameter.numel // parameter.shape[0]
    for box, local in parameter.pairs:
        assert local.size[1:] == parameter.shape[1:], (parameter, local)
        first = tensor.offset + local.offset[0] * row
        yield box, Place(file, start + first * ITEM_BYTES[tensor.storage.dtype])
