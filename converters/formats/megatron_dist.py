"""Megatron-Core's distributed checkpoints (torch_dist): global tensors in files of torch.distributed.checkpoint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from converters.format import OpenedCheckpoint, Progress, WriteRequest
from converters.formats._folder import FolderDestination
from converters.formats._huggingface_files import read_json
from converters.formats._megatron_dist_contents import BACKEND, COMMON, METADATA, dist_folder
from converters.megatron.arguments import Arguments, load_arguments, with_vocabulary
from converters.megatron.buffers import State
from converters.megatron.dist_optimizer import (
    flat_state,
    is_optimizer_key,
    plain_state,
    require_known_keys,
    whole_tensors,
)
from converters.megatron.distributed import one_by_one, whole_model
from converters.megatron.modules import Modules
from converters.megatron.optimizer import Run, open_run
from converters.megatron.pieces import ForeignTensor
from converters.megatron.rank_files import RELEASE, tracked_iteration
from converters.megatron.ranks import rank_grid
from converters.megatron.stages import load_layout
from converters.megatron.table import EMBEDDING, NO_WEIGHTS, Table, make_table, spelling_of
from converters.names import summarise
from converters.untrusted.dcp import DcpFolder, read_dcp
from converters.untrusted.paths import file_inside
from converters.untrusted.plain import PlainObject
from converters.untrusted.torch_file import read_torch
from workbench.checkpoint.source import TensorSource
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.layout import ParallelLayout

NAME: Final = "megatron_dist"
COMMON_OBJECT: Final = "common_state/shard_0_1"
INTEGRITY: Final = "integrity.json"
_BLOCK_BYTES: Final = 1 << 24
_WITHOUT_WEIGHTS: Final = {
    rf".*\.{NO_WEIGHTS}(/.*)?": "scaling factors of fp8, or nothing",
    r"rng_state/.*": "random numbers here are functions of the seed and the step",
    r"rerun_state_machine_state/.*": "Megatron's own search for faulty hardware",
    re.escape(COMMON_OBJECT): "read as the arguments",
}


@dataclass(frozen=True)
class MegatronDistFormat:
    """What Megatron saves with --ckpt-format torch_dist."""

    name: str = NAME

    def recognises(self, path: Path) -> bool:
        """Whether `path` is such a folder, or one of a run with such a folder as its latest."""
        try:
            return read_json((tracked_iteration(path) or path) / METADATA).get("sharded_backend") == BACKEND
        except CheckpointError:
            return False

    def open(self, path: Path, *, family: str | None = None, vocab_size: int | None = None) -> OpenedCheckpoint:
        """The folder as logical tensors.

        CheckpointError when it is damaged, ConversionError when an argument or a tensor has no place, or nobody says
        how large the vocabulary is without its padding.
        """
        folder = tracked_iteration(path) or path
        where, found = str(folder), read_dcp(folder)
        common = _common(found)
        said = load_arguments(with_vocabulary(_namespace(common, where), vocab_size, where), where)
        layout = load_layout(said.given, where)
        weights = {name: tensor for name, tensor in found.tensors.items() if not is_optimizer_key(name)}
        spelling = spelling_of(one_by_one(weights, said.model), said.model)
        rows = weights[EMBEDDING].shape[0] if EMBEDDING in weights else said.model.vocab_size
        table = make_table(said.model, spelling, padded_vocab=rows)
        foreign, used = whole_model(table, said.model, weights, where)
        notes, unplaced = _left_out(found, weights.keys() - used)

        def state() -> State:
            return _optimizer(found, said, layout, table, foreign)

        run = Run(said.given, common, plain_state(found, common))
        opened = open_run(said.model, table, foreign, run, state, where)
        return OpenedCheckpoint(
            format=NAME,
            path=path,
            source=opened.source,
            model=said.model,
            layout=layout,
            training=None if folder.name == RELEASE else opened.training,
            family=family,
            lineage=({"format": NAME, "name": path.resolve().name},),
            info={**notes, **opened.info},
            check=_checker(folder),
            unplaced=unplaced,
            optimizer_fault=opened.fault,
        )

    def destination(self, request: WriteRequest) -> FolderDestination:
        """A release to be written, in chunks of any layout."""

        def reopen(folder: Path) -> TensorSource:
            return self.open(folder).source

        return FolderDestination(request, dist_folder(request), reopen)


def _common(found: DcpFolder) -> Mapping[str, Any]:
    """What is saved beside the tensors: common.pt, since version 0.19 an object among them."""
    if COMMON_OBJECT in found.objects:
        held = found.read_object(COMMON_OBJECT)
        common = held[0] if isinstance(held, list) and len(held) == 1 else held
    else:
        common = read_torch(found.path / COMMON)
    if not isinstance(common, dict):
        raise CheckpointError(f"{found.path}: its common state is a {type(common).__name__}, not a dictionary")
    return common


def _namespace(common: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    args = common.get("args")
    if not isinstance(args, PlainObject):
        raise ConversionError(
            f"{where}: has no args, Megatron's training arguments, without which its model is not known"
        )
    return args.attributes


def _optimizer(
    found: DcpFolder, said: Arguments, layout: ParallelLayout, table: Table, weights: Mapping[str, ForeignTensor]
) -> State:
    """The optimizer's state by tensor of the whole model, from whichever of its forms is there."""
    require_known_keys(found)
    where = str(found.path)
    state = {}
    for kind, stacks in whole_tensors(found).items():
        state[kind], used = whole_model(table, said.model, stacks, where)
        if over := stacks.keys() - used:
            raise ConversionError(f"{where}: {kind} of {summarise(over, 'has', 'have')} no weight that it belongs to")
    if state:
        return state
    modules = Modules(
        table.tensors,
        {name: tensor.dtype for name, tensor in weights.items()},
        rank_grid(said.given, where),
        layout.chunks(said.model.num_hidden_layers),
        grouped=bool(said.given.get("moe_grouped_gemm")),
        tied=said.model.tie_word_embeddings,
        renamed=said.given.get("transformer_impl") == "local",
    )
    return flat_state(found, modules)


def _left_out(found: DcpFolder, over: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """How many entries without weights there are, and why they are left out; and the names of all others."""
    counts: dict[str, int] = {}
    unplaced = []
    for name in (*over, *(name for name in found.objects if not is_optimizer_key(name))):
        why = next((why for known, why in _WITHOUT_WEIGHTS.items() if re.fullmatch(known, name)), None)
        if why is None:
            unplaced.append(name)
        elif name != COMMON_OBJECT:
            counts[why] = counts.get(why, 0) + 1
    said = "; ".join(f"{count} ({why})" for why, count in counts.items())
    return {"left out: entries": said} if said else {}, tuple(sorted(unplaced))


def _checker(folder: Path) -> Callable[[Progress], None] | None:
    """Reads every file that integrity.json lists and compares its checksum; None where there is none."""
    if not (folder / INTEGRITY).is_file():
        return None

    def check(progress: Progress) -> None:
        said = read_json(folder / INTEGRITY)
        files = said.get("files")
        if said.get("algorithm") != "sha256" or not isinstance(files, dict):
            raise CheckpointError(f"{folder / INTEGRITY}: is not a list of sha256 by file")
        for name, expected in files.items():
            digest = hashlib.sha256()
            try:
                with file_inside(folder, name, INTEGRITY).open("rb") as file:
                    while block := file.read(_BLOCK_BYTES):
                        digest.update(block)
                        progress(len(block))
            except OSError as error:
                raise CheckpointError(f"{folder / name}: cannot be read: {error.strerror}") from error
            if digest.hexdigest() != expected:
                raise CheckpointError(f"{folder / name}: sha256 {digest.hexdigest()}, {INTEGRITY} says {expected}")

    return check


FORMAT = MegatronDistFormat()
