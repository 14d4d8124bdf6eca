"""LoRA: the base is frozen, each chosen projection learns an update of low rank (Hu et al., arXiv:2106.09685)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from workbench.spec.lora import AdapterRecord, LoraSpec, resolved_targets

if TYPE_CHECKING:
    from workbench.models.decoder import DecoderStage
    from workbench.spec.model import ModelConfig


class LoraTable(LoraSpec):
    """[method] kind = "lora": train an update of low rank beside frozen weights."""

    kind: Literal["lora"] = "lora"

    @property
    def spec(self) -> LoraSpec:
        """The shape of the adapter, as a checkpoint records it."""
        return LoraSpec(r=self.r, alpha=self.alpha, rslora=self.rslora, targets=self.targets)


class Lora:
    """Freezes the base and attaches a pair of factors to each target; a sequence head is trained whole."""

    name = "lora"
    table = LoraTable

    def check(self, table: LoraTable, model: ModelConfig) -> None:
        """Raises ConfigError naming each target that the model does not have, or why it cannot be adapted at all."""
        resolved_targets(model, table.spec)

    def attach(self, table: LoraTable, stage: DecoderStage) -> None:
        """Adds the adapters, without values yet, and freezes what they adapt."""
        from finetune.adapters._lora_layers import attach

        attach(stage, table.spec)

    def record(self, table: LoraTable, *, base: str, base_fingerprint: str) -> AdapterRecord | None:
        """What the checkpoint says of the adapter."""
        return AdapterRecord(lora=table.spec, base=base, base_fingerprint=base_fingerprint)


ADAPTER = Lora()
