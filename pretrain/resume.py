"""Which checkpoint a run goes on from, and whether it is the same run."""

from __future__ import annotations

from pathlib import Path

from pretrain.config import EngineConfig
from pretrain.objective import Objective
from workbench.checkpoint.manifest import Manifest, TrainingState
from workbench.checkpoint.store import Store
from workbench.errors import CheckpointError, ConfigError
from workbench.spec.lora import AdapterRecord
from workbench.spec.model import ModelConfig


def find_checkpoint(store: Store, resume: str) -> Path | None:
    """The newest checkpoint, or None to begin anew, as `run.resume` (auto, never, must) wants it."""
    latest = store.latest()
    if resume == "must" and latest is None:
        raise CheckpointError(f"run.resume = 'must', but {store.root} holds no checkpoint; use 'auto' to begin anew")
    if resume == "never" and latest is not None:
        raise ConfigError(
            f"run.resume = 'never', but {latest} is there; name another run.dir, or use 'auto' to go on from it"
        )
    return latest


def require_same_run(
    manifest: Manifest, config: EngineConfig, model: ModelConfig, objective: Objective, path: Path
) -> TrainingState:
    """The training state of a checkpoint; ConfigError with every value in which it and the configuration differ.

    Layout, batch size, length and learning rate may change between two parts of a run. The model, the seed, the kind of
    optimizer and the order of the data may not. A run of another program has no order of data that could be kept: it
    goes on with the sample after those that it had consumed.
    """
    state = manifest.training
    if state is None:
        raise CheckpointError(
            f"{path}: holds weights only, no training state; a run cannot go on from it, but can finetune from it"
        )
    before, now = manifest.model.model_dump(), model.model_dump()
    faults = [f"model.{key} is {now[key]}, was {before[key]}" for key in now if now[key] != before[key]]
    if state.seed != config.run.seed:
        faults.append(f"run.seed is {config.run.seed}, was {state.seed}")
    if (name := state.optimizer.get("name", config.optim.name)) != config.optim.name:
        faults.append(f"optim.name is {config.optim.name}, was {name}")
    identity = objective.identity
    faults += [
        f"the data's {key} is {identity.get(key)}, was {state.data.get(key)}"
        for key in sorted(identity.keys() | state.data.keys() if state.data else ())
        if identity.get(key) != state.data.get(key)
    ]
    if faults:
        raise ConfigError(f"{path} belongs to another run: {'; '.join(faults)}; restore them, or name another run.dir")
    return state


def require_same_adapter(found: AdapterRecord | None, adapter: AdapterRecord | None, path: Path) -> None:
    """ConfigError unless checkpoint and run both train whole models, or adapters of one shape to the same weights."""
    if found is None and adapter is None:
        return
    if found is None or adapter is None:
        held = "a whole model, not an adapter" if found is None else "an adapter, not a whole model"
        raise ConfigError(f"{path}: holds {held}; name another run.dir for this method")
    before, now = found.lora.model_dump(), adapter.lora.model_dump()
    faults = [f"method.{key} is {now[key]}, was {before[key]}" for key in now if now[key] != before[key]]
    if found.base_fingerprint != adapter.base_fingerprint:
        faults.append(f"the base {adapter.base} holds other weights than {found.base} did")
    if faults:
        raise ConfigError(f"{path} belongs to another run: {'; '.join(faults)}; restore them, or name another run.dir")
