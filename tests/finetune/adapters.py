"""Native checkpoints of tiny bases and adapters, written as a run writes them."""

from __future__ import annotations

from pathlib import Path

from converters.merge import base_fingerprint
from converters.open import open_checkpoint
from finetune.adapters._lora_layers import attach
from pretrain.checkpointing import Contents, save
from workbench.checkpoint.manifest import TrainingState
from workbench.models.build import BuiltStage, build_stage, initialise
from workbench.parallel.initial import normal
from workbench.parallel.live import LiveParameter, shard_views
from workbench.parallel.mesh import Mesh
from workbench.spec.lora import AdapterRecord, LoraSpec, is_factor
from workbench.spec.model import ModelConfig


def write_base(path: Path, model: ModelConfig, mesh: Mesh | None = None, *, tokenizer: Path | None = None) -> Path:
    """A checkpoint of a model with its initial weights, norms and biases stirred."""
    mesh = mesh or Mesh.single()
    built = build_stage(model, mesh)
    initialise(built.parameters, model, seed=3)
    stir([p for p in built.parameters if p.spec.role in ("norm", "bias")], std=0.1)
    contents = Contents(model, tokenizer=tokenizer)
    save(path, built.parameters, None, mesh, training=TrainingState(step=1), contents=contents)
    return path


def adapted_stage(model: ModelConfig, lora: LoraSpec, mesh: Mesh) -> BuiltStage:
    """A stage with adapters of which nothing is as it began; all else as `write_base` has it."""
    built = build_stage(model, mesh, adapt=lambda stage: attach(stage, lora))
    initialise(built.parameters, model, seed=3)
    stir([p for p in built.parameters if p.spec.role in ("norm", "bias")], std=0.1)
    stir([p for p in built.parameters if is_factor(p.spec.parts[0].name) and p.spec.init == "zeros"], std=0.3)
    return built


def write_adapter(path: Path, model: ModelConfig, lora: LoraSpec, base: Path, mesh: Mesh | None = None) -> Path:
    """A checkpoint of an adapter to the checkpoint at `base`, which `write_base` made."""
    mesh = mesh or Mesh.single()
    built = adapted_stage(model, lora, mesh)
    record = AdapterRecord(lora=lora, base=str(base), base_fingerprint=base_fingerprint(open_checkpoint(base)))
    trainable = [parameter for parameter in built.parameters if parameter.trainable]
    save(path, trainable, None, mesh, training=TrainingState(step=7), contents=Contents(model, adapter=record))
    return path


def stir(parameters: list[LiveParameter], *, std: float) -> None:
    """Adds noise that depends on logical names alone."""
    for parameter in parameters:
        shapes = {part.name: part.shape for part in parameter.spec.parts}
        for shard, view in shard_views(parameter, parameter.data):
            noise = normal(shard.name, shapes[shard.name], shard.box, seed=11, std=std)
            view.add_(noise.to(view.dtype))
