"""How Megatron deals layers to the stages of a pipeline, and the arguments of a parallel layout. No torch."""

from __future__ import annotations

import re
from typing import Any, Final

from converters.fields import Foreign
from converters.megatron.ranks import positive_number
from converters.untrusted.plain import PlainObject
from workbench.errors import ConversionError
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

KEYS: Final = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
)
_VOCAB_MULTIPLE: Final = 128  # when the arguments do not say
_MAX_STAGES: Final = 1 << 16
_REPEATS: Final = (r"\(([^()]+)\)\*(\d+)", r"(.)\*(\d+)")


def stage_layers(given: Foreign, where: str) -> tuple[int, ...]:
    """Layers of each virtual stage, in the order of the network: chunk 0 of all stages, chunk 1 ...

    As `get_num_layers_to_build` deals them (transformer_block.py). ConversionError when they cannot be dealt so.
    """
    layers = positive_number(given, "num_layers", None, where)
    pp = positive_number(given, "pipeline_model_parallel_size", 1, where)
    if described := given.get("pipeline_model_parallel_layout"):
        counts = _described(described, where)
        if len(counts) % pp or sum(counts) != layers:
            raise ConversionError(
                f"{where}: pipeline_model_parallel_layout={described!r} has {sum(counts)} layers on {len(counts)} "
                f"virtual stages, but num_layers={layers} and pipeline_model_parallel_size={pp}"
            )
        return counts
    chunks = positive_number(given, "virtual_pipeline_model_parallel_size", 1, where) if pp > 1 else 1
    first, last = (_end(given, end, where) for end in ("first", "last"))
    ends = [bool(given.get(f"account_for_{end}_in_pipeline_split")) for end in ("embedding", "loss")]
    stages: list[int | None] = [None] * pp
    if pp > 1:
        stages[0], stages[-1] = first, last
    free = stages.count(None)
    rest = layers + sum(ends) - sum(count or 0 for count in stages)
    each, over = divmod(rest, free) if free else (0, rest)
    whole = [each if count is None else count for count in stages]
    dealt = [count // chunks for _ in range(chunks) for count in whole]
    dealt[0] -= ends[0]
    dealt[-1] -= ends[1]
    if over or any(count % chunks for count in whole) or min(dealt) < 0:
        raise ConversionError(
            f"{where}: num_layers={layers} cannot be dealt to pipeline_model_parallel_size={pp} stages of {chunks} "
            f"chunks with {first} on the first and {last} on the last"
        )
    return tuple(dealt)


def _end(given: Foreign, end: str, where: str) -> int | None:
    """Layers of the first or last stage, if they are said apart."""
    for name in (f"decoder_{end}_pipeline_num_layers", f"num_layers_in_{end}_pipeline_stage"):
        if given.get(name) is not None:
            return positive_number(given, name, None, where)
    return None


def _described(layout: Any, where: str) -> tuple[int, ...]:
    """Layers of each virtual stage of a pipeline_model_parallel_layout: 'Et*3|(tt|)*29,m|L', or a list of lists."""
    if isinstance(layout, PlainObject):  # a PipelineParallelLayerLayout keeps what it was made of
        layout = layout.attributes.get("input_data")
    if isinstance(layout, (list, tuple)) and all(isinstance(stage, (list, tuple)) for stage in layout):
        return tuple(sum(layer in ("t", "decoder") for layer in stage) for stage in layout)
    if not isinstance(layout, str):
        raise ConversionError(f"{where}: pipeline_model_parallel_layout={layout!r} is neither a text nor a list")
    text = layout.replace(",", "")
    for pattern in _REPEATS:
        if sum(int(found[1][:9]) * len(found[0]) for found in re.findall(pattern, text)) > _MAX_STAGES:
            raise ConversionError(f"{where}: pipeline_model_parallel_layout={layout[:80]!r} has too many layers")
        text = re.sub(pattern, lambda found: found[1] * int(found[2]), text)
    if strange := set(text) - set("EtmL|"):
        raise ConversionError(f"{where}: pipeline_model_parallel_layout={layout!r} has {sorted(strange)}")
    return tuple(stage.count("t") for stage in text.split("|"))


def load_layout(given: Foreign, where: str) -> ParallelLayout:
    """The layout that the arguments describe, as far as files depend on it. Data parallelism is what experts need."""
    counts = stage_layers(given, where)
    tp, pp, ep = (
        positive_number(given, f"{axis}_model_parallel_size", 1, where) for axis in ("tensor", "pipeline", "expert")
    )
    etp = positive_number(given, "expert_tensor_parallel_size", tp, where)
    multiple = positive_number(given, "make_vocab_size_divisible_by", _VOCAB_MULTIPLE, where)
    return ParallelLayout(
        tp=tp,
        pp=pp,
        vpp=len(counts) // pp,
        dp=ep,
        ep=ep,
        etp=None if etp == tp else etp,
        pp_layout=None if len(set(counts)) == 1 else counts,
        sequence_parallel=bool(given.get("sequence_parallel")) and tp > 1,
        vocab_multiple=multiple,
    )


def dump_layout(model: ModelConfig, layout: ParallelLayout) -> dict[str, Any]:
    """The arguments of a layout."""
    counts = layout.pp_layout
    even = counts is None or len(set(counts)) == 1
    stages = ["t" * count for count in counts or ()]
    chunks = layout.vpp if layout.pp > 1 and layout.vpp > 1 else None
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": chunks,
        "num_layers_per_virtual_pipeline_stage": model.num_hidden_layers // layout.num_virtual
        if chunks and even
        else None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "pipeline_model_parallel_layout": None if even else f"E{'|'.join(stages)}L",
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
        "context_parallel_size": 1,
        "data_parallel_size": layout.dp,
        "world_size": layout.world_size,
        "sequence_parallel": layout.sequence_parallel,
        "make_vocab_size_divisible_by": layout.vocab_multiple,
        "padded_vocab_size": padded_vocab(model, layout),
    }


def padded_vocab(model: ModelConfig, layout: ParallelLayout) -> int:
    """Rows of the embedding with padding: each tensor rank has a multiple of vocab_multiple (tokenizer.py,
    `_vocab_size_with_padding`)."""
    multiple = layout.vocab_multiple * layout.tp
    return -(-model.vocab_size // multiple) * multiple
