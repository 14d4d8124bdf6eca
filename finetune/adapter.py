"""What an adapter is to a fine-tuning run: a table of the configuration, and what it does to the modules. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from workbench.errors import ConfigError
from workbench.registry import discover

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig
    from workbench.config import Config
    from workbench.models.decoder import DecoderStage
    from workbench.spec.geometry import ParameterSpec
    from workbench.spec.lora import AdapterRecord
    from workbench.spec.model import ModelConfig


class Adapter(Protocol):
    """A way to train a model. A module in `finetune/adapters/` exposes one as ADAPTER; it imports torch late.

    `table` is the class of its [method] table, whose `kind` is the literal `name`.
    """

    @property
    def name(self) -> str: ...

    @property
    def table(self) -> type[Config]: ...

    def check(self, table: Any, model: ModelConfig) -> None:
        """Raises ConfigError when the model cannot be adapted so."""
        ...

    def faults(self, table: Any, config: FinetuneConfig, model: ModelConfig) -> list[str]:
        """Why the method does not go with the rest of the run's configuration, if it does not."""
        ...

    def attach(self, table: Any, stage: DecoderStage) -> None:
        """Changes the modules of a stage whose parameters are still on the meta device, and freezes what stays."""
        ...

    def rate(self, table: Any, model: ModelConfig, spec: ParameterSpec) -> float:
        """By what the learning rate of a parameter is multiplied."""
        ...

    def record(self, table: Any, *, base: str, base_fingerprint: str) -> AdapterRecord | None:
        """What a checkpoint says of the adapter; None when it holds the whole model."""
        ...


def adapters() -> dict[str, Adapter]:
    """Every adapter by name."""
    return discover("finetune.adapters", "ADAPTER")


def require_fit(adapter: Adapter, table: Any, config: FinetuneConfig, model: ModelConfig) -> None:
    """ConfigError naming all that the model does not have, or that does not go with the rest of the run."""
    adapter.check(table, model)
    if faults := adapter.faults(table, config, model):
        raise ConfigError("; ".join(faults))
