"""What Megatron's rank folders are made of when they are written: the names of Transformer Engine's layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from converters.containers.torch_zip import StoredTensor, lay_out_torch, new_tensor
from converters.format import WriteRequest
from converters.formats._files import FileContent, Place, whole_file
from converters.formats._folder import FolderContents, WrittenPiece, WrittenTensor, foreign_tensors, padding_of
from converters.megatron.modules import LocalParameter, Modules
from converters.megatron.rank_files import FILE, TRACKER, iteration_folder, renumber
from converters.megatron.ranks import Rank, RankGrid
from converters.megatron.saved_args import CHECKPOINT_VERSION, saved_args
from converters.megatron.saved_optimizer import rank_state, saved_training, schedule, with_moments
from converters.megatron.stages import padded_vocab
from converters.megatron.table import HEAD, NO_WEIGHTS, TE, has_scales, make_table
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
    table = make_table(model, TE, padded_vocab=padded_vocab(model, layout))
    rules = with_moments(table.rules, request.schema, masters=False)
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
    args = saved_args(model, layout, request.schema["embed_tokens.weight"].dtype, training, ckpt_format="torch")
    common = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": training.step if training else 0}
    common |= schedule(training) if training else {}
    folder, word = iteration_folder(training.step if training else None)
    files: dict[str, FileContent] = {TRACKER: whole_file(word.encode())}
    places: dict[str, dict[Box, list[Place]]] = {name: {} for name in tensors}
    for rank in grid.saving():
        file = f"{folder}/{grid.folder(rank)}/{FILE}"
        state, stored = _rank(modules, rank, model.moe.num_experts // grid.ep if model.moe else 0, training)
        found = lay_out_torch({**common, **state}, root=FILE.removesuffix(".pt"))
        files[file] = FileContent(found.num_bytes, found.known, found.checksums)
        for name, parameter, tensor in stored:
            for box, place in _places(parameter, tensor, file, found.storages[tensor.storage]):
                places[name].setdefault(box, []).append(place)
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
    modules: Modules, rank: Rank, experts: int, training: TrainingState | None
) -> tuple[dict[str, Any], list[Stored]]:
    """The state of a rank's model chunks and optimizers under the names that these are saved by, and the tensors in it.

    experts: that the rank has of each layer. training: of the run whose optimizer is saved.
    """
    chunks: list[dict[str, Any]] = []
    weights: list[Stored] = []
    for chunk in range(modules.num_chunks):
        state, stored = _chunk(modules, rank, chunk, experts)
        chunks.append(state)
        weights += stored
    named = {f"model{chunk}": state for chunk, state in enumerate(chunks)} if len(chunks) > 1 else {"model": chunks[0]}
    if training is None:
        return named, weights
    optimizer, moments = rank_state(modules, rank, {name: tensor for name, _, tensor in weights}, training)
    stored = [(f"{kind}/{parameter.name}", parameter, tensor) for kind, parameter, tensor in moments]
    return {**named, "optimizer": optimizer}, weights + stored


def _chunk(modules: Modules, rank: Rank, chunk: int, experts: int) -> tuple[dict[str, Any], list[Stored]]:
    """The state of a model chunk, and the tensors in it."""
    state: dict[str, Any] = {}
    stored: list[Stored] = []
    first = modules.layers[rank.stage][chunk].start
    for module, parameter in modules.held(rank, chunk):
        name = renumber(module, -first, -experts * rank.ep_rank)
        state[name] = tensor = new_tensor(parameter.dtype, parameter.shape)
        stored.append((parameter.name, parameter, tensor))
        owner = name.rpartition(".")[0]
        if has_scales(owner):
            state[f"{owner}.{NO_WEIGHTS}"] = None
    if (rank.stage, chunk) == (modules.grid.pp - 1, modules.num_chunks - 1):
        state[HEAD.replace("weight", NO_WEIGHTS)] = None
    return state, stored


def _places(parameter: LocalParameter, tensor: StoredTensor, file: str, start: int) -> Iterator[tuple[Box, Place]]:
    """The boxes of the whole tensor that a rank's tensor holds, each in rows of it, and where these lie."""
    row = parameter.numel // parameter.shape[0] * ITEM_BYTES[tensor.storage.dtype]
    for box, local in parameter.pairs:
        assert local.size[1:] == parameter.shape[1:], (parameter, local)
        yield box, Place(file, start + local.offset[0] * row)
