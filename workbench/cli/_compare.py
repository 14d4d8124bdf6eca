"""What `wb verify A B` and `wb diff A B` share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.cli.common import Output
from workbench.errors import ConfigError

if TYPE_CHECKING:
    from converters.diagnosis import Diagnosis
    from converters.format import OpenedCheckpoint
    from converters.verify import Comparison

_SHOWN = 12


@dataclass(frozen=True)
class Compared:
    """Two checkpoints, how their tensors compare and what of it is likely, in which fields their models differ, and
    what had to be left out of the comparison."""

    first: OpenedCheckpoint
    second: OpenedCheckpoint
    comparison: Comparison
    diagnosis: Diagnosis
    model: Mapping[str, tuple[Any, Any]]
    notes: list[str]

    def describe(self) -> dict[str, Any]:
        """All of it as JSON values."""
        from converters.verify import describe

        return {
            "first": str(self.first.path),
            "second": str(self.second.path),
            **describe(self.comparison),
            "diagnosis": self.diagnosis.describe(),
            "model": dict(self.model),
            "notes": self.notes,
        }


def compare_checkpoints(out: Output, first: Path, second: Path, *, recorded: bool) -> Compared:
    """The comparison of two checkpoints.

    When one side has no optimizer state at all, the other's is left out and said so. `recorded`: trust the
    fingerprints that the checkpoints carry instead of reading every byte.
    """
    from converters.diagnosis import diagnose
    from converters.open import open_checkpoint
    from converters.verify import compare, compute_fingerprints, model_differences
    from workbench.spec.schema import OPTIMIZER_PREFIX

    sides = [open_checkpoint(first), open_checkpoint(second)]
    if sides[0].path.resolve() == sides[1].path.resolve():
        raise ConfigError(f"{first} and {second} are the same folder; name two checkpoints")
    has = [any(name.startswith(OPTIMIZER_PREFIX) for name in side.source.schema) for side in sides]
    notes = []
    if has[0] != has[1]:
        notes.append(f"{sides[has.index(False)].path} has no optimizer state; only weights are compared")
    schemas = [
        {n: t for n, t in side.source.schema.items() if all(has) or not n.startswith(OPTIMIZER_PREFIX)}
        for side in sides
    ]
    fingerprints = []
    for side, schema in zip(sides, schemas, strict=True):
        known = {n: side.fingerprints[n] for n in schema if side.fingerprints.get(n)} if recorded else {}
        names = schema.keys() - known.keys()
        total = sum(_bytes(schema[name]) for name in names)
        with out.progress(f"reading {side.path.name}", total=total, unit="B") as bar:
            found = compute_fingerprints(side.source, names=names, progress=bar.advance)
        fingerprints.append({**known, **found})
    both = (fingerprints[0], fingerprints[1])
    comparison = compare(schemas[0], schemas[1], both)
    diagnosis = diagnose(sides[0].source, sides[1].source, comparison, both)
    model = model_differences(sides[0].model, sides[1].model)
    return Compared(sides[0], sides[1], comparison, diagnosis, model, notes)


def _bytes(tensor: Any) -> int:
    from converters.plan import tensor_bytes

    return tensor_bytes(tensor)


def comparison_text(first: Path, second: Path, compared: Compared) -> str:
    """A comparison for people, the first dozen faults of each kind."""
    comparison, likely = compared.comparison, compared.diagnosis.tensors
    if comparison.equal:
        lines = [f"equal: {len(comparison.same)} tensors, bit for bit"]
    else:
        lines = [f"{len(comparison.same)} tensors are equal, bit for bit"]
    groups = (
        ("layers or experts are not what they were", list(compared.diagnosis.units)),
        ("tensors differ", [f"{name} {likely[name]}" if name in likely else name for name in comparison.different]),
        ("tensors have another shape", [f"{name}: {text}" for name, text in comparison.shape.items()]),
        ("tensors have another dtype", [f"{name}: {text}" for name, text in comparison.dtype.items()]),
        (f"tensors are only in {first}", list(comparison.only_first)),
        (f"tensors are only in {second}", list(comparison.only_second)),
        ("fields of the model differ", [f"model.{name}: {a!r} and {b!r}" for name, (a, b) in compared.model.items()]),
    )
    for what, names in groups:
        if names:
            lines.append(f"{len(names)} {what}:")
            lines += [f"  {name}" for name in names[:_SHOWN]]
            lines += [f"  and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return "\n".join([*lines, *(f"note: {note}" for note in compared.notes)])
