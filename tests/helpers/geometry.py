"""Checkpoints that exist as geometry only: a schema and boxes at a layout, without a byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from converters.format import WriteRequest
from tests.helpers.checkpoints import checkpoint_schema
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig
from workbench.spec.schema import weight_of
from workbench.spec.stored import stored_tensors


class GeometrySource:
    """A checkpoint of a model and its Adam moments at a layout, of which nothing can be read."""

    def __init__(self, model: ModelConfig, layout: ParallelLayout) -> None:
        self.schema = checkpoint_schema(model)
        self._stored = stored_tensors(model, layout)

    def chunks(self, name: str) -> tuple[Box, ...]:
        """The boxes that ranks of the layout store."""
        return self._stored[weight_of(name)].boxes

    def read(self, name: str, box: Box) -> np.ndarray:
        """Never called by a planner."""
        raise AssertionError(f"{name} was read")


def geometry_request(source: GeometrySource, model: ModelConfig, layout: ParallelLayout, path: Path) -> WriteRequest:
    """The request for such a checkpoint at another layout."""
    return WriteRequest(path=path, schema=source.schema, model=model, layout=layout)


def large_model(shrink: int = 1) -> ModelConfig:
    """10^12 parameters: 128 layers of 128 experts; fewer layers when shrunk."""
    return ModelConfig.model_validate(
        {
            "vocab_size": 128_000,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "num_hidden_layers": 128 // shrink,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
            "moe": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 2816},
        }
    )
