"""How a model is spread over ranks: degrees, rank <-> coordinate, layer -> stage. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from workbench.config import Config
from workbench.errors import LayoutError
from workbench.spec.model import ModelConfig

Placement = Literal["loop", "vee"]
Sharding = Literal["none", "zero1", "zero2", "zero3"]
ContextMethod = Literal["all_gather", "ring"]


@dataclass(frozen=True, slots=True)
class Coordinate:
    """Position of a rank on each axis."""

    tp_rank: int
    cp_rank: int
    dp_rank: int
    stage: int


class Degrees(Config):
    """How many ranks share what, as a configuration asks for it and as a layout has it."""

    tp: int = Field(default=1, gt=0, description="Ranks that share each layer (tensor parallelism).")
    cp: int = Field(default=1, gt=0, description="Ranks that share each sequence (context parallelism).")
    pp: int = Field(default=1, gt=0, description="Stages of the pipeline.")
    vpp: int = Field(default=1, gt=0, description="Chunks of layers in each stage (virtual stages).")
    dp: int | Literal["auto"]
    ep: int = Field(
        default=1, gt=0, description="Replicas that share the experts (expert parallelism); it divides dp x cp."
    )
    etp: int | None = Field(
        default=None,
        gt=0,
        description="Tensor ranks that share each expert's width: all of them, as when not set, or 1.",
    )
    pp_layout: tuple[int, ...] | None = Field(
        default=None, description="Layers per virtual stage in the order of the network, when not even: [6, 8, 8, 6]."
    )
    sequence_parallel: bool = Field(
        default=False, description="Tensor-parallel ranks also share the tokens between their layers."
    )
    context: ContextMethod = Field(
        default="all_gather",
        description="How attention comes by the keys and values of other context ranks: all gathered at once "
        "(all_gather), or passed on from rank to rank, each share in turn (ring).",
    )
    shard: Sharding = Field(
        default="none",
        description="What replicas share instead of each holding it whole: nothing; optimizer state (zero1); gradients "
        "as well (zero2); parameters as well (zero3).",
    )
    shard_size: int | None = Field(
        default=None, gt=0, description="Replicas that share one copy (hybrid sharding); all of them when not set."
    )
    vocab_multiple: int = Field(
        default=8, gt=0, description="Each rank's rows of the vocabulary are padded to a multiple of this."
    )


class ParallelLayout(Degrees):
    """Degrees of parallelism. Rank order: tensor fastest, then context, then data, then pipeline.

    A pipeline of `pp` stages with `vpp` chunks of layers each has pp * vpp virtual stages, numbered in the order of the
    network. Data and context ranks hold the same parameters: together they are the replicas that FSDP2 sums over.
    """

    dp: int = Field(default=1, gt=0, description="Copies of the model that split the batch.")
    placement: Placement = Field(
        default="loop",
        description="Which stage holds a chunk: loop goes round the stages again and again, vee there and back.",
    )

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same box of every parameter: data times context."""
        return self.dp * self.cp

    @property
    def shard_degree(self) -> int:
        """Replicas over which each parameter's rows are cut; 1 without sharding."""
        return 1 if self.shard == "none" else self.shard_size or self.replicas

    @property
    def expert_tp(self) -> int:
        """Tensor ranks that share each expert's width."""
        return self.tp if self.etp is None else self.etp

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same box of every expert."""
        return self.replicas // self.ep

    @property
    def expert_shard_degree(self) -> int:
        """Replicas over which the rows of experts are cut: those of `shard_degree` that hold the same ones."""
        return max(self.shard_degree // self.ep, 1)

    @property
    def token_multiple(self) -> int:
        """What the tokens of a row must be a multiple of: two chunks a context rank, each for all tensor ranks."""
        return (2 * self.cp if self.cp > 1 else 1) * (self.tp if self.sequence_parallel else 1)

    def coordinate(self, rank: int) -> Coordinate:
        """Where `rank` stands on each axis."""
        rest, tp_rank = divmod(rank, self.tp)
        rest, cp_rank = divmod(rest, self.cp)
        stage, dp_rank = divmod(rest, self.dp)
        return Coordinate(tp_rank, cp_rank, dp_rank, stage)

    def rank(self, at: Coordinate) -> int:
        """The inverse of `coordinate`."""
        return at.tp_rank + self.tp * (at.cp_rank + self.cp * (at.dp_rank + self.dp * at.stage))

    @property
    def num_virtual(self) -> int:
        """Virtual stages of the whole pipeline."""
        return self.pp * self.vpp

    @property
    def last_stage(self) -> int:
        """The stage that holds the end of the network: the last one in a loop, the first in a vee."""
        return self.home(self.num_virtual - 1)[0]

    def home(self, virtual: int) -> tuple[int, int]:
        """The stage and the chunk that a virtual stage is."""
        return home(self.placement, self.pp, virtual)

    def chunks(self, num_layers: int) -> tuple[tuple[range, ...], ...]:
        """Global layer indices of each chunk of each stage; LayoutError when the layers cannot be dealt out."""
        if self.pp_layout is not None:
            counts = self.pp_layout
        elif num_layers % self.num_virtual:
            low, more = divmod(num_layers, self.num_virtual)
            even = [low + (i < more) for i in range(self.num_virtual)]
            raise LayoutError(
                f"num_hidden_layers={num_layers} cannot be split evenly over {self._virtual_words}; "
                f"use a {'pp' if self.vpp == 1 else 'pp x vpp'} that divides {num_layers} ({_divisors(num_layers)}) "
                f"or pp_layout = {even}"
            )
        else:
            counts = (num_layers // self.num_virtual,) * self.num_virtual
        found: list[list[range]] = [[range(0)] * self.vpp for _ in range(self.pp)]
        start = 0
        for virtual, count in enumerate(counts):
            stage, chunk = self.home(virtual)
            found[stage][chunk] = range(start, start + count)
            start += count
        return tuple(tuple(chunks) for chunks in found)

    def layers(self, num_layers: int, stage: int) -> tuple[int, ...]:
        """Global indices of all layers of `stage`, in the order of the network."""
        return tuple(sorted(index for chunk in self.chunks(num_layers)[stage] for index in chunk))

    @property
    def _virtual_words(self) -> str:
        return f"pp={self.pp}" + (f" x vpp={self.vpp}" if self.vpp > 1 else "")

    def faults(self, model: ModelConfig) -> list[str]:
        """Every reason why this layout cannot hold `model`."""
        return [
            *self._width_faults(model),
            *self._depth_faults(model),
            *self._token_faults(model),
            *self._shard_faults(),
            *self._expert_faults(model),
        ]

    def _width_faults(self, model: ModelConfig) -> list[str]:
        found = []
        heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
        if heads % self.tp:
            found.append(f"num_attention_heads={heads} cannot be split over tp={self.tp}; {_use('tp', heads)}")
        elif kv_heads % self.tp and self.tp % kv_heads:
            found.append(
                f"num_key_value_heads={kv_heads} can neither be split over nor copied evenly to tp={self.tp}; "
                f"use a tp that divides {kv_heads} or is a multiple of it"
            )
        if not all(map(model.has_experts, range(model.num_hidden_layers))) and model.intermediate_size % self.tp:
            found.append(
                f"intermediate_size={model.intermediate_size} cannot be split over tp={self.tp}; "
                f"{_use('tp', model.intermediate_size)}"
            )
        return found

    def _expert_faults(self, model: ModelConfig) -> list[str]:
        moe, found = model.moe, []
        if moe is None:
            given = [
                f"{name}={value}" for name, value in (("ep", self.ep), ("etp", self.etp)) if value not in (1, None)
            ]
            return [f"{' and '.join(given)}: the model has no experts to share; remove them"] if given else []
        if self.replicas % self.ep:
            found.append(f"ep={self.ep} does not divide dp={self.dp} x cp={self.cp}; {_use('ep', self.replicas)}")
        if moe.num_experts % self.ep:
            found.append(
                f"num_experts={moe.num_experts} cannot be dealt over ep={self.ep}; {_use('ep', moe.num_experts)}"
            )
        if self.expert_tp not in (1, self.tp):
            found.append(f"etp={self.etp} is neither 1 nor tp={self.tp}; leave it out or set it to 1")
        if moe.moe_intermediate_size % self.expert_tp:
            found.append(
                f"moe_intermediate_size={moe.moe_intermediate_size} cannot be split over etp={self.expert_tp}; "
                f"{_use('tp', moe.moe_intermediate_size)} or etp = 1"
            )
        if moe.shared_expert_intermediate_size % self.tp:
            width = moe.shared_expert_intermediate_size
            found.append(
                f"shared_expert_intermediate_size={width} cannot be split over tp={self.tp}; {_use('tp', width)}"
            )
        if self.expert_tp == 1 < self.tp and not self.sequence_parallel:
            found.append(
                f"etp=1 with tp={self.tp}: without sequence_parallel every tensor rank would compute all tokens again; "
                "set sequence_parallel = true or leave etp out"
            )
        if self.shard_size is not None and self.shard != "none" and self.shard_size % self.ep:
            found.append(
                f"shard_size={self.shard_size} is not a multiple of ep={self.ep}, so replicas that share parameters "
                f"would hold different experts; use a multiple of {self.ep} or leave shard_size out"
            )
        return found

    def _depth_faults(self, model: ModelConfig) -> list[str]:
        found = []
        if self.placement == "vee" and self.vpp != 2:
            found.append(f"placement='vee' is for vpp=2, not vpp={self.vpp}; use vpp = 2 or a schedule that loops")
        if self.pp_layout is not None:
            if len(self.pp_layout) != self.num_virtual:
                found.append(
                    f"pp_layout has {len(self.pp_layout)} entries, but {self._virtual_words} needs {self.num_virtual}; "
                    "make them equal"
                )
            if sum(self.pp_layout) != model.num_hidden_layers:
                found.append(
                    f"pp_layout adds up to {sum(self.pp_layout)} layers, "
                    f"but num_hidden_layers={model.num_hidden_layers}"
                )
            if any(count < 1 for count in self.pp_layout):
                found.append(f"pp_layout={list(self.pp_layout)} has a stage without layers; give each at least one")
        elif model.num_hidden_layers < self.num_virtual:
            found.append(
                f"num_hidden_layers={model.num_hidden_layers} are fewer than {self._virtual_words} stages; lower "
                + ("pp or vpp" if self.vpp > 1 else "pp")
            )
        elif model.num_hidden_layers % self.num_virtual:
            try:
                self.chunks(model.num_hidden_layers)
            except LayoutError as error:
                found.append(str(error))
        return found

    def _token_faults(self, model: ModelConfig) -> list[str]:
        found = []
        if self.sequence_parallel and self.tp == 1:
            found.append(f"sequence_parallel shares tokens between tensor ranks, but tp={self.tp}; raise tp or drop it")
        if self.cp > 1 and model.num_encoder_layers:
            found.append(
                f"cp={self.cp} with num_encoder_layers={model.num_encoder_layers}: biases by distance and attention to "
                "an encoder's output are computed over whole rows; use cp = 1"
            )
        if self.cp > 1 and self.context == "ring" and model.attention_dropout:
            found.append(
                f"context='ring' computes no attention_dropout={model.attention_dropout}; use context = 'all_gather' "
                "or attention_dropout = 0"
            )
        return found

    def _shard_faults(self) -> list[str]:
        if self.shard_size is None:
            return []
        if self.shard == "none":
            return [f"shard_size={self.shard_size} has no meaning with shard='none'; choose zero1, zero2 or zero3"]
        if self.replicas % self.shard_size:
            return [
                f"shard_size={self.shard_size} does not divide dp={self.dp} x cp={self.cp}; "
                f"{_use('shard_size', self.replicas)}"
            ]
        return []

    def validate_for(self, model: ModelConfig) -> None:
        """Raises one LayoutError with every fault, or returns."""
        if faults := self.faults(model):
            raise LayoutError("; ".join(faults))


def home(placement: Placement, num_stages: int, virtual: int) -> tuple[int, int]:
    """The stage and the chunk that virtual stage number `virtual` is, of `num_stages` stages."""
    chunk, position = divmod(virtual, num_stages)
    return (num_stages - 1 - position if placement == "vee" and chunk % 2 else position), chunk


def virtual_stage(placement: Placement, num_stages: int, stage: int, chunk: int) -> int:
    """The inverse of `home`."""
    position = num_stages - 1 - stage if placement == "vee" and chunk % 2 else stage
    return chunk * num_stages + position


def _divisors(number: int) -> str:
    found = [d for d in range(1, number + 1) if number % d == 0]
    shown = found if len(found) <= 8 else [*found[:7], "..."]
    return ", ".join(map(str, shown))


def _use(axis: str, number: int) -> str:
    return f"use a {axis} that divides {number} ({_divisors(number)})"
