"""The weights of a Hugging Face folder as a tensor source. NumPy, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from converters.family import Family
from converters.formats._huggingface_files import CONFIG, BoxReader, open_weights
from converters.matching import Match, match
from converters.rules import pull
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.dtypes import NUMPY_NAMES
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.model import ModelConfig

if TYPE_CHECKING:
    import numpy as np

_COMPARE_ROWS: Final = 1024


class HuggingFaceSource:
    """A Hugging Face folder seen as logical tensors (`TensorSource`)."""

    def __init__(self, folder: Path, family: Family, model: ModelConfig) -> None:
        foreign, self._reader = open_weights(folder)
        if strange := sorted({tensor.dtype for tensor in foreign.values()} - NUMPY_NAMES.keys()):
            raise ConversionError(
                f"{folder}: holds tensors of type {', '.join(strange)}: quantized weights are not read"
            )
        self.match: Match = match(family, model, foreign, str(folder), may_leave_over=True)
        require_equal(folder, self.match, foreign, self._reader)

    @property
    def schema(self) -> Mapping[str, LogicalTensor]:
        """Every logical tensor by name."""
        return self.match.schema

    def chunks(self, name: str) -> tuple[Box, ...]:
        """The whole tensor: a foreign tensor lies in one file."""
        return (Box.whole(self.match.schema[name].shape),)

    def read(self, name: str, box: Box) -> np.ndarray:
        """The elements of `box` in storage dtype; may be a view."""
        foreign, rule = self.match.places[name]
        return pull(rule.view, box, lambda part: self._reader.read(foreign, part))

    def close(self) -> None:
        """Gives the files back."""
        self._reader.close()


def require_equal(folder: Path, match: Match, foreign: Mapping[str, LogicalTensor], reader: BoxReader) -> None:
    """Raises CheckpointError unless what is stored twice (a tied head) is equal bit for bit."""
    for name, other in match.repeated:
        tensor = foreign[name]
        equal = (tensor.shape, tensor.dtype) == (foreign[other].shape, foreign[other].dtype)
        for row in range(0, tensor.shape[0] if equal else 0, _COMPARE_ROWS):
            rows = min(_COMPARE_ROWS, tensor.shape[0] - row)
            box = Box((row, *(0 for _ in tensor.shape[1:])), (rows, *tensor.shape[1:]))
            if reader.read(name, box).tobytes() != reader.read(other, box).tobytes():
                equal = False
                break
        if not equal:
            raise CheckpointError(
                f"{folder}: {name!r} differs from {other!r}, but {CONFIG} says tie_word_embeddings=true; "
                "one of them is wrong: set tie_word_embeddings=false to keep both"
            )
