"""How a model is spread over ranks: degrees, rank <-> coordinate, layer -> stage. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from workbench.config import Config
from workbench.errors import LayoutError
from workbench.spec.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Coordinate:
    """Position of a rank on each axis."""

    tp_rank: int
    dp_rank: int
    stage: int


class ParallelLayout(Config):
    """Degrees of parallelism. Rank order: tensor fastest, then data, then pipeline."""

    tp: int = Field(default=1, gt=0, description="Ranks that share each layer (tensor parallelism).")
    pp: int = Field(default=1, gt=0, description="Stages of the pipeline.")
    dp: int = Field(default=1, gt=0, description="Copies of the model that split the batch.")
    pp_layout: tuple[int, ...] | None = Field(
        default=None, description="Layers per stage, when not even: [6, 8, 8, 6]."
    )
    shard: Literal["none", "zero2", "zero3"] = Field(
        default="none",
        description="What data-parallel ranks share: nothing; optimizer and gradients; parameters as well (FSDP2).",
    )
    vocab_multiple: int = Field(
        default=8, gt=0, description="Each rank's rows of the vocabulary are padded to a multiple of this."
    )

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def coordinate(self, rank: int) -> Coordinate:
        """Where `rank` stands on each axis."""
        return Coordinate(rank % self.tp, rank // self.tp % self.dp, rank // (self.tp * self.dp))

    def rank(self, coordinate: Coordinate) -> int:
        """The inverse of `coordinate`."""
        return coordinate.tp_rank + self.tp * (coordinate.dp_rank + self.dp * coordinate.stage)

    def pipeline(self, tp_rank: int, dp_rank: int) -> tuple[int, ...]:
        """The ranks of one pipeline, by stage."""
        return tuple(self.rank(Coordinate(tp_rank, dp_rank, stage)) for stage in range(self.pp))

    def stages(self, num_layers: int) -> tuple[range, ...]:
        """Global layer indices of each stage; LayoutError when the layers cannot be dealt out."""
        if self.pp_layout is not None:
            counts = self.pp_layout
        elif num_layers % self.pp:
            low = num_layers // self.pp
            even = [low + (i < num_layers % self.pp) for i in range(self.pp)]
            raise LayoutError(
                f"num_hidden_layers={num_layers} cannot be split evenly over pp={self.pp}; "
                f"use a pp that divides {num_layers} ({_divisors(num_layers)}) or pp_layout = {even}"
            )
        else:
            counts = (num_layers // self.pp,) * self.pp
        starts = [sum(counts[:i]) for i in range(len(counts))]
        return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))

    def faults(self, model: ModelConfig) -> list[str]:
        """Every reason why this layout cannot hold `model`."""
        found = []
        heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
        if heads % self.tp:
            found.append(f"num_attention_heads={heads} cannot be split over tp={self.tp}; {_use('tp', heads)}")
        elif kv_heads % self.tp and self.tp % kv_heads:
            found.append(
                f"num_key_value_heads={kv_heads} can neither be split over nor copied evenly to tp={self.tp}; "
                f"use a tp that divides {kv_heads} or is a multiple of it"
            )
        if model.intermediate_size % self.tp:
            found.append(
                f"intermediate_size={model.intermediate_size} cannot be split over tp={self.tp}; "
                f"{_use('tp', model.intermediate_size)}"
            )
        if self.pp_layout is not None:
            if len(self.pp_layout) != self.pp:
                found.append(f"pp_layout has {len(self.pp_layout)} stages, but pp={self.pp}; make them equal")
            if sum(self.pp_layout) != model.num_hidden_layers:
                found.append(
                    f"pp_layout adds up to {sum(self.pp_layout)} layers, "
                    f"but num_hidden_layers={model.num_hidden_layers}"
                )
            if any(count < 1 for count in self.pp_layout):
                found.append(f"pp_layout={list(self.pp_layout)} has a stage without layers; give each at least one")
        elif model.num_hidden_layers < self.pp:
            found.append(f"num_hidden_layers={model.num_hidden_layers} are fewer than pp={self.pp} stages; lower pp")
        else:
            try:
                self.stages(model.num_hidden_layers)
            except LayoutError as error:
                found.append(str(error))
        return found

    def validate_for(self, model: ModelConfig) -> None:
        """Raises one LayoutError with every fault, or returns."""
        if faults := self.faults(model):
            raise LayoutError("; ".join(faults))


def _divisors(number: int) -> str:
    found = [d for d in range(1, number + 1) if number % d == 0]
    shown = found if len(found) <= 8 else [*found[:7], "..."]
    return ", ".join(map(str, shown))


def _use(axis: str, number: int) -> str:
    return f"use a {axis} that divides {number} ({_divisors(number)})"
