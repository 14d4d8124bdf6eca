"""Megatron's "torch" checkpoints: a folder for each rank that cuts the model, with one file of torch.save in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from converters.format import OpenedCheckpoint, WriteRequest
from converters.formats._folder import FolderDestination
from converters.formats._megatron_legacy_contents import rank_folders
from converters.megatron.arguments import load_arguments, with_vocabulary
from converters.megatron.buffers import State
from converters.megatron.modules import Modules
from converters.megatron.optimizer import Run, open_run
from converters.megatron.pieces import ForeignTensor, PlacedPiece, gather
from converters.megatron.rank_files import RELEASE, Held, RankFile, Whole, find_iteration, read_rank_files
from converters.megatron.rank_optimizer import rank_file_state
from converters.megatron.stages import load_layout
from converters.megatron.table import EMBEDDING, Spelling, Table, make_table, spelling_of
from converters.untrusted.torch_file import StridedTensor
from workbench.checkpoint.source import TensorSource
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.geometry import Box
from workbench.spec.model import ModelConfig

NAME: Final = "megatron"
_COMPARE_BYTES: Final = 1 << 22


@dataclass(frozen=True)
class MegatronFormat:
    """What Megatron-LM saves with --ckpt-format torch: any degrees, Transformer Engine's layers or its own, and the
    files of its versions before Megatron-Core."""

    name: str = NAME

    def recognises(self, path: Path) -> bool:
        """Whether `path` holds rank folders, or a tracker that names a folder which does."""
        return path.is_dir() and find_iteration(path) is not None

    def open(self, path: Path, *, family: str | None = None, vocab_size: int | None = None) -> OpenedCheckpoint:
        """The weights of all ranks as logical tensors.

        CheckpointError when files are missing or contradict each other, ConversionError when an argument or a tensor
        has no place, or nobody says how large the vocabulary is without its padding.
        """
        folder = find_iteration(path)
        assert folder is not None, path
        where = str(folder)
        arguments, grid, files = read_rank_files(folder)
        said = load_arguments(with_vocabulary(arguments, vocab_size, where), where)
        layout = load_layout(said.given, where)
        version = _version(files[0])
        found = _find(files, Whole(said.model, layout, grid, version), said.model, where)
        modules = Modules(
            found.table.tensors,
            {name: tensor.dtype for name, tensor in found.foreign.items()},
            grid,
            layout.chunks(said.model.num_hidden_layers),
            grouped=found.spelling.experts == "grouped",
            tied=said.model.tie_word_embeddings,
        )
        run = Run(said.given, files[0].state, files[0].state.get("optimizer"))

        def state() -> State:
            return rank_file_state(files, modules, said.given)

        opened = open_run(said.model, found.table, found.foreign, run, state, where)
        return OpenedCheckpoint(
            format=NAME,
            path=path,
            source=opened.source,
            model=said.model,
            layout=layout,
            training=None if folder.name == RELEASE else opened.training,
            family=family,
            lineage=({"format": NAME, "name": path.resolve().name},),
            info={"files": f"{len(files)}, version {version:g}", **opened.info},
            check=lambda _: _compare(found.copies),
            unplaced=found.unplaced,
            optimizer_fault=opened.fault,
        )

    def destination(self, request: WriteRequest) -> FolderDestination:
        """A release for Megatron-LM to be written, at any degrees."""

        def reopen(folder: Path) -> TensorSource:
            return self.open(folder).source

        return FolderDestination(request, rank_folders(request), reopen)


def _version(file: RankFile) -> float:
    version = file.state.get("checkpoint_version", 0)
    if version not in (0, 1, 2, 3):
        raise ConversionError(f"{file.path}: checkpoint_version={version!r} is not known; 0 to 3 are")
    return float(version)


@dataclass(frozen=True)
class _Found:
    """The tensors of all ranks by their names in the whole model. copies: pairs of places that must hold the same."""

    spelling: Spelling
    table: Table
    foreign: Mapping[str, ForeignTensor]
    copies: list[tuple[Held, Held]]
    unplaced: tuple[str, ...]


def _find(files: Iterable[RankFile], whole: Whole, model: ModelConfig, where: str) -> _Found:
    named = [(file, name, place) for file in files for name, place in whole.names(file)]
    names = {name for _, name, _ in named}
    spelling = spelling_of(names, model)
    rows = next((place.shape[0] * whole.grid.tp for _, name, place in named if name == EMBEDDING and place.shape), None)
    table = make_table(model, spelling, padded_vocab=rows)
    tensors = table.tensors
    pieces, copies = _sort(
        part for file, name, place in named if name in tensors for part in whole.held(tensors[name], file.rank, place)
    )
    foreign = {name: gather(name, tensors[name].shape, found, where) for name, found in pieces.items()}
    return _Found(spelling, table, foreign, copies, tuple(sorted(names - tensors.keys())))


def _sort(held: Iterable[Held]) -> tuple[dict[str, list[PlacedPiece]], list[tuple[Held, Held]]]:
    """The pieces of each tensor, and pairs of a piece and a copy of it."""
    firsts: dict[tuple[str, Box], Held] = {}
    pieces: dict[str, list[PlacedPiece]] = {}
    copies = []
    for part in held:
        first = firsts.setdefault((part.name, part.box), part)
        if first is part:
            pieces.setdefault(part.name, []).append(PlacedPiece(part.box, part.place))
        else:
            copies.append((first, part))
    return pieces, copies


def _compare(copies: Iterable[tuple[Held, Held]]) -> None:
    """CheckpointError when ranks hold the same tensor with different bytes: the first one, with its ranks' files."""
    faults = [
        f"{first.name!r} differs between {first.place.file} and {copy.place.file}"
        for first, copy in copies
        if not _equal(first.place, copy.place)
    ]
    if faults:
        raise CheckpointError(
            f"{faults[0]}{f' and {len(faults) - 1} more' if len(faults) > 1 else ''}: ranks that hold the same tensor "
            "must hold the same bytes, so a file is damaged or of another save"
        )


def _equal(first: StridedTensor, second: StridedTensor) -> bool:
    """Whether two places hold the same bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    one, other = np.atleast_1d(first.mapped(), second.mapped())
    rows = max(1, _COMPARE_BYTES // max(1, one[:1].nbytes))
    return all(one[row : row + rows].tobytes() == other[row : row + rows].tobytes() for row in range(0, len(one), rows))


FORMAT = MegatronFormat()
