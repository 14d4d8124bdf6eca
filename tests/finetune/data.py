"""A tokenizer of bytes, files of rows and configurations for the tests of fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.config import FinetuneConfig
from workbench.spec.model import ModelConfig

WORDS = 300


def byte_tokenizer(folder: Path, *, chat_template: str | None = None, pad: str | None = "<|pad|>") -> Path:
    """A folder with a byte-level tokenizer of 256 bytes, an end and a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": pad,
        "model_max_length": 64,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def letters(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Texts of one letter with one other letter in some of them; the label says whether it is there."""
    rows = []
    for n in range(start, start + count):
        odd = bool(n * 7 % 3 % 2)
        rows.append(
            {"text": "a" * (2 + n % 5) + ("z" if odd else "b") + "c" * (n % 3), "label": "odd" if odd else "even"}
        )
    return rows


def small_model(**changes: Any) -> ModelConfig:
    values = {
        "vocab_size": 261,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    return ModelConfig.model_validate({**values, **changes})


def config_of(folder: Path, task: dict[str, Any], method: dict[str, Any], **tables: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "base": str(folder / "base"),
        "task": task,
        "method": method,
        "batch": {"global_size": 8, "micro_size": 2, "seq_len": 32},
        "optim": {"lr": 5e-3, "warmup": 2, "schedule": "constant", "weight_decay": 0.0},
        "log": {"every": 1},
        "run": {"dir": str(folder / "run"), "steps": 4, "seed": 5},
    }
    for name, table in tables.items():
        values[name] = {**values[name], **table} if isinstance(values.get(name), dict) else table
    return FinetuneConfig.model_validate(values)
