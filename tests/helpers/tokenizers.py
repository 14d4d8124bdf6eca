"""A tokenizer of a hundred tokens, for tiny models."""

from __future__ import annotations

import json
from pathlib import Path


def make_tokenizer(folder: Path, vocab_size: int = 97) -> Path:
    """`folder`, with a tokenizer whose tokens are the printable ASCII characters; token 2 ends a text."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    characters = [chr(code) for code in range(32, 127)]
    words = ["<pad>", "<s>", "</s>", *characters][:vocab_size]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = Split(Regex("."), "isolated")
    backend.decoder = Fuse()
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
