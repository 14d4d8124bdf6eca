"""Folders of torch.distributed.checkpoint: `.metadata`, `.distcp` files, and beside them the model's config.json.

Names are those of transformers' state dictionaries, of torchtitan or our own; optimizer state is that of PyTorch's
`get_optimizer_state_dict`. Which names a folder has is found when it is read. NumPy, no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from converters.containers.dcp import METADATA, GlobalTensor, lay_out_dcp
from converters.family import Family
from converters.format import OpenedCheckpoint, WriteRequest
from converters.formats._dcp_names import TRANSFORMERS, Naming
from converters.formats._dcp_source import RUN_STEP, RUN_TOKENS, TRAINING, read_contents
from converters.formats._files import whole_file
from converters.formats._folder import FolderContents, FolderDestination, foreign_tensors
from converters.formats._huggingface_destination import json_text, main_dtype
from converters.formats._huggingface_files import CONFIG
from converters.formats.huggingface import birth, family_of, read_model, tokenizer_in
from converters.names import summarise
from converters.rules import Rule
from workbench.checkpoint.manifest import training_to_json
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.dtypes import ITEM_BYTES, TORCH_NAMES
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.schema import OPTIMIZER_PREFIX, tied_head, weight_of
from workbench.tokenizer import tokenizer_files

_OPTIMIZER: Final = "optimizer."
_STATE: Final = f"{_OPTIMIZER}state."
_FIRST_FILE: Final = "__0_0.distcp"


@dataclass(frozen=True)
class DcpFormat:
    """What torch.distributed.checkpoint.load reads. names: of the weights that are written."""

    name: str = "dcp"
    names: Naming = field(default=TRANSFORMERS)

    def recognises(self, path: Path) -> bool:
        """Whether `path` has the metadata of such a folder, and not those of Megatron beside; "dcp" reads all names."""
        return self.names is TRANSFORMERS and (path / METADATA).is_file() and not (path / "metadata.json").is_file()

    def open(self, path: Path, *, family: str | None = None, vocab_size: int | None = None) -> OpenedCheckpoint:
        """The folder as logical tensors.

        CheckpointError when it is damaged or has no config.json, ConversionError when its names are not known.
        """
        if not (path / CONFIG).is_file():
            raise CheckpointError(
                f"{path}: has no {CONFIG}, so nothing says which model these tensors make; copy the {CONFIG} of the "
                "model there (save_pretrained of transformers writes it)"
            )
        known, model, config = read_model(path, family)
        found = read_contents(path, known, model)
        info = {"names": found.naming.name, "architecture": known.architecture(model)}
        if found.left:
            info["not taken over"] = ", ".join(sorted({".".join(name.split(".")[:2]) for name in found.left}))
        return OpenedCheckpoint(
            format=self.name,
            path=path,
            source=found.source,
            model=model,
            training=found.training,
            tokenizer=tokenizer_in(path),
            family=known.name,
            lineage=(birth(path, known, config),),
            info=info,
            unplaced=found.unplaced,
        )

    def destination(self, request: WriteRequest) -> FolderDestination:
        """A folder to be written. ConversionError when no family, or not the asked one, can hold the model."""
        family, origin = family_of(request)
        rules = _rules(request, self.names, self.names.table(family))
        tensors = foreign_tensors(request.schema, rules)
        stored = _dealt_out(tensors, request.max_shard_bytes) | _counts(request, tensors)
        laid = lay_out_dcp(stored, {}, planner_data={name: _path(name, self.names) for name in stored})
        dtype = TORCH_NAMES[main_dtype(tensors)]
        texts = {CONFIG: json_text(family.dump_config(request.model, dtype, origin.get("config")))}
        if request.training is not None:
            texts[TRAINING] = json_text(training_to_json(request.training))
        tokenizer = {file.name: file for file in tokenizer_files(request.tokenizer)}
        files = {**laid.files, **{name: whole_file(text) for name, text in texts.items()}}
        contents = FolderContents(files, laid.tensors, rules, copies=tokenizer)
        return FolderDestination(
            request, contents, lambda partial: read_contents(partial, family, request.model).source
        )


def _rules(request: WriteRequest, names: Naming, table: Family) -> dict[str, tuple[Rule, ...]]:
    """Where each logical tensor goes; ConversionError when the request holds others, or not all."""
    if request.adapter is not None:
        raise ConversionError(f"{request.path}: an adapter alone is no model; merge it first, or export it --to peft")
    bound = table.bind(request.model)
    if over := sorted(name for name in request.schema if weight_of(name) not in bound):
        raise ConversionError(f"{request.path}: {summarise(over, 'has', 'have')} no place in family {table.name!r}")
    if missing := sorted(set(bound) - set(request.schema)):
        raise ConversionError(f"{request.path}: {summarise(missing, 'is', 'are')} missing from the source")
    found: dict[str, tuple[Rule, ...]] = {}
    repeats = _repeats(request, table, bound)
    for name in request.schema:
        rule = bound[weight_of(name)]
        if name in bound:
            places = [names.prefix + foreign for foreign in (rule.foreign, *repeats.get(rule.foreign, ()))]
        else:
            kind = name.removeprefix(OPTIMIZER_PREFIX).partition("/")[0]
            places = [f"{_STATE}{rule.foreign}.{kind}"]
        found[name] = tuple(Rule(name, place, rule.view) for place in places)
    return found


def _repeats(request: WriteRequest, table: Family, bound: Mapping[str, Rule]) -> dict[str, list[str]]:
    """By the name of a foreign tensor, what else a state dictionary holds it as (a tied head)."""
    pairs = table.repeats
    if not pairs and tied_head(request.model):
        pairs = {"lm_head.weight": bound["embed_tokens.weight"].foreign}
    own = {rule.foreign for rule in bound.values()}
    found: dict[str, list[str]] = {}
    for name, other in pairs.items():
        if name not in own and other in own:
            found.setdefault(other, []).append(name)
    return found


def _dealt_out(tensors: Mapping[str, LogicalTensor], max_bytes: int) -> dict[str, GlobalTensor]:
    """Every tensor whole in one chunk, in files of at most `max_bytes` (or one tensor)."""
    found: dict[str, GlobalTensor] = {}
    file = filled = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel * ITEM_BYTES[tensor.dtype]
        if filled and filled + num_bytes > max_bytes:
            file, filled = file + 1, 0
        filled += num_bytes
        found[name] = GlobalTensor(tensor.dtype, tensor.shape, ((Box.whole(tensor.shape), f"__{file}_0.distcp"),))
    return found


def _counts(request: WriteRequest, tensors: Mapping[str, LogicalTensor]) -> dict[str, GlobalTensor]:
    """Where the run stood: steps of the run and tokens, and for each weight with moments how often it was updated."""
    training = request.training
    weights = dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.startswith(_STATE))
    if training is None:
        if weights:
            raise ConversionError(f"{request.path}: moments without a step count; leave them out (--optimizer drop)")
        return {}
    updates = struct.pack("<f", training.optimizer.get("step", training.step))
    found = {f"{weight}.step": _count("F32", updates) for weight in weights}
    found[RUN_STEP] = _count("I32", struct.pack("<i", training.step))
    found[RUN_TOKENS] = _count("I64", struct.pack("<q", training.tokens))
    return found


def _count(dtype: str, data: bytes) -> GlobalTensor:
    return GlobalTensor(dtype, (), ((Box((), ()), _FIRST_FILE),), data)


def _path(name: str, names: Naming) -> tuple[str, ...]:
    """The keys that lead to a tensor in a nested state dictionary."""
    if name.startswith(_STATE):
        weight, _, kind = name.removeprefix(_STATE).rpartition(".")
        return ("optimizer", "state", weight, kind)
    if name in (RUN_STEP, RUN_TOKENS):
        return tuple(name.split("."))
    return ("model", name.removeprefix(names.prefix)) if names.prefix else (name,)


FORMAT = DcpFormat()
