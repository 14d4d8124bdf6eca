"""A run of Megatron as one source: weights, the moments of Adam beside them, and where the run stood. No torch.

Moments become tensors of the same names as the weights, so that one rule leads from either to the logical tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from converters.cast import cast_array
from converters.megatron.buffers import MASTER, MOMENTS, State
from converters.megatron.modules import BUFFERS
from converters.megatron.pieces import ForeignTensor, PieceSource, match_pieces
from converters.megatron.table import Table
from converters.megatron.training import left_out, param_groups, training_state
from converters.names import summarise
from converters.rules import Rule
from workbench.checkpoint.manifest import TrainingState
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.model import ModelConfig
from workbench.spec.schema import OPTIMIZER_PREFIX, logical_tensors


@dataclass(frozen=True)
class Run:
    """What Megatron saves of a run beside its tensors: `args`, all that is not sharded, the state of the optimizer."""

    arguments: Mapping[str, Any]
    common: Mapping[str, Any]
    optimizer: Any


@dataclass(frozen=True)
class Opened:
    """A run as one source. fault: why the state of the optimizer cannot be read, if it cannot."""

    source: PieceSource
    training: TrainingState
    info: Mapping[str, str]
    fault: str | None


def open_run(
    model: ModelConfig,
    table: Table,
    foreign: Mapping[str, ForeignTensor],
    run: Run,
    read: Callable[[], State],
    where: str,
) -> Opened:
    """Weights, which are `foreign`, and the state of the optimizer, which `read` returns.

    Where the optimizer keeps 32-bit masters of weights, they are the weights: rounded, they are what the model has.
    ConversionError when a weight has no place.
    """
    state, fault = _read_state(read, foreign, where)
    masters = {name: t for name, t in state.get(MASTER, {}).items() if foreign[name].dtype != t.dtype}
    shapes = {name: tensor.shape for name, tensor in logical_tensors(model, "F32").items()}
    rules, tensors = dict(table.rules), {**foreign, **masters}
    for kind, moments in state.items():
        for name, rule in table.rules.items() if kind != MASTER else ():
            if rule.foreign in moments:
                moment = f"{OPTIMIZER_PREFIX}{kind}/{name}"
                rules[moment] = Rule(moment, f"{kind}/{rule.foreign}", rule.view)
                shapes[moment] = shapes[name]
                tensors[f"{kind}/{rule.foreign}"] = moments[rule.foreign]
    groups = param_groups(run.optimizer)
    dropped = left_out(run.common, groups)
    info = {f"left out: {name}": reason for name, reason in dropped.items()}
    if masters:
        before = ", ".join(sorted({foreign[name].dtype for name in masters}))
        info["weights"] = f"the 32-bit masters of the optimizer; the model has them rounded to {before}"
    return Opened(
        source=PieceSource(match_pieces(shapes, rules, tensors, where), rules, tensors),
        training=training_state(run.arguments, run.common, groups, where),
        info=info,
        fault=fault,
    )


def _read_state(
    read: Callable[[], State], weights: Mapping[str, ForeignTensor], where: str
) -> tuple[State, str | None]:
    """What `read` returns; or nothing, and why it cannot be read or does not belong to these weights."""
    try:
        state = read()
        trained = [name for name in weights if not name.endswith(BUFFERS)]
        for kind in MOMENTS if state else ():
            if missing := [name for name in trained if name not in state.get(kind, {})]:
                return {}, f"{where}: {summarise(missing, 'has', 'have')} no {kind}: a run here trains all weights"
        fault = _contradiction(weights, state.get(MASTER, {}))
    except (CheckpointError, ConversionError) as error:
        return {}, str(error)
    return (state, None) if fault is None else ({}, f"{where}: {fault}")


def _contradiction(weights: Mapping[str, ForeignTensor], masters: Mapping[str, ForeignTensor]) -> str | None:
    """Where weights are not their masters, rounded: looked for in one row of each, at its begin and at its end.

    Any other order of parameters in the buffers, and any shift of them, shows there.
    """
    schema = {name: LogicalTensor(name, weights[name].shape, weights[name].dtype) for name in masters}
    source = PieceSource(schema, {name: Rule(name, name) for name in masters}, weights)
    try:
        for name, master in masters.items():
            for piece in {id(piece): piece for piece in (master.pieces[0], master.pieces[-1])}.values():
                row = Box((0,) * len(piece.box.size), (*(1 for _ in piece.box.size[:-1]), *piece.box.size[-1:]))
                kept = cast_array(piece.locate().read(row), master.dtype, schema[name].dtype)
                if kept.tobytes() != source.read(name, row.shift(piece.box.offset)).tobytes():
                    return (
                        f"{name!r} is not its 32-bit master in the optimizer's state, rounded; the state is of other "
                        "weights, or was damaged when it was saved (megatron-core 0.16, fully_reshardable, with "
                        "several buckets)"
                    )
    finally:
        source.close()
    return None
