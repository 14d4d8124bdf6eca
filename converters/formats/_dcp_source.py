"""A folder of torch.distributed.checkpoint as logical tensors: weights by a known table of names, and their moments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from converters.family import Family
from converters.formats._dcp_names import LOGICAL, TORCHTITAN, TRANSFORMERS, Naming
from converters.formats._huggingface_files import read_json
from converters.formats._huggingface_source import require_equal
from converters.matching import Match, match
from converters.megatron.pieces import ForeignTensor, PieceSource
from converters.names import summarise
from converters.rules import Rule
from converters.untrusted.dcp import DcpFolder, read_dcp
from workbench.checkpoint.manifest import TrainingState, training_from_json
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.dtypes import NUMPY_NAMES
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.model import ModelConfig
from workbench.spec.schema import OPTIMIZER_PREFIX, weight_of

_NAMINGS: Final = (TRANSFORMERS, TORCHTITAN, LOGICAL)
_OF_OPTIMIZER: Final = re.compile(r"(?:.*?\.)??state\.(.+)\.(\w+)")
_STEP: Final = "step"
TRAINING: Final = "training.json"
RUN_STEP: Final = "train_state.step"
RUN_TOKENS: Final = "train_state.ntokens_seen"
_ADAM: Final = {"exp_avg", "exp_avg_sq"}
_OF_RUNS: Final = ("train_state", "lr_scheduler", "dataloader", "rng", "rng_state", "step", "epoch")
"""What else training programs store at the top: where the run stood, but no weights."""


@dataclass(frozen=True)
class DcpContents:
    """What a folder holds. training: None without a step. left: names of what is of the run and has no place here.
    unplaced: weights that have no place in the model, and what the optimizer holds of them."""

    source: PieceSource
    naming: Naming
    training: TrainingState | None
    left: tuple[str, ...]
    unplaced: tuple[str, ...]


def read_contents(folder: Path, family: Family, model: ModelConfig) -> DcpContents:
    """The folder as logical tensors; ConversionError when it holds other weights than the model has."""
    found = read_dcp(folder)
    tensors = {name: ForeignTensor(t.shape, t.dtype, t.pieces) for name, t in found.tensors.items()}
    values = _of_optimizer(folder, tensors)
    run = {name for name in tensors if name.split(".")[0] in _OF_RUNS or ".param_groups." in f".{name}"}
    others = [name for name in tensors if name not in run and name not in values.values()]
    naming, prefix = _naming(folder, family, model, others)
    if strange := [name for name in others if not name.startswith(prefix)]:
        raise ConversionError(
            f"{folder}: {summarise(strange, 'has', 'have')} no place beside the weights {prefix!r}..."
        )
    if strange := sorted({tensors[name].dtype for name in (*others, *values.values())} - NUMPY_NAMES.keys()):
        raise ConversionError(f"{folder}: holds tensors of type {', '.join(strange)}, which are not read")
    weights = {name.removeprefix(prefix): name for name in others}
    foreign = {key: LogicalTensor(key, tensors[name].shape, tensors[name].dtype) for key, name in weights.items()}
    matched = match(naming.table(family), model, foreign, str(folder), may_leave_over=True)
    if matched.repeated:
        reader = PieceSource(foreign, {key: Rule(key, name) for key, name in weights.items()}, tensors)
        require_equal(folder, matched, foreign, reader)
        reader.close()
    rules = {name: Rule(name, weights[key], rule.view) for name, (key, rule) in matched.places.items()}
    moments = _moments(folder, matched, tensors, values)
    schema = dict(matched.schema)
    for name, rule in moments.items():
        schema[name] = LogicalTensor(name, schema[weight_of(name)].shape, tensors[rule.foreign].dtype)
    steps = [place for (_, kind), place in values.items() if kind == _STEP]
    left = (*sorted(run - {RUN_STEP, RUN_TOKENS}), *sorted(found.objects))
    training = _training(found, steps, {kind for _, kind in values} - {_STEP})
    of_none = {place for (_, kind), place in values.items() if kind != _STEP} - {r.foreign for r in moments.values()}
    unplaced = (*(weights[key] for key in matched.over), *sorted(of_none))
    return DcpContents(PieceSource(schema, rules | moments, tensors), naming, training, left, unplaced)


def _of_optimizer(folder: Path, names: Iterable[str]) -> dict[tuple[str, str], str]:
    """The full name of each value of an optimizer, by the weight's name and the kind of the value."""
    found: dict[tuple[str, str], str] = {}
    for name in names:
        if matched := _OF_OPTIMIZER.fullmatch(name):
            key = (matched[1], matched[2])
            if key in found:
                raise ConversionError(f"{folder}: {found[key]!r} and {name!r} are of two optimizers; only one is read")
            found[key] = name
    return found


def _naming(folder: Path, family: Family, model: ModelConfig, names: Iterable[str]) -> tuple[Naming, str]:
    """The table by which the weights are named and what stands before their names: that by which fewest are missing."""
    present, best = set(names), None
    for naming in _NAMINGS:
        try:
            bound = naming.table(family).bind(model)
        except ConversionError:  # a table that has no place for this model
            continue
        anchor = bound["embed_tokens.weight"].foreign
        for prefix in {name.removesuffix(anchor) for name in present if f".{name}".endswith(f".{anchor}")}:
            missing = len({prefix + rule.foreign for rule in bound.values()} - present)
            if best is None or missing < best[0]:
                best = (missing, naming, prefix)
    if best is None:
        known = ", ".join(naming.name for naming in _NAMINGS)
        raise ConversionError(
            f"{folder}: no table of names ({known}) finds the token embedding of a model of family {family.name!r} "
            f"among {summarise(sorted(present), 'it is', 'they are')}"
        )
    return best[1], best[2]


def _moments(
    folder: Path, matched: Match, tensors: Mapping[str, ForeignTensor], values: Mapping[tuple[str, str], str]
) -> dict[str, Rule]:
    """The rule of each moment: that of its weight, in the tensor of the optimizer."""
    found: dict[str, Rule] = {}
    kinds = sorted({kind for _, kind in values} - {_STEP})
    for name, (key, rule) in matched.places.items():
        for kind in kinds:
            if (place := values.get((key, kind))) is None:
                continue
            expected = rule.foreign_shape(matched.schema[name].shape)
            if tensors[place].shape != expected:
                raise ConversionError(
                    f"{folder}: {place!r} has shape {list(tensors[place].shape)}, not {list(expected)}"
                )
            moment = f"{OPTIMIZER_PREFIX}{kind}/{name}"
            found[moment] = Rule(moment, place, rule.view)
    return found


def _training(found: DcpFolder, steps: list[str], kinds: set[str]) -> TrainingState | None:
    """Where the run stood: as we wrote it beside, or else as far as its counts tell.

    CheckpointError when weights were updated different numbers of times, or other than what is beside says.
    """
    counts = {_scalar(found, place) for place in steps}
    run, tokens = (_scalar(found, name) if name in found.tensors else None for name in (RUN_STEP, RUN_TOKENS))
    stated = None
    if (path := found.path / TRAINING).is_file():
        stated = training_from_json(read_json(path), path)
        counts.add(stated.optimizer.get("step", stated.step))
    if len(counts) > 1:
        raise CheckpointError(f"{found.path}: its weights are at different steps ({min(counts)} to {max(counts)})")
    if stated is not None:
        return stated
    updates = min(counts, default=None)
    step = updates if run is None else run
    optimizer: dict[str, Any] = {"name": "adamw"} if kinds == _ADAM else {}
    if updates is not None:
        optimizer["step"] = updates
    return None if step is None else TrainingState(step, tokens=tokens or 0, optimizer=optimizer)


def _scalar(found: DcpFolder, name: str) -> int:
    """A count that is stored as a tensor."""
    tensor = found.tensors[name]
    if tensor.shape not in ((), (1,)):
        raise CheckpointError(f"{found.path}: {name!r} has shape {list(tensor.shape)}, not that of a count")
    value = tensor.pieces[0].locate().read(Box.whole(tensor.shape)).item()
    if value < 0 or value % 1 != 0:  # so with inf and nan, of which this is nan
        raise CheckpointError(f"{found.path}: {name!r} is {value}, not a count")
    return int(value)
