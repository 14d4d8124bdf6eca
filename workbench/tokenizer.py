"""A tokenizer folder, read with the `tokenizers` library alone: no transformers, no torch."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import DataError

if TYPE_CHECKING:
    import tokenizers

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def tokenizer_files(folder: Path | None) -> list[Path]:
    """The files in a folder that make up a tokenizer, to carry along with a model; none without a folder."""
    return [folder / name for name in _FILES if (folder / name).is_file()] if folder else []


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A text or two as tokens: their ids, kinds of segments, the characters that each stands for (none of a special
    token), and whether something was cut off."""

    ids: list[int]
    segments: list[int]
    spans: list[tuple[int, int]]
    was_cut: bool


class Tokenizer:
    """Text to ids and back, as Hugging Face's fast tokenizer of the same folder does without special tokens added."""

    def __init__(self, path: Path, backend: "tokenizers.Tokenizer", settings: dict[str, Any]) -> None:
        self.path = path
        self._backend, self._settings = backend, settings

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a folder that holds a tokenizer.json, or of that file itself."""
        import tokenizers  # 0.1 s: not for every command

        folder, file = _locate(Path(path))
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise DataError(f"{file}: not a tokenizer ({error})") from error
        backend.no_truncation()
        backend.no_padding()
        return cls(folder, backend, _settings(folder))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of `text`; special tokens written in it become their ids.

        `special` adds those that the tokenizer's own template puts around a text, as transformers does by default.
        """
        return self._backend.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed by all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_rows(self, rows: Sequence[str | tuple[str, str]], max_tokens: int) -> "list[EncodedRow]":
        """Texts, or pairs of them, in at most `max_tokens` tokens each, with the special tokens of the tokenizer's own
        template: what transformers makes of them by default with truncation."""
        self._backend.enable_truncation(max_tokens, strategy="longest_first")
        try:
            found = self._backend.encode_batch(list(rows), add_special_tokens=True)
        finally:
            self._backend.no_truncation()
        return [EncodedRow(one.ids, one.type_ids, one.offsets, bool(one.overflowing)) for one in found]

    def plain(self) -> "Tokenizer":
        """The same tokenizer for text that is data: special tokens written in it are ordinary characters."""
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return Tokenizer(self.path, backend, self._settings)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of one token, by its text."""
        return self._backend.token_to_id(token)

    def pieces(self) -> list[str]:
        """The text by which the tokenizer itself knows each id, empty for ids that it does not give."""
        return [self._backend.id_to_token(token) or "" for token in range(self.vocab_size)]

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that stand for no text."""
        return tuple(token for token, added in self._backend.get_added_tokens_decoder().items() if added.special)

    @cached_property
    def continuation(self) -> str:
        """What marks a token that goes on with the word before it, such as ##; empty where words are marked by the
        space before them."""
        prefix = getattr(self._backend.model, "continuing_subword_prefix", None)
        return prefix if isinstance(prefix, str) else ""

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id that can come out."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def eos_id(self) -> int | None:
        """The id that ends a document."""
        return self._special("eos_token", ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]"))

    @cached_property
    def pad_id(self) -> int | None:
        """The id that fills a batch."""
        return self._special("pad_token", ("<|pad|>", "<pad>", "[PAD]"))

    @cached_property
    def bos_id(self) -> int | None:
        """The id that begins a sequence, where the tokenizer names one."""
        return self._special("bos_token", ())

    @cached_property
    def start_ids(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer's own template puts before a text, such as a beginning-of-sequence."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        found = (at for at in range(len(full) - len(bare) + 1) if full[at : at + len(bare)] == bare)
        return tuple(full[: next(found, 0)])

    @cached_property
    def separates(self) -> bool:
        """Whether the tokenizer's own template puts something between two texts."""
        together = 2 * self._backend.encode("a", add_special_tokens=False).ids
        pair = self._backend.encode("a", "a").ids
        return not any(pair[at : at + len(together)] == together for at in range(len(pair)))

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of the tokenizer's folder."""
        file = self.path / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = self._settings.get("chat_template")
        return template if isinstance(template, str) else None

    @cached_property
    def sha256(self) -> str:
        """The digest of tokenizer.json: equal digests give equal ids."""
        return hashlib.sha256((self.path / "tokenizer.json").read_bytes()).hexdigest()

    def _special(self, name: str, usual: Sequence[str]) -> int | None:
        if name in self._settings:
            entry = self._settings[name]
            text = entry.get("content") if isinstance(entry, dict) else entry
            return None if text is None else self._backend.token_to_id(text)
        return next((found for token in usual if (found := self._backend.token_to_id(token)) is not None), None)


def _locate(path: Path) -> tuple[Path, Path]:
    folder = path.parent if path.name == "tokenizer.json" else path
    file = folder / "tokenizer.json"
    if file.is_file():
        return folder, file
    if path.is_dir():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise DataError(
            f"{path}: holds no tokenizer.json (but {found}); save the fast tokenizer there, or `wb tokenizer train`"
        )
    raise DataError(f"{path}: no such tokenizer folder; train one with `wb tokenizer train`")


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; empty when neither is there."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file}: not JSON ({error})") from error
        if isinstance(document, dict):
            settings |= document
    return settings
