"""Small token files and tokenizers for the tests of this folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pretrain.data.bpe import save_tokenizer, train_tokenizer
from pretrain.data.documents import FileSource
from pretrain.data.indexed import IndexedTokens, IndexedWriter
from workbench.tokenizer import Tokenizer

TEXT = (
    "".join(f"def function_{number}(value):\n    return value + {number}\n" for number in range(40))
    + "zażółć gęślą jaźń 雪 🙂\n"
)


def write_tokens(prefix: Path, lengths: Sequence[int], *, vocab_size: int = 1 << 20) -> IndexedTokens:
    """A token file whose token ids count up from 0 through all documents."""
    start = 0
    with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
        for length in lengths:
            writer.add(np.arange(start, start + length))
            writer.end_document()
            start += length
    return IndexedTokens(prefix)


def small_tokenizer(folder: Path, vocab_size: int = 290) -> Tokenizer:
    """A byte-level tokenizer trained on TEXT, saved in `folder`/tokenizer."""
    text = folder / "tokenizer-text.txt"
    text.write_text(TEXT, encoding="utf-8")
    backend = train_tokenizer(FileSource(text), vocab_size=vocab_size)
    return Tokenizer.load(save_tokenizer(backend, folder / "tokenizer"))
