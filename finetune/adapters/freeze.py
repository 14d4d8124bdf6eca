"""Full fine-tuning of the upper part of a model: the layers below keep their weights. It saves a whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from finetune.adapters.full import layer_rate
from workbench.config import Config
from workbench.errors import ConfigError

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig
    from workbench.models.decoder import DecoderStage
    from workbench.spec.geometry import ParameterSpec
    from workbench.spec.lora import AdapterRecord
    from workbench.spec.model import ModelConfig


class FreezeTable(Config):
    """[method] kind = "freeze": train the upper layers and the heads."""

    kind: Literal["freeze"] = "freeze"
    first: int | None = Field(default=None, ge=0, description="How many layers, from the bottom, keep their weights.")
    last: int | None = Field(
        default=None, ge=0, description="How many layers, from the top, are trained, in its place."
    )
    embeddings: bool = Field(
        default=True,
        description="Whether embeddings keep their weights too, and with them a head that is tied to them.",
    )
    layer_decay: float = Field(
        default=1.0, gt=0, le=1, description="Each layer learns at this share of the rate of the layer above it."
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.first is None) == (self.last is None):
            raise ValueError("needs either first = n, the layers to freeze, or last = n, the layers to train")
        return self

    def num_frozen(self, num_layers: int) -> int:
        """How many layers, from the bottom, are frozen."""
        return self.first if self.first is not None else num_layers - (self.last or 0)


class Freeze:
    """Freezes the lower layers and the embeddings; trains all else."""

    name = "freeze"
    table = FreezeTable

    def check(self, table: FreezeTable, model: ModelConfig) -> None:
        """Raises ConfigError when the model has fewer layers than the table speaks of, or nothing is left to train."""
        key, count = ("first", table.first) if table.first is not None else ("last", table.last)
        if count is not None and count > model.num_hidden_layers:
            raise ConfigError(f"method.{key}={count}, but the model has {model.num_hidden_layers} layers; lower it")

    def faults(self, table: FreezeTable, config: FinetuneConfig, model: ModelConfig) -> list[str]:
        """Nothing: it goes with everything."""
        return []

    def attach(self, table: FreezeTable, stage: DecoderStage) -> None:
        """Freezes what this stage has of the lower part."""
        from workbench.parallel.module import ParallelModule
        from workbench.spec.geometry import EMBED

        frozen: set[object] = set(range(table.num_frozen(stage.model.num_hidden_layers)))
        if table.embeddings:
            frozen.add(EMBED)
        for module in stage.modules():
            for name, spec in module.specs.items() if isinstance(module, ParallelModule) else ():
                if spec.places[0] in frozen:
                    module.get_parameter(name).requires_grad_(False)

    def rate(self, table: FreezeTable, model: ModelConfig, spec: ParameterSpec) -> float:
        """layer_decay to the power of how many layers are above."""
        return layer_rate(table.layer_decay, model, spec)

    def record(self, table: FreezeTable, *, base: str, base_fingerprint: str) -> AdapterRecord | None:
        """None: the checkpoint does not need the base."""
        return None


ADAPTER = Freeze()
