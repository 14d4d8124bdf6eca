"""LoRA: the base is frozen, each chosen projection learns an update of low rank (Hu et al., arXiv:2106.09685)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from workbench.spec.execution import FrozenFormat
from workbench.spec.lora import HEAD, AdapterRecord, LoraSpec, is_factor, resolved_targets

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig
    from workbench.models.decoder import DecoderStage
    from workbench.spec.geometry import ParameterSpec
    from workbench.spec.model import ModelConfig


class LoraTable(LoraSpec):
    """[method] kind = "lora": train an update of low rank beside frozen weights."""

    kind: Literal["lora"] = "lora"
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Of the adapters' inputs, while training.")
    b_lr_ratio: float = Field(
        default=1.0, gt=0, description="Learning rate of B over that of A; 16 in LoRA+ (arXiv:2402.12354)."
    )

    frozen_format: FrozenFormat = Field(
        default="plain",
        description="How the weights of the layers' projections are held while they stand still: plain, or in 4 bits "
        "each (nf4; QLoRA, arXiv:2305.14314), for which Workbench needs its extra qlora.",
    )

    @property
    def spec(self) -> LoraSpec:
        """The shape of the adapter, as a checkpoint records it."""
        return LoraSpec.model_validate(self.model_dump(include=set(LoraSpec.model_fields)))


class Lora:
    """Freezes the base and attaches a pair of factors to each target; a sequence head is trained whole."""

    name = "lora"
    table = LoraTable

    def check(self, table: LoraTable, model: ModelConfig) -> None:
        """Raises ConfigError naming each target that the model does not have, or why it cannot be adapted at all."""
        resolved_targets(model, table.spec)

    def faults(self, table: LoraTable, config: FinetuneConfig, model: ModelConfig) -> list[str]:
        """Why adapters do not go with the rest of the run."""
        modules, found = resolved_targets(model, table.spec), []
        if HEAD in modules and config.kernels.loss_chunk_tokens:
            found.append(
                f"kernels.loss_chunk_tokens={config.kernels.loss_chunk_tokens} multiplies with the head's weight "
                f"alone, but method.targets has {HEAD!r}; set loss_chunk_tokens = 0 or leave the head out"
            )
        if table.dropout and any(".experts." in module for module in modules):
            found.append(
                f"method.dropout={table.dropout:g} of experts, whose rows have left their places; set dropout = 0"
            )
        if table.dropout and model.num_encoder_layers:
            found.append(f"method.dropout={table.dropout:g} with an encoder, whose tokens are others; set dropout = 0")
        if table.dropout and config.kernels.compile:
            found.append(
                f"method.dropout={table.dropout:g} and kernels.compile=true: its masks depend on the batch, which "
                "breaks the graph of each layer; set compile = false or dropout = 0"
            )
        if table.frozen_format == "nf4":
            found += _nf4_faults(table)
        return found

    def attach(self, table: LoraTable, stage: DecoderStage) -> None:
        """Adds the adapters, without values yet, and freezes what they adapt."""
        from finetune.adapters._lora_layers import attach

        attach(stage, table.spec, table.dropout)

    def rate(self, table: LoraTable, model: ModelConfig, spec: ParameterSpec) -> float:
        """b_lr_ratio for B: of the two factors, the one that begins as zero."""
        return table.b_lr_ratio if is_factor(spec.parts[0].name) and spec.init == "zeros" else 1.0

    def record(self, table: LoraTable, *, base: str, base_fingerprint: str) -> AdapterRecord | None:
        """What the checkpoint says of the adapter."""
        return AdapterRecord(lora=table.spec, base=base, base_fingerprint=base_fingerprint)


def _nf4_faults(table: LoraTable) -> list[str]:
    found = []
    if table.dora:
        found.append(
            "method.dora=true and frozen_format='nf4': magnitudes begin as the lengths of the base's own rows, which "
            "rounding to 4 bits changes; drop one"
        )
    if find_spec("bitsandbytes") is None:
        found.append("method.frozen_format='nf4': bitsandbytes is not installed; pip install 'workbench[qlora]'")
    return found


ADAPTER = Lora()
