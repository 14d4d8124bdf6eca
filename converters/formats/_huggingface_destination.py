"""Where everything will lie in a Hugging Face folder that is to be written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from converters.family import Family
from converters.format import WriteRequest
from converters.formats._files import FileContent, Place, whole_file
from converters.formats._folder import FolderContents, FolderDestination, WrittenPiece, WrittenTensor, foreign_tensors
from converters.formats._huggingface_files import CONFIG, INDEX, WEIGHTS
from converters.formats._huggingface_source import HuggingFaceSource
from converters.formats._model_card import model_card
from converters.names import summarise
from converters.rules import Rule
from workbench.checkpoint.safetensors_io import FileLayout, lay_out
from workbench.errors import ConversionError
from workbench.spec.dtypes import ITEM_BYTES, TORCH_NAMES
from workbench.spec.geometry import Box, LogicalTensor
from workbench.tokenizer import tokenizer_files

_FORMAT_METADATA: Final = {"format": "pt"}  # transformers refuses files without it


def huggingface_destination(request: WriteRequest, family: Family, birth: Mapping[str, Any]) -> FolderDestination:
    """A folder for transformers. `birth`: the line of the lineage that says which such folder the model came from."""
    rules = {name: (rule,) for name, rule in _bind(request, family).items()}
    tensors = foreign_tensors(request.schema, rules)
    layouts = _deal_out(tensors, request.max_shard_bytes)
    pieces = {
        key: WrittenTensor(
            entry.dtype, entry.shape, (WrittenPiece(Box.whole(entry.shape), (Place(file, entry.start),)),)
        )
        for file, layout in layouts.items()
        for key, entry in layout.entries.items()
    }
    weights = {file: FileContent(layout.file_bytes, ((0, layout.prefix),)) for file, layout in layouts.items()}
    texts = _texts(request, family, birth, tensors)
    if len(layouts) > 1:
        texts[INDEX] = _index(tensors, layouts)
    tokenizer = {file.name: file for file in tokenizer_files(request.tokenizer)}
    contents = FolderContents(
        weights | {name: whole_file(text) for name, text in texts.items()}, pieces, rules, copies=tokenizer
    )
    return FolderDestination(request, contents, lambda partial: HuggingFaceSource(partial, family, request.model))


def _texts(
    request: WriteRequest, family: Family, birth: Mapping[str, Any], tensors: Mapping[str, LogicalTensor]
) -> dict[str, bytes]:
    """The contents of the small files, by name."""
    dtype = TORCH_NAMES[main_dtype(tensors)]
    texts = {CONFIG: json_text(family.dump_config(request.model, dtype, birth.get("config")))}
    if not request.model.num_labels:
        texts["generation_config.json"] = json_text(birth.get("generation_config") or _generation_config(request))
    texts["README.md"] = model_card(request, family, dtype).encode()
    return texts


def _index(tensors: Mapping[str, LogicalTensor], layouts: Mapping[str, FileLayout]) -> bytes:
    sizes = {
        "total_size": sum(t.numel * ITEM_BYTES[t.dtype] for t in tensors.values()),
        "total_parameters": sum(t.numel for t in tensors.values()),
    }
    file_of = {key: file for file, layout in layouts.items() for key in layout.entries}
    return json_text({"metadata": sizes, "weight_map": dict(sorted(file_of.items()))})


def _bind(request: WriteRequest, family: Family) -> dict[str, Rule]:
    """The rule of each logical tensor; ConversionError when the request holds others, or not all."""
    if request.adapter is not None:
        raise ConversionError(
            f"{request.path}: an adapter alone is no Hugging Face model; export it with --to peft, or merge it first"
        )
    bound = family.bind(request.model)
    if over := sorted(set(request.schema) - set(bound)):
        moments = all(name.startswith("optim.") for name in over)
        advice = "; leave the optimizer out (--optimizer drop)" if moments else ""
        raise ConversionError(
            f"{request.path}: {summarise(over, 'has', 'have')} no place in a Hugging Face folder of family "
            f"{family.name!r}{advice}"
        )
    if missing := sorted(set(bound) - set(request.schema)):
        raise ConversionError(f"{request.path}: {summarise(missing, 'is', 'are')} missing from the source")
    return bound


def _deal_out(tensors: Mapping[str, LogicalTensor], max_bytes: int) -> dict[str, FileLayout]:
    """Files of at most `max_bytes` (or one tensor), filled in network order; named as save_pretrained names them."""
    groups: list[list[LogicalTensor]] = [[]]
    filled = 0
    for tensor in tensors.values():
        num_bytes = tensor.numel * ITEM_BYTES[tensor.dtype]
        if groups[-1] and filled + num_bytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += num_bytes
    count = len(groups)
    names = [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return {
        name: lay_out([(t.name, t.dtype, t.shape) for t in group], _FORMAT_METADATA)
        for name, group in zip(names, groups, strict=True)
    }


def main_dtype(tensors: Mapping[str, LogicalTensor]) -> str:
    """The element type of most elements."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel
    return max(counts, key=lambda dtype: counts[dtype])


def _generation_config(request: WriteRequest) -> dict[str, Any]:
    model = request.model
    tokens = {
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": model.pad_token_id,
    }
    return {"_from_model_config": True, **{key: value for key, value in tokens.items() if value is not None}}


def json_text(value: Mapping[str, Any]) -> bytes:
    """A JSON file, indented."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
