"""A run of Megatron as one source: weights, the moments of Adam beside them, and where the run stood. No torch.

Moments become tensors of the same names as the weights, so that one rule leads from either to the logical tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.cast import cast_array
from converters.megatron.buffers import MASTER, MOMENTS, State
from converters.megatron.modules import BUFFERS
from converters.megatron.pieces import ForeignTensor, PieceSource, match_pieces
from converters.megatron.table import Table
from converters.megatron.training import left_out, plain_data, training_state
from converters.rules import Rule
from workbench.checkpoint.manifest import TrainingState
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.model import ModelConfig
from workbench.spec.schema import OPTIMIZER_PREFIX, logical_tensors

Tensors = Mapping[str, ForeignTensor]


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
    model: ModelConfig, table: Table, foreign: Tensors, run: Run, read: Callable[[], State], where: str
) -> Opened:
    """Weights, which are `foreign`, and the state of the optimizer, which `read` returns.

    Where the optimizer keeps 32-bit masters of weights, they are the weights: rounded, they are what the model has.
    ConversionError when a weight has no place.
    """
    shapes = {name: tensor.shape for name, tensor in logical_tensors(model, "F32").items()}
    weights = _Part(match_pieces(shapes, table.rules, foreign, where), table.rules, foreign)
    state, fault = _read_state(read, shapes, weights, where)
    with plain_data(where):
        training = training_state(run.arguments, run.common, run.optimizer, where)
        info = {f"left out: {name}": reason for name, reason in left_out(run.common, run.optimizer).items()}
    parts = [weights]
    if masters := state.pop(MASTER, None):
        rounded = {name for name in masters.schema if weights.schema[name].dtype != masters.schema[name].dtype}
        parts.append(masters.only(rounded).renamed(f"{MASTER}/"))
        if rounded:
            dtypes = ", ".join(sorted({weights.schema[name].dtype for name in rounded}))
            info["weights"] = f"the 32-bit masters of the optimizer; the model has them rounded to {dtypes}"
    parts += [part.renamed(f"{kind}/", logical=f"{OPTIMIZER_PREFIX}{kind}/") for kind, part in state.items()]
    return Opened(_source(parts), training, info, fault)


@dataclass(frozen=True)
class _Part:
    """Logical tensors, the rule of each, and the foreign tensors that they lie in."""

    schema: Mapping[str, LogicalTensor]
    rules: Mapping[str, Rule]
    tensors: Tensors

    def only(self, names: Collection[str]) -> _Part:
        """Those of `names`."""
        return _Part({name: self.schema[name] for name in names}, self.rules, self.tensors)

    def renamed(self, foreign: str, *, logical: str = "") -> _Part:
        """With these prefixes before foreign and logical names."""
        schema, rules = {}, {}
        for name, tensor in self.schema.items():
            rule, new = self.rules[name], f"{logical}{name}"
            schema[new] = LogicalTensor(new, tensor.shape, tensor.dtype)
            rules[new] = Rule(new, f"{foreign}{rule.foreign}", rule.view)
        return _Part(schema, rules, {f"{foreign}{name}": tensor for name, tensor in self.tensors.items()})


def _source(parts: Sequence[_Part]) -> PieceSource:
    """All parts as one source; of tensors of one name, that of the last part."""
    schema: dict[str, LogicalTensor] = {}
    rules: dict[str, Rule] = {}
    tensors: dict[str, ForeignTensor] = {}
    for part in parts:
        schema |= part.schema
        rules |= {name: part.rules[name] for name in part.schema}
        tensors |= part.tensors
    return PieceSource(schema, rules, tensors)


def _read_state(
    read: Callable[[], State], shapes: Mapping[str, tuple[int, ...]], weights: _Part, where: str
) -> tuple[dict[str, _Part], str | None]:
    """By kind, what `read` returns; or nothing, and why it cannot be read or does not belong to these weights."""
    found: dict[str, _Part] = {}
    try:
        with plain_data(where):
            states = read()
        for kind, tensors in states.items():
            rules = {
                name: rule
                for name, rule in weights.rules.items()
                if not rule.foreign.endswith(BUFFERS) and (kind != MASTER or rule.foreign in tensors)
            }
            found[kind] = _Part(match_pieces(shapes, rules, tensors, f"{where}: {kind}"), rules, tensors)
        if found and (lacking := [kind for kind in MOMENTS if kind not in found]):
            return {}, f"{where}: the state of the optimizer has no {' and no '.join(lacking)}, as Adam's has"
        if MASTER in found and (name := _contradiction(weights, found[MASTER])):
            return {}, (
                f"{where}: {name} is not its 32-bit master in the optimizer's state, rounded; the state is of other "
                "weights, or was damaged when it was saved (megatron-core 0.16, fully_reshardable, several buckets)"
            )
    except (CheckpointError, ConversionError) as error:
        return {}, str(error)
    return found, None


def _contradiction(weights: _Part, masters: _Part) -> str | None:
    """A weight that is not its master, rounded: looked for in one row of each, at its begin and at its end.

    Any other order of parameters in the buffers, and any shift of them, shows there.
    """
    sources = _source([weights]), _source([masters])
    try:
        for name, tensor in masters.schema.items():
            row = (*(1 for _ in tensor.shape[:-1]), *tensor.shape[-1:])
            last = tuple(n - size for n, size in zip(tensor.shape, row, strict=True))
            for box in {Box((0,) * len(row), row), Box(last, row)}:
                used, kept = (source.read(name, box) for source in sources)
                if cast_array(kept, tensor.dtype, weights.schema[name].dtype).tobytes() != used.tobytes():
                    return name
    finally:
        for source in sources:
            source.close()
    return None
