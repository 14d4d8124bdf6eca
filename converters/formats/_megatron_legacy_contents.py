"""What Megatron's rank folders are made of when they are written: the names of Transformer Engine's layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from converters.containers.torch_zip import StoredTensor, lay_out_torch, new_tensor
from converters.format import WriteRequest
from converters.formats._files import FileContent, Place, whole_file
from converters.formats._folder import FolderContents, ForeignTensor, Piece, foreign_tensors
from converters.megatron.modules import LocalParameter, Modules
from converters.megatron.rank_files import FILE, RELEASE, TRACKER, renumber
from converters.megatron.ranks import Rank, RankGrid
from converters.megatron.saved_args import CHECKPOINT_VERSION, saved_args
from converters.megatron.stages import padded_vocab
from converters.megatron.table import HEAD, NO_WEIGHTS, TE, make_table
from converters.names import summarise
from workbench.errors import ConversionError
from workbench.spec.dtypes import ITEM_BYTES
from workbench.spec.geometry import Box
from workbench.spec.schema import tied_head

_HAS_SCALES = re.compile(r"\.linear_\w+$|norm$")
"""Modules of Transformer Engine, which look for scales of fp8 beside their weights."""
Stored = tuple[LocalParameter, StoredTensor]


def rank_folders(request: WriteRequest) -> FolderContents:
    """A release for Megatron-LM: the weights of every rank, without optimizer and random numbers.

    ConversionError or LayoutError when Megatron cannot have this model at this layout.
    """
    model, layout = request.model, request.layout
    layout.validate_for(model)
    table = make_table(model, TE, padded_vocab=padded_vocab(model, layout))
    if over := sorted(request.schema.keys() - table.rules.keys()):
        raise ConversionError(
            f"{request.path}: {summarise(over, 'has', 'have')} no place in a release of Megatron; leave the optimizer "
            "out (--optimizer drop)"
        )
    rules = {name: (table.rules[name],) for name in request.schema}
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
    dtype = request.schema["embed_tokens.weight"].dtype
    args = saved_args(model, layout, dtype, None, ckpt_format="torch")
    files: dict[str, FileContent] = {TRACKER: whole_file(RELEASE.encode())}
    places: dict[str, dict[Box, list[Place]]] = {name: {} for name in tensors}
    for rank in grid.saving():
        file = f"{RELEASE}/{grid.folder(rank)}/{FILE}"
        chunks, stored = _chunks(modules, rank, model.moe.num_experts // grid.ep if model.moe else 0)
        state = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": 0, **chunks}
        found = lay_out_torch(state, root=FILE.removesuffix(".pt"))
        files[file] = FileContent(found.num_bytes, found.known, found.checksums)
        for parameter, tensor in stored:
            for box, place in _places(parameter, file, found.storages[tensor.storage]):
                places[parameter.name].setdefault(box, []).append(place)
    filled = Counter[str]()
    for name, logical in request.schema.items():
        filled[table.rules[name].foreign] += logical.numel
    foreign = {
        name: ForeignTensor(
            whole.dtype,
            whole.shape,
            tuple(Piece(box, tuple(copies)) for box, copies in places[name].items()),
            whole.numel - filled[name],
        )
        for name, whole in tensors.items()
    }
    return FolderContents(files, foreign, rules)


def _chunks(modules: Modules, rank: Rank, experts: int) -> tuple[dict[str, Any], list[Stored]]:
    """The state of each model chunk of a rank under the name that it is saved by, and the tensors in them.

    experts: that a rank has of each layer.
    """
    states: list[dict[str, Any]] = []
    stored: list[Stored] = []
    for chunk in range(modules.num_chunks):
        state: dict[str, Any] = {}
        first = modules.layers[rank.stage][chunk].start
        for module, parameter in modules.held(rank, chunk):
            name = renumber(module, -first, -experts * rank.ep_rank)
            state[name] = tensor = new_tensor(parameter.dtype, parameter.shape)
            stored.append((parameter, tensor))
            owner = name.rpartition(".")[0]
            if _HAS_SCALES.search(owner):
                state[f"{owner}.{NO_WEIGHTS}"] = None
        if (rank.stage, chunk) == (modules.grid.pp - 1, modules.num_chunks - 1):
            state[HEAD.replace("weight", NO_WEIGHTS)] = None
        states.append(state)
    if modules.num_chunks == 1:
        return {"model": states[0]}, stored
    return {f"model{chunk}": state for chunk, state in enumerate(states)}, stored


def _places(parameter: LocalParameter, file: str, start: int) -> Iterator[tuple[Box, Place]]:
    """The boxes of the whole tensor that a rank's parameter holds, each in rows of it, and where these lie."""
    row = parameter.numel // parameter.shape[0] * ITEM_BYTES[parameter.dtype]
    for box, local in parameter.pairs:
        assert local.size[1:] == parameter.shape[1:], (parameter, local)
        yield box, Place(file, start + local.offset[0] * row)
