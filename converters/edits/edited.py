"""A checkpoint with its tensors changed as they are read: what every edit has in common. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from pydantic import ValidationError

from converters.format import OpenedCheckpoint
from workbench.checkpoint.source import TensorSource
from workbench.errors import ConversionError
from workbench.spec.model import ModelConfig
from workbench.spec.schema import OPTIMIZER_PREFIX

_NO_DROPS: Final[Mapping[str, str]] = {}


def edited(
    opened: OpenedCheckpoint,
    source: TensorSource,
    what: str,
    *,
    model: ModelConfig | None = None,
    dropped: Mapping[str, str] = _NO_DROPS,
    goes_on: bool = True,
) -> OpenedCheckpoint:
    """`opened` with the tensors of `source`, and `what` was done for people and for the lineage.

    goes_on: whether training can go on with these tensors; else where the run stood is left out.
    """
    if opened.adapter is not None:
        raise ConversionError(f"{opened.path}: is an adapter; merge it into its base first, with wb merge")
    return replace(
        opened,
        source=source,
        model=model or opened.model,
        training=opened.training if goes_on else None,
        fingerprints={},
        dropped={**opened.dropped, **dropped},
        edits=(*opened.edits, what),
    )


def changed_model(opened: OpenedCheckpoint, changes: Mapping[str, Any]) -> ModelConfig:
    """The model with `changes`; ConversionError with every fault that they make."""
    try:
        return ModelConfig.model_validate({**opened.model.model_dump(), **changes})
    except ValidationError as error:
        raise ConversionError(f"{opened.path}: {'; '.join(fault['msg'] for fault in error.errors())}") from None


def moments(source: TensorSource, why: str) -> dict[str, str]:
    """Every moment of a source, to be dropped, and why."""
    return {name: why for name in source.schema if name.startswith(OPTIMIZER_PREFIX)}
