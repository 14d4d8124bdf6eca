"""Full fine-tuning: every parameter is trained, and the checkpoint is a whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from workbench.config import Config
from workbench.spec.geometry import EMBED, FINAL

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig
    from workbench.models.decoder import DecoderStage
    from workbench.spec.geometry import ParameterSpec
    from workbench.spec.lora import AdapterRecord
    from workbench.spec.model import ModelConfig


class FullTable(Config):
    """[method] kind = "full": train every parameter."""

    kind: Literal["full"] = "full"
    layer_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Each layer learns at this share of the rate of the layer above it, embeddings below all of them.",
    )


class Full:
    """Leaves the model as it is."""

    name = "full"
    table = FullTable

    def check(self, table: FullTable, model: ModelConfig) -> None:
        """Every model can be trained whole."""

    def faults(self, table: FullTable, config: FinetuneConfig, model: ModelConfig) -> list[str]:
        """Nothing: it goes with everything."""
        return []

    def attach(self, table: FullTable, stage: DecoderStage) -> None:
        """Leaves every parameter trainable."""

    def rate(self, table: FullTable, model: ModelConfig, spec: ParameterSpec) -> float:
        """layer_decay to the power of how many layers are above."""
        return layer_rate(table.layer_decay, model, spec)

    def record(self, table: FullTable, *, base: str, base_fingerprint: str) -> AdapterRecord | None:
        """None: the checkpoint does not need the base."""
        return None


def layer_rate(decay: float, model: ModelConfig, spec: ParameterSpec) -> float:
    """The share of the learning rate by depth (arXiv:2003.10555, sec. A.1): 1 for the heads, `decay` for the last
    layer, and so on down to the embeddings. A tied embedding counts as an embedding."""
    place = spec.places[0]
    depth = {EMBED: 0, FINAL: model.num_hidden_layers + 1}.get(place, 0) if isinstance(place, str) else place + 1
    return float(decay ** (model.num_hidden_layers + 1 - depth))


ADAPTER = Full()
