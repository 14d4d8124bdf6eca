"""Which ranks of Megatron hold what: names of its rank folders, and layers of its pipeline stages. Pure; no torch.

`arguments` is what Megatron saves as `args`, by name. It comes from a file that is not trusted: each value that is
used is checked first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from workbench.errors import CheckpointError
from workbench.spec.layout import ParallelLayout

_MOST: Final = 1 << 16  # ranks of an axis, layers: more is damage
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
DEFAULT_VOCAB_MULTIPLE: Final = 128  # --make-vocab-size-divisible-by


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """Position on the three axes that cut a model."""

    stage: int
    ep_rank: int
    tp_rank: int


@dataclass(frozen=True, slots=True)
class RankGrid:
    """Degrees of the axes that cut a model, and the folder of each rank that saves.

    Expert parallelism deals `etp * ep` neighbouring ranks to the experts of a stage, while every `tp` of them share the
    rest of it. So with etp < tp not every pair of a tensor rank and an expert rank exists.
    """

    tp: int
    pp: int
    ep: int
    etp: int

    def folder(self, rank: Rank) -> str:
        """Name of the folder of a rank (`get_checkpoint_name` of megatron/training/checkpointing.py)."""
        stage = f"_{rank.stage:03d}" if self.pp > 1 else ""
        expert = f"_{rank.ep_rank:03d}" if self.ep > 1 else ""
        return f"mp_rank_{rank.tp_rank:02d}{stage}{expert}"

    def rank(self, folder: str) -> Rank | None:
        """The rank whose folder has this name, or None: the inverse of `folder`.

        `mp_rank_00_001` is stage 1 of a pipeline, or expert rank 1 without one.
        """
        match = _RANK_FOLDER.fullmatch(folder)
        if match is None:
            return None
        numbers = [int(number) for number in match.groups() if number is not None]
        stage = numbers.pop(1) if self.pp > 1 and len(numbers) > 1 else 0
        ep_rank = numbers.pop(1) if self.ep > 1 and len(numbers) > 1 else 0
        found = Rank(stage, ep_rank, numbers[0])
        inside = found.tp_rank < self.tp and stage < self.pp and ep_rank < self.ep
        return found if inside and self.folder(found) == folder else None

    def saving(self) -> tuple[Rank, ...]:
        """The fewest ranks that hold all of the model, each of which has a folder, in order."""
        pairs = {(r // self.etp % self.ep, r % self.tp) for r in range(max(self.tp, self.etp * self.ep))}
        return tuple(sorted(Rank(stage, *pair) for stage in range(self.pp) for pair in pairs))

    def find(self, folders: Collection[str], where: str) -> dict[Rank, str]:
        """The ranks that these folders are of, in order; CheckpointError lists all that are missing or too many."""
        ranks = {folder: self.rank(folder) for folder in folders}
        saving = self.saving()
        faults = [f"{self.folder(rank)} is missing" for rank in saving if rank not in ranks.values()]
        faults += [f"{folder} is none of them" for folder, rank in sorted(ranks.items()) if rank is None]
        if faults:
            raise CheckpointError(
                f"{where}: its args say tp={self.tp} pp={self.pp} ep={self.ep}, that is {len(saving)} folders from "
                f"{self.folder(saving[0])} to {self.folder(saving[-1])}, but {', '.join(faults)}; copy all of it again"
            )
        return dict(sorted((rank, folder) for folder, rank in ranks.items() if rank is not None))


def rank_grid(arguments: Mapping[str, Any], where: str) -> RankGrid:
    """The degrees that Megatron's arguments say; CheckpointError for those that it cannot save in rank folders."""
    tp = _number(arguments, "tensor_model_parallel_size", arguments.get("model_parallel_size") or 1, where)
    pp = _number(arguments, "pipeline_model_parallel_size", 1, where)
    ep = _number(arguments, "expert_model_parallel_size", 1, where)
    etp = _number(arguments, "expert_tensor_parallel_size", tp, where)
    if tp % etp:
        raise CheckpointError(
            f"{where}: expert_tensor_parallel_size={etp} does not divide tensor_model_parallel_size={tp}: several "
            "ranks of Megatron wrote the same file then, and some experts are lost; save with torch_dist"
        )
    return RankGrid(tp, pp, ep, etp)


def parallel_layout(arguments: Mapping[str, Any], where: str) -> ParallelLayout:
    """The layout that Megatron's arguments say, of a model that they say too."""
    grid = rank_grid(arguments, where)
    counts = layers_per_stage(arguments, where)
    even = len(set(counts)) == 1
    return ParallelLayout(
        tp=grid.tp,
        pp=grid.pp,
        vpp=len(counts) // grid.pp,
        dp=grid.ep,
        ep=grid.ep,
        etp=None if grid.etp == grid.tp else grid.etp,
        pp_layout=None if even else counts,
        sequence_parallel=bool(arguments.get("sequence_parallel")) and grid.tp > 1,
        vocab_multiple=_number(arguments, "make_vocab_size_divisible_by", DEFAULT_VOCAB_MULTIPLE, where),
    )


def layers_per_stage(arguments: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Layers of each virtual stage in the order of the network; with vpp chunks a stage there are pp x vpp of them.

    Follows get_num_layers_to_build of megatron/core/transformer/transformer_block.py.
    """
    layers = _number(arguments, "num_layers", None, where)
    pp = _number(arguments, "pipeline_model_parallel_size", 1, where)
    if (text := arguments.get("pipeline_model_parallel_layout")) is not None:
        return _counts_of_layout(text, layers, pp, where)
    vpp = _number(arguments, "virtual_pipeline_model_parallel_size", 1, where) if pp > 1 else 1
    first, last = (
        _number(arguments, name, None, where) if arguments.get(name) is not None else None
        for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    )
    embedding, loss = (bool(arguments.get(f"account_for_{end}_in_pipeline_split")) for end in ("embedding", "loss"))
    rest = layers + embedding + loss - (first or 0) - (last or 0)
    middle = pp - (first is not None) - (last is not None)
    per_stage, over = divmod(rest, middle) if middle > 0 else (0, rest)
    stages = [per_stage] * pp
    if first is not None:
        stages[0] = first
    if last is not None:
        stages[-1] = last
    counts = [count // vpp for _ in range(vpp) for count in stages]
    counts[0] -= embedding
    counts[-1] -= loss
    if over or rest < 0 or any(count % vpp for count in stages) or min(counts) < 0:
        raise CheckpointError(
            f"{where}: its args give num_layers={layers} to pipeline_model_parallel_size={pp} x "
            f"virtual_pipeline_model_parallel_size={vpp} with {_words(arguments)}, which does not come out even; "
            "the args are damaged"
        )
    return tuple(counts)


def parse_layout(text: str) -> tuple[str, ...]:
    """The stages that a pipeline_model_parallel_layout writes, each a word of E (embedding), t (a layer), m, L (loss).

    `Et*3|(tt|)*29,m|L` is Ettt, 29 times tt, m and L. ValueError when it is none.
    """
    text = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        if sum(len(word) * int(times[:9]) for word, times in re.findall(pattern, text)) > _MOST:
            raise ValueError(f"more than {_MOST} letters")
        text = re.sub(pattern, lambda match: match[1] * int(match[2]), text)
    if strange := set(text) - set("Etm|L"):
        raise ValueError(f"{min(strange)!r} is none of E, t, m, L, |")
    return tuple(text.split("|"))


def _counts_of_layout(text: Any, layers: int, pp: int, where: str) -> tuple[int, ...]:
    shown = f"{where}: pipeline_model_parallel_layout={text!r}"
    if not isinstance(text, str):
        raise CheckpointError(f"{shown} is not a text such as 'Et*3|(tt|)*29L'")
    try:
        stages = parse_layout(text)
    except ValueError as error:
        raise CheckpointError(f"{shown} is not a layout: {error}") from None
    whole = "".join(stages)
    if len(stages) % pp or whole != "E" + "t" * layers + "m" * whole.count("m") + "L":
        raise CheckpointError(
            f"{shown} is {len(stages)} stages with {whole.count('t')} layers, but the args say "
            f"pipeline_model_parallel_size={pp} and num_layers={layers}, from E to L"
        )
    return tuple(stage.count("t") for stage in stages)


def _words(arguments: Mapping[str, Any]) -> str:
    names = [f"decoder_{end}_pipeline_num_layers" for end in ("first", "last")]
    names += [f"account_for_{end}_in_pipeline_split" for end in ("embedding", "loss")]
    return ", ".join(f"{name}={arguments.get(name)}" for name in names)


def _number(arguments: Mapping[str, Any], name: str, default: Any, where: str) -> int:
    """A positive number among the arguments, or the default when it is not given."""
    value = arguments.get(name)
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= _MOST:
        raise CheckpointError(f"{where}: its args say {name}={value!r}, which is no number from 1 to {_MOST}")
    return value
