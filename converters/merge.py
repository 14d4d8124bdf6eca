"""Base and adapter as one source: each weight with its update added, computed as it is read. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from xxhash import xxh3_64

from converters.cast import FLOATS, as_float32, cast_array
from converters.format import OpenedCheckpoint
from converters.formats import peft
from converters.open import open_checkpoint, without_homeless
from converters.verify import compute_fingerprints
from workbench.checkpoint.source import TensorSource
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.lora import (
    EMBEDDING,
    LoraSpec,
    adapter_tensors,
    factor_names,
    held_as,
    magnitude_name,
    merged_model,
    module_of,
)
from workbench.spec.model import ModelConfig
from workbench.spec.schema import logical_tensors

_LEAST = np.finfo(np.float32).tiny
"""Of the length of a row: one of zeros stays as it is."""


class MergedSource:
    """The weights W + s B A of an adapted model, added in fp32 and then rounded once to the base's dtype; with
    magnitudes m (DoRA) each row of the sum has the length that m says."""

    def __init__(self, base: TensorSource, adapter: TensorSource, model: ModelConfig, lora: LoraSpec) -> None:
        """`model` is the adapted model. Raises ConversionError when base and adapter do not fit together."""
        self._base, self._adapter, self._lora = base, adapter, lora
        factors = adapter_tensors(model, lora, "F32")
        expected = logical_tensors(merged_model(model, lora), "F32")
        self._origins = {name: held_as(name, base.schema) for name in expected}
        own = {name for name in expected if name in factors}  # a head that was trained whole
        faults = [f"the adapter lacks {name}" for name in factors if name not in adapter.schema]
        origins = self._origins
        faults += [
            f"the base lacks {name}" for name in expected if name not in own and origins[name] not in base.schema
        ]
        held = {
            **{n: base.schema.get(origins[n]) for n in expected if n not in own},
            **{n: adapter.schema.get(n) for n in factors},
        }
        shapes = {
            **{name: tensor.shape for name, tensor in expected.items()},
            **{n: t.shape for n, t in factors.items()},
        }
        faults += [
            f"{name} has shape {list(tensor.shape)}, not {list(shapes[name])}"
            for name, tensor in held.items()
            if tensor is not None and tensor.shape != shapes[name]
        ]
        faults += [f"{n} is {t.dtype}, not a floating type" for n, t in held.items() if t and t.dtype not in FLOATS]
        if faults:
            more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
            raise ConversionError(f"base and adapter do not fit together: {'; '.join(faults[:4])}{more}")
        self._own = own
        self._adapted = {name for name in expected if factor_names(name)[0] in factors}
        self._schema = {
            name: adapter.schema[name] if name in own else replace(base.schema[origins[name]], name=name)
            for name in expected
        }

    @property
    def schema(self) -> Mapping[str, LogicalTensor]:
        """Every weight of the adapted model."""
        return self._schema

    def chunks(self, name: str) -> tuple[Box, ...]:
        """As base, or adapter, holds it."""
        return self._adapter.chunks(name) if name in self._own else self._base.chunks(self._origins[name])

    def read(self, name: str, box: Box) -> np.ndarray:
        """The box with its update added."""
        if name in self._own:
            return self._adapter.read(name, box)
        dtype = self._schema[name].dtype
        if name not in self._adapted:
            return self._base.read(self._origins[name], box)
        if magnitude_name(name) not in self._adapter.schema:
            return cast_array(self._sum(name, box), "F32", dtype)
        # The length of a row is that of all its columns.
        columns = self._schema[name].shape[1]
        rows = self._sum(name, Box((box.offset[0], 0), (box.size[0], columns)))
        lengths = np.linalg.norm(rows, axis=1)
        gains = self._factor(magnitude_name(name), Box(box.offset[:1], box.size[:1])) / np.maximum(lengths, _LEAST)
        return cast_array(rows[:, box.slices[1]] * gains[:, None], "F32", dtype)

    def _sum(self, name: str, box: Box) -> np.ndarray:
        """W + s B A in the rows and columns of `box`, fp32."""
        a_name, b_name = factor_names(name)
        rank = self._adapter.schema[b_name].shape[1]
        # What an embedding looks up are rows of its weight, and columns of A.
        looks_up = name == f"{EMBEDDING}.weight"
        of_a, of_b = (0, 1) if looks_up else (1, 0)
        a = self._factor(a_name, Box((0, box.offset[of_a]), (rank, box.size[of_a])))
        b = self._factor(b_name, Box((box.offset[of_b], 0), (box.size[of_b], rank)))
        product = (b @ a).T if looks_up else b @ a
        base = as_float32(self._base.read(self._origins[name], box), self._schema[name].dtype)
        merged: np.ndarray = base + product * np.float32(self._lora.scaling_of(module_of(name)))
        return merged

    def _factor(self, name: str, box: Box) -> np.ndarray:
        return as_float32(self._adapter.read(name, box), self._adapter.schema[name].dtype)


def open_merged(
    path: Path,
    *,
    base: Path | None = None,
    family: str | None = None,
    check_base: bool = True,
    allow_drop: Sequence[str] = (),
) -> OpenedCheckpoint:
    """The checkpoint at `path`; when it holds an adapter, the model that it makes of its base.

    `base` says where the base is now, if not where the adapter remembers it. CheckpointError when the base is missing
    or holds other weights than the adapter was trained on.
    """
    if base is not None and peft.FORMAT.recognises(path):
        found = open_merged(base, family=family, allow_drop=allow_drop)
        adapter = without_homeless(peft.open_peft(path, found), allow_drop)
        return merge(adapter, found, check_base=False)
    opened = open_checkpoint(path, family=family, allow_drop=allow_drop)
    if opened.adapter is None:
        return opened
    return merge(opened, open_base(opened, base, allow_drop), check_base=check_base)


def open_base(opened: OpenedCheckpoint, base: Path | None = None, allow_drop: Sequence[str] = ()) -> OpenedCheckpoint:
    """The checkpoint that the adapter `opened` belongs to; if that is an adapter too, merged into its own."""
    assert opened.adapter is not None
    where = base if base is not None else Path(opened.adapter.base)
    if not where.exists():
        raise CheckpointError(
            f"{opened.path}: is an adapter to {opened.adapter.base}, which is not there; say where it is with --base"
        )
    return open_merged(where, family=opened.family, allow_drop=allow_drop)


def merge(opened: OpenedCheckpoint, base: OpenedCheckpoint, *, check_base: bool = True) -> OpenedCheckpoint:
    """The adapter `opened` merged into `base`, as a checkpoint to be copied or run."""
    record = opened.adapter
    assert record is not None
    if check_base and record.base_fingerprint and (found := base_fingerprint(base)) != record.base_fingerprint:
        raise CheckpointError(
            f"{opened.path}: was trained on weights with fingerprint {record.base_fingerprint}, but {base.path} has "
            f"{found}; name the right one with --base"
        )
    model = merged_model(opened.model, record.lora)
    untied = "" if model == opened.model else ", which unties head and embedding"
    return replace(
        base,
        source=MergedSource(base.source, opened.source, opened.model, record.lora),
        model=model,
        training=None,
        tokenizer=opened.tokenizer or base.tokenizer,
        dropped={**base.dropped, **opened.dropped},
        lineage=(*base.lineage, *(entry for entry in opened.lineage if entry not in base.lineage)),
        fingerprints={},
        info={**base.info, "adapter": str(opened.path)},
        edits=(
            *base.edits,
            f"the adapter at {opened.path.absolute()} added to the weights at {base.path.absolute()}{untied}",
        ),
        path=opened.path,
        others=(base.path, *base.others),
    )


def base_fingerprint(opened: OpenedCheckpoint) -> str:
    """One digest of the fingerprints of all weights of a checkpoint: the same in any format and at any layout."""
    names = [name for name in logical_tensors(opened.model, "F32") if name in opened.source.schema]
    known = {name: opened.fingerprints[name] for name in names if opened.fingerprints.get(name)}
    missing = [name for name in names if name not in known]
    if missing:
        known |= compute_fingerprints(opened.source, names=missing)
    lines = "".join(f"{name} {known[name]}\n" for name in sorted(names))
    return xxh3_64(lines.encode()).hexdigest()
