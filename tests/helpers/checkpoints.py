"""Random native checkpoints of any model at any layout, made in NumPy; and what holds tensors in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from workbench.checkpoint.manifest import TrainingState
from workbench.checkpoint.reader import NativeSource, open_native
from workbench.checkpoint.writer import assemble, commit, copy_tokenizer, prepare, rank_tag, write_rank_files
from workbench.spec.dtypes import NUMPY_NAMES
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig
from workbench.spec.schema import logical_tensors, parameter_specs
from workbench.spec.stored import stored_tensors


class MemorySource:
    """Whole tensors in memory as a TensorSource."""

    def __init__(self, tensors: Mapping[str, LogicalTensor], arrays: Mapping[str, np.ndarray]) -> None:
        self._tensors, self.arrays = tensors, arrays

    @property
    def schema(self) -> Mapping[str, LogicalTensor]:
        """Every logical tensor by name."""
        return self._tensors

    def chunks(self, name: str) -> tuple[Box, ...]:
        """The whole tensor."""
        return (Box.whole(self._tensors[name].shape),)

    def read(self, name: str, box: Box) -> np.ndarray:
        """A view of the box."""
        return self.arrays[name][box.slices]


MOMENTS = ("optim.exp_avg", "optim.exp_avg_sq")
RUN = TrainingState(
    step=100,
    samples=800,
    tokens=25600,
    seed=7,
    scheduler={"schedule": "cosine", "horizon": 200, "warmup": 10, "lr": 0.01, "min_lr": 0.001},
    optimizer={"name": "adamw", "step": 98, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
)
"""Where a run stood."""


def tiny_model(**changes: object) -> ModelConfig:
    """A decoder of a few thousand parameters with every hazard: odd vocabulary, grouped KV heads, tied embeddings."""
    fields: dict[str, object] = {
        "vocab_size": 53,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
    }
    return ModelConfig.model_validate(fields | changes)


def checkpoint_schema(model: ModelConfig, dtype: str = "BF16", *, optimizer: bool = True) -> dict[str, LogicalTensor]:
    """Every logical tensor of a checkpoint of `model`: weights in `dtype`, moments of those that are trained in F32."""
    tensors = logical_tensors(model, dtype)
    specs = parameter_specs(model, ParallelLayout()) if optimizer else ()
    for moment in MOMENTS:
        for part in (part for spec in specs if spec.role != "balance" for part in spec.parts):
            name = f"{moment}/{part.name}"
            tensors[name] = LogicalTensor(name, part.shape, "F32")
    return tensors


def random_arrays(tensors: Mapping[str, LogicalTensor], seed: int = 0) -> dict[str, np.ndarray]:
    """Random values in storage dtype, a function of the seed and each tensor's name; finite in every dtype."""
    return {name: _random_array(tensor, seed) for name, tensor in tensors.items()}


def _random_array(tensor: LogicalTensor, seed: int) -> np.ndarray:
    key = hashlib.blake2s(f"{seed} {tensor.name}".encode(), digest_size=8).digest()
    values = np.random.default_rng(int.from_bytes(key, "little")).standard_normal(tensor.shape, np.float32)
    if tensor.dtype == "BF16":
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16).reshape(tensor.shape)
    return values.astype(NUMPY_NAMES[tensor.dtype])


def random_source(model: ModelConfig, dtype: str = "BF16", *, optimizer: bool = True, seed: int = 0) -> MemorySource:
    """A random checkpoint of `model` in memory."""
    tensors = checkpoint_schema(model, dtype, optimizer=optimizer)
    return MemorySource(tensors, random_arrays(tensors, seed))


def write_native(
    path: Path,
    source: MemorySource,
    model: ModelConfig,
    layout: ParallelLayout | None = None,
    *,
    training: TrainingState | None = None,
    tokenizer: Path | None = None,
) -> Path:
    """Writes a source as a native checkpoint, rank by rank, as a training run of `layout` would."""
    layout = layout or ParallelLayout()
    partial = prepare(path)
    entries = []
    by_rank: dict[str, list[tuple[LogicalTensor, Box, Callable[[], np.ndarray]]]] = {}
    for weight, held in stored_tensors(model, layout).items():
        for name in (weight, *(f"{moment}/{weight}" for moment in MOMENTS)):
            for tp_rank, box in zip(held.tp_ranks, held.boxes, strict=True) if name in source.schema else ():
                tag = rank_tag(tp_rank, held.stage, held.ep_rank if layout.ep > 1 else None)
                item = (source.schema[name], box, lambda name=name, box=box: source.read(name, box))
                by_rank.setdefault(tag, []).append(item)
    for tag, items in by_rank.items():
        entries.append(write_rank_files(partial, tag, items))
    checksums = copy_tokenizer(tokenizer, partial) if tokenizer else None
    manifest = assemble(entries, model=model, layout=layout, training=training, tokenizer=checksums)
    commit(partial, path, manifest)
    return path


def random_native(
    path: Path,
    model: ModelConfig | None = None,
    layout: ParallelLayout | None = None,
    *,
    dtype: str = "BF16",
    optimizer: bool = True,
    seed: int = 0,
) -> MemorySource:
    """Writes a random native checkpoint at `path` and returns what it holds, in memory."""
    model = model or tiny_model()
    source = random_source(model, dtype, optimizer=optimizer, seed=seed)
    write_native(path, source, model, layout, training=RUN)
    return source


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a native checkpoint, whole."""
    return whole_arrays(open_native(path))


def whole_arrays(source: NativeSource | MemorySource) -> dict[str, np.ndarray]:
    """Every tensor of a source, whole."""
    return {name: source.read(name, Box.whole(tensor.shape)) for name, tensor in source.schema.items()}
