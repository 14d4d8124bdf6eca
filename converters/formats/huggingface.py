"""Hugging Face folders: config.json, safetensors weights in one file or several, tokenizer files. NumPy, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.family import Family, detect_family, family_for, family_named
from converters.format import OpenedCheckpoint, WriteRequest
from converters.formats._folder import FolderDestination
from converters.formats._huggingface_destination import huggingface_destination
from converters.formats._huggingface_files import CONFIG, read_json
from converters.formats._huggingface_source import HuggingFaceSource
from workbench.errors import ConversionError
from workbench.spec.model import ModelConfig
from workbench.tokenizer import tokenizer_files

GENERATION_CONFIG = "generation_config.json"
NAME = "huggingface"


@dataclass(frozen=True)
class HuggingFaceFormat:
    """What `from_pretrained` reads and `save_pretrained` writes."""

    name: str = NAME

    def recognises(self, path: Path) -> bool:
        """Whether `path` is a folder with a model's config.json."""
        others = ("adapter_config.json", ".metadata", "zero")  # of adapters, torch.distributed.checkpoint, DeepSpeed
        return (path / CONFIG).is_file() and not any((path / name).exists() for name in others)

    def open(self, path: Path, *, family: str | None = None, vocab_size: int | None = None) -> OpenedCheckpoint:
        """The folder as logical tensors.

        CheckpointError when it is damaged, ConversionError when the family has no place for a key or a tensor.
        """
        found, model, config = read_model(path, family)
        source = HuggingFaceSource(path, found, model)
        info = {"architecture": found.architecture(model)}
        if source.match.ignored:
            reasons = {why: 0 for why in source.match.ignored.values()}
            for why in source.match.ignored.values():
                reasons[why] += 1
            info["ignored tensors"] = "; ".join(f"{count} ({why})" for why, count in reasons.items())
        return OpenedCheckpoint(
            format=NAME,
            path=path,
            source=source,
            model=model,
            tokenizer=tokenizer_in(path),
            family=found.name,
            lineage=(birth(path, found, config),),
            info=info,
            unplaced=source.match.over,
        )

    def destination(self, request: WriteRequest) -> FolderDestination:
        """A folder to be written. ConversionError when no family, or not the asked one, can hold the model."""
        return huggingface_destination(request, *family_of(request))


def read_model(folder: Path, family: str | None) -> tuple[Family, ModelConfig, dict[str, Any]]:
    """The family, the model and the words of a folder's config.json; `family` names it when the file does not."""
    where = str(folder / CONFIG)
    config = read_json(folder / CONFIG)
    found = family_named(family) if family else detect_family(config, where)
    return found, found.load_config(config, where), config


def tokenizer_in(folder: Path) -> Path | None:
    """The folder, if a tokenizer's files lie in it."""
    return folder if tokenizer_files(folder) else None


def family_of(request: WriteRequest) -> tuple[Family, Mapping[str, Any]]:
    """The family to write a model as: the one asked for, the one that it was read as, or one that can hold it.

    With it the line of the lineage that records the folder of this family that it came from, or an empty one.
    """
    birth = birth_of(request.lineage)
    known = birth.get("family") if birth else None
    if request.family:
        family = family_named(request.family)
    elif isinstance(known, str) and _can_hold(family_named(known), request):
        family = family_named(known)
    else:
        family = family_for(request.model)
    return family, birth if birth and known == family.name else {}


def _can_hold(family: Family, request: WriteRequest) -> bool:
    try:
        family.dump_config(request.model, "float32")
    except ConversionError:
        return False
    return True


def birth(path: Path, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The line of the lineage that says where the model came from, with the words of its configuration."""
    generation = path / GENERATION_CONFIG
    return {
        "format": NAME,
        "name": path.resolve().name,
        "family": family.name,
        "config": dict(config),
        "generation_config": read_json(generation) if generation.is_file() else None,
    }


def birth_of(lineage: tuple[Mapping[str, Any], ...]) -> Mapping[str, Any] | None:
    """The latest line of a lineage that records a Hugging Face folder, or None."""
    found = [entry for entry in lineage if entry.get("format") == NAME and isinstance(entry.get("config"), Mapping)]
    return found[-1] if found else None


FORMAT = HuggingFaceFormat()
