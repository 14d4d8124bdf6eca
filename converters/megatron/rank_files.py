"""The files of Megatron's rank folders: what each holds of the tensors of the whole model, and where. No torch.

A rank's `model_optim_rng.pt` names what it holds by its own counting: layers of its stage, experts of its share, rows
of its cut. Here it gets the names and boxes of the whole model, as `converters.megatron.table` has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from converters.megatron.pieces import within
from converters.megatron.ranks import Rank, RankGrid, rank_grid
from converters.megatron.table import EMBEDDING, HEAD, LAYERS, NO_WEIGHTS, McoreTensor
from converters.untrusted.plain import PlainObject
from converters.untrusted.torch_file import StridedTensor, read_torch
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

TRACKER: Final = "latest_checkpointed_iteration.txt"
RELEASE: Final = "release"
FILE: Final = "model_optim_rng.pt"
_RENAMED: Final = tuple(  # names before Megatron-Core, and what they became
    (re.compile(old), new)
    for old, new in (
        (r"language_model\.(?:encoder|transformer)\.final_(?:norm|layernorm)\.", "decoder.final_layernorm."),
        (r"language_model\.(?:encoder|transformer)\.", "decoder."),
        (r"language_model\.(embedding|output_layer)\.", r"\1."),
        (r"word_embeddings_for_head\.", "output_layer."),
        (r"(\.\d+)\.input_norm\.", r"\1.input_layernorm."),
        (r"(\.\d+)\.post_attention_(?:norm|layernorm)\.", r"\1.pre_mlp_layernorm."),
        (r"(\.\d+)\.attention\.", r"\1.self_attention."),
        (r"\.self_attention\.query_key_value\.", ".self_attention.linear_qkv."),
        (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
        (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
        (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
    )
)
_COMPUTED: Final = (NO_WEIGHTS, "rotary_pos_emb.inv_freq", "rotary_emb.inv_freq")
_LAYER = re.compile(re.escape(LAYERS) + r"\.(\d{1,6})\.(.*)")
_EXPERT = re.compile(r"(mlp\.experts\.(?:local_experts\.|linear_fc[12]\.(?:weight|bias)))(\d{1,6})(\..*)?")


@dataclass(frozen=True)
class RankFile:
    """What a rank saved."""

    rank: Rank
    path: Path
    state: Mapping[str, Any]

    @property
    def chunks(self) -> list[dict[str, StridedTensor]]:
        """The tensors of each of the rank's model chunks by name; CheckpointError when it has none."""
        models = [self.state["model"]] if "model" in self.state else []
        while not models or f"model{len(models)}" in self.state:
            if f"model{len(models)}" not in self.state:
                raise CheckpointError(f"{self.path}: has neither 'model' nor 'model0', so it holds no weights")
            models.append(self.state[f"model{len(models)}"])
        return [dict(_flatten(model, "", str(self.path))) for model in models]


@dataclass(frozen=True, slots=True)
class Held:
    """A box of a tensor of the whole model, where it lies, and in which rank's file."""

    name: str
    box: Box
    place: StridedTensor


def iteration_folder(step: int | None) -> tuple[str, str]:
    """The folder of an iteration, or with None of a release, and what the tracker says of it."""
    return (RELEASE, RELEASE) if step is None else (f"iter_{step:07d}", str(step))


def find_iteration(path: Path) -> Path | None:
    """The folder that holds rank folders: `path`, or the one that its tracker names; None when there is none."""
    if any(path.glob(f"mp_rank_*/{FILE}")):
        return path
    try:
        folder = tracked_iteration(path)
    except CheckpointError:
        return None
    return folder if folder is not None and any(folder.glob(f"mp_rank_*/{FILE}")) else None


def tracked_iteration(path: Path) -> Path | None:
    """The folder that the tracker of a run names; None without a tracker, CheckpointError when it names none."""
    tracker = path / TRACKER
    if not tracker.is_file():
        return None
    try:
        with tracker.open("rb") as file:
            word = file.read(32).decode("ascii", "replace").strip()
    except OSError as error:
        raise CheckpointError(f"{tracker}: cannot be read: {error.strerror}") from error
    if word != RELEASE and not (word.isascii() and word.isdigit()):
        raise CheckpointError(f"{tracker}: {word!r} is neither a number nor {RELEASE!r}")
    folder = path / iteration_folder(None if word == RELEASE else int(word))[0]
    if not folder.is_dir():
        raise CheckpointError(f"{tracker}: names iteration {word}, but there is no {folder.name}")
    return folder


def read_rank_files(folder: Path) -> tuple[dict[str, Any], RankGrid, list[RankFile]]:
    """Megatron's arguments, its degrees, and the file of every rank in order.

    CheckpointError when files are missing, damaged, or of different saves.
    """
    folders = sorted(path.name for path in folder.glob("mp_rank_*"))
    first = read_torch(folder / folders[0] / FILE)
    arguments = _arguments(first, folder / folders[0] / FILE)
    grid = rank_grid(arguments, str(folder))
    found = []
    for rank, name in grid.find(folders, str(folder)).items():
        path = folder / name / FILE
        state = first if name == folders[0] else read_torch(path)
        said = _arguments(state, path)
        for where, mine, others in (
            ("iteration", state.get("iteration"), first.get("iteration")),
            ("checkpoint_version", state.get("checkpoint_version"), first.get("checkpoint_version")),
            ("args", rank_grid(said, str(path)), grid),
        ):
            if mine != others:
                raise CheckpointError(
                    f"{path}: its {where} is {mine}, but {others} in {folders[0]}; these are files of several saves"
                )
        found.append(RankFile(rank, path, state))
    return arguments, grid, found


def _arguments(state: Any, path: Path) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds {type(state).__name__}, not a dictionary")
    said = state.get("args")
    if isinstance(said, PlainObject):
        return said.attributes
    raise CheckpointError(f"{path}: has no 'args' of Megatron-LM, which say what model this is")


def _flatten(tree: Any, prefix: str, where: str) -> Iterator[tuple[str, StridedTensor]]:
    """The tensors of a nested state dictionary by their names in Megatron-Core, without what only looks like one."""
    if not isinstance(tree, dict):
        raise CheckpointError(f"{where}: holds {type(tree).__name__} {prefix[:-1]!r}, not a dictionary of tensors")
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name.endswith(_COMPUTED):
            _refuse_scales(name, value, where)
        elif isinstance(value, StridedTensor):
            for old, new in _RENAMED:
                name = old.sub(new, name)
            yield name, value
        else:
            yield from _flatten(value, f"{name}.", where)


def _refuse_scales(name: str, value: Any, where: str) -> None:
    """ConversionError when what Transformer Engine keeps beside the weights is more than nothing."""
    scales = value.mapped().tobytes() if isinstance(value, StridedTensor) and value.dtype == "U8" else b""
    if b"amax_history_fwd" in scales:
        raise ConversionError(f"{where}: {name!r} holds scales of fp8 with delayed scaling, which are not read")


def renumber(name: str, layers: int, experts: int) -> str:
    """The name of a tensor when so many layers and experts more come before its own."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    layer, rest = int(match[1]), match[2]
    if expert := _EXPERT.fullmatch(rest):
        rest = f"{expert[1]}{int(expert[2]) + experts}{expert[3] or ''}"
    return f"{LAYERS}.{layer + layers}.{rest}"


class Whole:
    """From a rank's counting to that of the whole model."""

    def __init__(self, model: ModelConfig, layout: ParallelLayout, grid: RankGrid, version: float) -> None:
        self.grid, self._model, self._version = grid, model, version
        self._layers = layout.chunks(model.num_hidden_layers)
        if version < 2 and model.num_key_value_heads != model.num_attention_heads:
            raise ConversionError(
                f"checkpoint_version={version} orders queries, keys and values as no model with grouped queries does"
            )
        if model.moe and model.moe.num_experts % grid.ep:
            raise ConversionError(f"num_experts={model.moe.num_experts} cannot be dealt over ep={grid.ep}")

    def names(self, file: RankFile) -> Iterator[tuple[str, StridedTensor]]:
        """What a file holds, by the names of the whole model."""
        said, chunks = self._layers[file.rank.stage], file.chunks
        if len(chunks) != len(said):
            raise CheckpointError(f"{file.path}: has {len(chunks)} model chunks, but its args say {len(said)}")
        for layers, tensors in zip(said, chunks, strict=True):
            for name, tensor in tensors.items():
                yield self._name(name, layers, file), tensor

    def _name(self, name: str, layers: range, file: RankFile) -> str:
        if name == HEAD and self._model.tie_word_embeddings:
            return EMBEDDING
        match = _LAYER.fullmatch(name)
        if match is None:
            return name
        if int(match[1]) >= len(layers):
            raise CheckpointError(f"{file.path}: {name!r} is past the {len(layers)} layers that its args say")
        share = self._model.moe.num_experts // self.grid.ep if self._model.moe else 0
        return renumber(name, layers.start, share * file.rank.ep_rank)

    def held(self, tensor: McoreTensor, rank: Rank, place: StridedTensor) -> Iterator[Held]:
        """The boxes of a tensor of the whole model that a rank's tensor is made of.

        CheckpointError when it has another shape than the rank's share of the whole.
        """
        grid = self.grid
        tp, tp_rank = (grid.etp, rank.tp_rank % grid.etp) if tensor.num_experts else (grid.tp, rank.tp_rank)
        pairs = tensor.share(tp, tp_rank, grid.ep, rank.ep_rank)
        if not pairs:
            raise CheckpointError(f"{place.file}: holds {tensor.name!r}, which belongs to another rank of ep={grid.ep}")
        shape = tuple(max(local.end[dim] for _, local in pairs) for dim in range(len(tensor.shape)))
        if tensor.num_experts and tensor.expert is None and place.strides == _contiguous(place.shape):
            place = replace(place, shape=shape, strides=_contiguous(shape)) if _same(place.shape, shape) else place
        if place.shape != shape:
            raise CheckpointError(
                f"{place.file}: {tensor.name!r} has shape {list(place.shape)}, but the args say {list(shape)}"
            )
        for box, local in pairs:
            for part, piece in self._in_order(tensor, place):
                if (common := local.intersect(part)) is not None:
                    here = common.relative_to(local).shift(box.offset)
                    yield Held(tensor.name, here, within(piece, common.relative_to(part)))

    def _in_order(self, tensor: McoreTensor, place: StridedTensor) -> Iterator[tuple[Box, StridedTensor]]:
        """The boxes of a rank's tensor as Megatron-Core has it, and their places: of old files, rows of queries, keys
        and values lie in another order (`fix_query_key_value_ordering` of megatron/training/checkpointing.py)."""
        if self._version >= 2 or ".linear_qkv." not in tensor.name or "layer_norm" in tensor.name:
            yield Box.whole(place.shape), place
            return
        d, columns = self._model.head_dim, place.shape[1:]
        heads = place.shape[0] // (3 * d)
        zeros = (0,) * len(columns)
        for head in range(heads):
            for kind in range(3):
                box = Box(((3 * head + kind) * d, *zeros), (d, *columns))
                first, step = ((kind * heads + head) * d, 1) if self._version < 1 else (head * d * 3 + kind, 3)
                rows = within(place, Box((first, *zeros), (1, *columns)))
                yield box, replace(rows, shape=box.size, strides=(place.strides[0] * step, *place.strides[1:]))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def _same(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    return Box.whole(first).numel == Box.whole(second).numel
