"""Training a byte-level BPE tokenizer and saving it as a folder that Hugging Face's loaders read."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.data.documents import END_OF_TEXT, TextSource
from pretrain.data.writing import writing
from workbench.errors import DataError

if TYPE_CHECKING:
    import tokenizers

PAD = "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD)
_SAVED = frozenset(("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"))
_NUM_BYTES = 256
MIN_VOCABULARY = _NUM_BYTES + len(SPECIAL_TOKENS)

Progress = Callable[[int, int], None]


def train_tokenizer(
    source: TextSource, *, vocab_size: int, max_bytes: int = 1 << 30, progress: Progress | None = None
) -> "tokenizers.Tokenizer":
    """A byte-level BPE of exactly `vocab_size` ids, the two specials first; equal text gives an equal tokenizer.

    GPT-2's pre-tokenization. Reads the first `max_bytes` of the text. DataError when the text is too small to fill the
    vocabulary: a model sized for ids that never occur is a mistake nobody notices.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCABULARY:
        raise DataError(
            f"vocab_size={vocab_size}: the 256 bytes and {', '.join(SPECIAL_TOKENS)} need {MIN_VOCABULARY}; "
            "ask for at least that"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(source, max_bytes, progress), trainer)
    if backend.get_vocab_size() != vocab_size:
        raise DataError(
            f"{source.label}: its text yields {backend.get_vocab_size()} tokens, not vocab_size={vocab_size}; "
            "ask for a smaller vocabulary or give more text"
        )
    return backend


def save_tokenizer(backend: "tokenizers.Tokenizer", folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write tokenizer.json with its two companions; the folder is complete or absent."""
    folder = Path(folder)
    check_destination(folder, overwrite=overwrite)
    special = {"eos_token": END_OF_TEXT, "pad_token": PAD}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    partial = Path(f"{folder}.partial")
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
        for name, document in (("tokenizer_config.json", settings), ("special_tokens_map.json", special)):
            (partial / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        return partial.replace(folder)


def check_destination(folder: Path, *, overwrite: bool) -> None:
    """DataError unless nothing is there, or with `overwrite` a tokenizer and nothing else."""
    if not folder.exists():
        return
    if not overwrite:
        raise DataError(f"{folder}: exists already; choose another destination or overwrite it with --force")
    if not folder.is_dir():
        raise DataError(f"{folder}: is a file, not a tokenizer folder; choose another destination")
    if foreign := sorted(entry.name for entry in folder.iterdir() if entry.name not in _SAVED):
        raise DataError(f"{folder}: holds {', '.join(foreign[:3])} besides a tokenizer; choose another destination")


def _texts(source: TextSource, max_bytes: int, progress: Progress | None) -> Iterator[str]:
    parts = source.parts()
    total = min(max_bytes, sum(part.num_bytes() for part in parts))
    done = num_texts = 0
    for part in parts:
        for piece in part.pieces():
            if piece.text:
                num_texts += 1
                yield piece.text
            done += len(piece.text.encode())
            if progress is not None:
                progress(min(done, total), total)
            if done >= max_bytes:
                return
    if not num_texts:
        raise DataError(f"{source.label}: holds no text to train on")
