"""Full fine-tuning: every parameter is trained, and the checkpoint is a whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from workbench.config import Config

if TYPE_CHECKING:
    from workbench.models.decoder import DecoderStage
    from workbench.spec.lora import AdapterRecord
    from workbench.spec.model import ModelConfig


class FullTable(Config):
    """[method] kind = "full": train every parameter."""

    kind: Literal["full"] = "full"


class Full:
    """Leaves the model as it is."""

    name = "full"
    table = FullTable

    def check(self, table: FullTable, model: ModelConfig) -> None:
        """Every model can be trained whole."""

    def attach(self, table: FullTable, stage: DecoderStage) -> None:
        """Leaves every parameter trainable."""

    def record(self, table: FullTable, *, base: str, base_fingerprint: str) -> AdapterRecord | None:
        """None: the checkpoint does not need the base."""
        return None


ADAPTER = Full()
