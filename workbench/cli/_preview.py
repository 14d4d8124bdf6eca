"""`wb data preview` of rows: samples as a run would see them, with what is learned coloured, and the pre-flight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.cli.common import Output

if TYPE_CHECKING:
    from finetune.chat import Piece
    from finetune.preflight import Survey
    from finetune.task import Prepared
    from workbench.tokenizer import Tokenizer

WHOLE = 1 << 30
"""More tokens than any row has."""
Sample = tuple[str, dict[str, Any], "list[Piece]"]
"""Where a row lies, facts of it, and its text."""


def column_overrides(maps: Sequence[str]) -> list[str]:
    """The words of --map as overrides of a configuration: 'prompt=question' names the column of the prompt."""
    import json

    from workbench.errors import ConfigError

    for word in maps:
        if not all(word.partition("=")):
            raise ConfigError(f"--map {word}: write --map NAME=COLUMN, for example --map prompt=question")
    return [f"task.columns.{name}={json.dumps(column)}" for name, _, column in (word.partition("=") for word in maps)]


def preview_config(
    out: Output, path: str, *, tokenizer: Path | None, maps: Sequence[str], seq_len: int, count: int, chars: int
) -> None:
    """The first training rows of a configuration of `wb finetune`, and its pre-flight."""
    from finetune.config import FinetuneConfig, task_of
    from finetune.preflight import survey
    from workbench.cli._tables import kind_of
    from workbench.cli.finetune import open_base_of
    from workbench.config import load_config
    from workbench.errors import ConfigError, DataError
    from workbench.tokenizer import Tokenizer

    if kind_of(Path(path)) == "pretrain":
        raise ConfigError(f"{path}: is for `wb pretrain`; look into its token file: wb data preview PATH --seq-len N")
    length = [f"batch.seq_len={seq_len}"] if seq_len else []
    config = load_config(path, FinetuneConfig, [*column_overrides(maps), *length]).config
    opened = open_base_of(config)
    folder = tokenizer or config.tokenizer or opened.tokenizer
    if folder is None:
        raise DataError(f"{config.base}: holds no tokenizer; add --tokenizer FOLDER")
    encoder = Tokenizer.load(folder)
    prepared = task_of(config).prepare(config.task, encoder, model=opened.model, max_tokens=config.batch.seq_len)
    found = survey(prepared, seed=config.task.seed, packed_tokens=config.packed_tokens)
    _show(out, path, _samples(prepared, encoder, count, chars), found)


def preview_rows(
    out: Output, source: str, *, tokenizer: Path | None, maps: Sequence[str], seq_len: int, count: int, chars: int
) -> None:
    """The first rows of a file, a folder or a dataset, by their shape; answers as tokens when there is a tokenizer."""
    from finetune.pieces import pieces_of_row, shortened
    from finetune.preflight import survey
    from finetune.rows import read_rows
    from finetune.shapes import ANSWERS, SHAPES, recognise
    from finetune.tasks.sft import SftTable, prepare_answers
    from workbench.tokenizer import Tokenizer

    column_overrides(maps)
    columns = dict(word.split("=", 1) for word in maps)
    recognised = recognise(read_rows([source], columns=columns), SHAPES, columns=columns)
    if tokenizer is not None and recognised.counts.keys() <= set(ANSWERS):
        encoder, table = Tokenizer.load(tokenizer), SftTable(train=(source,), columns=columns)
        prepared = prepare_answers(table, encoder, seq_len or WHOLE)
        _show(out, source, _samples(prepared, encoder, count, chars), survey(prepared, seed=table.seed))
        return
    samples: list[Sample] = [(row.place, {}, shortened(pieces_of_row(row), chars)) for row in recognised.rows[:count]]
    _show(out, source, samples, None, told=recognised.told)


def _samples(prepared: Prepared, tokenizer: Tokenizer, count: int, chars: int) -> list[Sample]:
    from finetune.pieces import pieces_of_example, shortened

    names = prepared.identity.get("labels", [])
    found: list[Sample] = []
    for example in prepared.train[:count]:
        facts: dict[str, Any] = {"tokens": len(example.input_ids), "supervised": example.num_labels}
        if example.labels.ndim == 0 and names:
            facts = {"tokens": len(example.input_ids), "label": names[int(example.labels)]}
        found.append((example.place, facts, shortened(pieces_of_example(example, tokenizer), chars)))
    return found


def _show(out: Output, source: str, samples: Sequence[Sample], found: Survey | None, *, told: str = "") -> None:
    for warning in found.warnings if found else ():
        out.warn(warning)
    shown = [
        {"place": place, **facts, "spans": [{"text": text, "supervised": learned} for text, learned in pieces]}
        for place, facts, pieces in samples
    ]
    result = {"path": source, "samples": shown, **(found.facts if found else {"read_as": told})}
    rendered = _coloured if out.stdout.isatty() else _bracketed
    parts = [
        f"--- {', '.join([place, *(f'{name} {value}' for name, value in facts.items())])}\n{rendered(pieces)}"
        for place, facts, pieces in samples
    ]
    out.result(result, "\n\n".join([*parts, "\n".join(found.told) if found else told]))


def _bracketed(pieces: Sequence[Piece]) -> str:
    return "".join(f"[{text}]" if learned else text for text, learned in pieces).lstrip("\n")


def _coloured(pieces: Sequence[Piece]) -> str:
    from rich.console import Console
    from rich.text import Text

    console = Console(force_terminal=True)
    with console.capture() as capture:
        styled = Text.assemble(*((text, "bold green" if learned else "dim") for text, learned in pieces))
        console.print(styled, soft_wrap=True, end="")
    return capture.get().lstrip("\n")
