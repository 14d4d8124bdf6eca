"""Opens a checkpoint of whatever format a path holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from converters.drops import allowed_drops
from converters.format import Format, OpenedCheckpoint
from workbench import registry
from workbench.checkpoint.manifest import MANIFEST, read_manifest
from workbench.checkpoint.store import resolve
from workbench.errors import CheckpointError, ConfigError, ConversionError

_PACKAGE = "converters.formats"
_COMMON = ("native", "huggingface")


def formats() -> dict[str, Format]:
    """Every format by name."""
    return registry.discover(_PACKAGE, "FORMAT")


def get_format(name: str) -> Format:
    """The format called `name`; ConfigError names those that exist."""
    known = registry.module_names(_PACKAGE)
    if name in known:
        found: Format = registry.load(_PACKAGE, name, "FORMAT")
        return found
    by_name = formats()
    if name not in by_name:
        raise ConfigError(f"format {name!r} is not known; use one of {', '.join(by_name)}")
    return by_name[name]


def open_checkpoint(
    path: Path, *, family: str | None = None, vocab_size: int | None = None, allow_drop: Sequence[str] = ()
) -> OpenedCheckpoint:
    """The checkpoint at `path`: a native one, a run folder (its latest), or a folder of another format.

    vocab_size: of a checkpoint that does not tell it. CheckpointError when there is none, or when it is unfinished or
    damaged; ConversionError when it tells another vocab_size, or holds tensors that have no place and that no pattern
    of `allow_drop` matches.
    """
    opened = open_as_it_is(path, family=family, vocab_size=vocab_size)
    if vocab_size not in (None, opened.model.vocab_size):
        raise ConversionError(
            f"{opened.path}: its vocabulary has {opened.model.vocab_size} words, not --vocab-size {vocab_size}; "
            "leave it out"
        )
    return without_homeless(opened, allow_drop)


def open_as_it_is(path: Path, *, family: str | None = None, vocab_size: int | None = None) -> OpenedCheckpoint:
    """As `open_checkpoint`, perhaps with tensors that have no place."""
    path = resolve(path)
    return _find(path).open(path, family=family, vocab_size=vocab_size)


def without_homeless(opened: OpenedCheckpoint, allow_drop: Sequence[str]) -> OpenedCheckpoint:
    """Without the tensors that have no place; ConversionError names those that no pattern allows to drop."""
    dropped = allowed_drops(opened.unplaced, allow_drop)
    if homeless := [name for name in opened.unplaced if name not in dropped]:
        from converters.family import family_for, family_named
        from converters.matching import without_place

        known = family_named(opened.family) if opened.family else family_for(opened.model)
        advice = "--allow-drop REGEX leaves out what it matches"
        raise ConversionError(f"{opened.path}: {without_place(known, opened.model, homeless)}; {advice}")
    return replace(opened, unplaced=(), dropped=dropped) if dropped else opened


def _find(path: Path) -> Format:
    """The format of what is at `path`."""
    for name in _COMMON:  # these need no other format's module
        if path.exists() and (common := get_format(name)).recognises(path):
            return common
    known = formats()
    for found in known.values():
        if path.exists() and found.recognises(path):
            return found
    if not path.is_dir() or path.name.endswith(".partial") or (path / MANIFEST).exists():
        read_manifest(path)  # says which it is: missing, a file, unfinished, foreign
    names = ", ".join(known)
    raise CheckpointError(f"{path}: not a checkpoint of any known format ({names}), nor a run folder with one")
