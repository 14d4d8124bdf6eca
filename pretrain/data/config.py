"""The [data] table and the loaders that it describes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pretrain.data.indexed import IndexedTokens
from pretrain.data.loader import EvaluationLoader, Loader
from pretrain.data.manifest import DataManifest, read_manifest
from pretrain.data.masking import MaskedSampler, Vocabulary, num_marks
from pretrain.data.sampler import BlendedSampler, Sampler, SequentialSampler, ShuffledSampler, TokenStream
from pretrain.data.spans import SpanSampler, text_tokens
from workbench.config import Config
from workbench.errors import DataError
from workbench.tokenizer import Tokenizer


class DataSource(Config):
    """One token file of a blend."""

    path: str = Field(
        min_length=1, description="token file made by `wb data build` (or by Megatron), without .bin or .idx"
    )
    weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="share of the samples, relative to the other sources"
    )


def _as_sources(value: Any) -> Any:
    """A list of tables, from the short forms: one path, or a list of paths."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple):
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


ObjectiveName = Literal["causal", "masked", "span"]
Sources = Annotated[tuple[DataSource, ...], BeforeValidator(_as_sources)]


class DataConfig(Config):
    """What a run trains and evaluates on."""

    train: Sources = Field(min_length=1, description="a path, a list of paths, or a list of {path, weight}")
    valid: Sources = Field(default=(), description="evaluation data, read once in file order; weights are not used")
    split: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of each train source, whole documents from its end, to hold out as evaluation data",
    )
    seed: int = Field(default=1234, ge=0, description="decides the order of samples, alone")
    objective: ObjectiveName = Field(
        default="causal",
        description="what is to be predicted: the next token (causal); hidden words, for tokens that see all others "
        "(masked); hidden spans, spelt out by a decoder (span)",
    )
    next_sentence: bool = Field(
        default=False, description="objective masked: rows of two segments, and whether the second follows the first"
    )
    mask_documents: bool = Field(
        default=False,
        description="keep documents that share a sequence apart: a token attends to its own document only, positions "
        "begin anew in each, and the first token of one is not predicted from the last; documents are those of the "
        "token file's index",
    )
    tokenizer: str | None = Field(
        default=None, description="tokenizer folder or tokenizer.json; carried into checkpoints"
    )

    @model_validator(mode="after")
    def _objective_fits(self) -> "DataConfig":
        if self.next_sentence and self.objective != "masked":
            raise ValueError(f"next_sentence=true goes with objective='masked', not {self.objective!r}; remove it")
        if self.objective == "causal":
            return self
        if self.tokenizer is None:
            raise ValueError(f"objective={self.objective!r} needs to know the tokens; name their folder: tokenizer")
        if self.mask_documents:
            raise ValueError(f"mask_documents=true is for objective='causal', not {self.objective!r}; remove it")
        return self

    @model_validator(mode="after")
    def _one_kind_of_validation(self) -> "DataConfig":
        if self.valid and self.split:
            raise ValueError(
                f"split={self.split} and valid are both set; give evaluation files or hold out a share, not both"
            )
        return self


@dataclass(frozen=True)
class OpenedData:
    """The loaders of a run; `valid` is None when the table asks for no evaluation data."""

    train: Loader
    valid: EvaluationLoader | None
    tokenizer: Path | None
    train_tokens: int
    train_documents: int
    mask_documents: bool
    objective: ObjectiveName = "causal"
    next_sentence: bool = False


def open_data(config: DataConfig, *, seq_len: int, vocab_size: int | None = None) -> OpenedData:
    """The loaders of `config`, after checking files, lengths and vocabularies; reads no more than headers."""
    tokenizer = None if config.tokenizer is None else Tokenizer.load(config.tokenizer)
    train_files = [_open(source, tokenizer, vocab_size) for source in config.train]
    valid_files = [_open(source, tokenizer, vocab_size) for source in config.valid]
    cuts = [_held_out(tokens, config.split) for tokens in train_files]
    masked = config.mask_documents
    train = [
        TokenStream(tokens, documents=range(cut), mask_documents=masked)
        for tokens, cut in zip(train_files, cuts, strict=True)
    ]
    if config.split:
        valid = [
            TokenStream(tokens, documents=range(cut, len(tokens)), mask_documents=masked)
            for tokens, cut in zip(train_files, cuts, strict=True)
        ]
    else:
        valid = [TokenStream(tokens, mask_documents=masked) for tokens in valid_files]
    rows = _RowMaker(config, tokenizer, seq_len, vocab_size)
    return OpenedData(
        train=Loader(rows.made_from(_training_sampler(config, train, rows.text_len)), vocab_size=vocab_size),
        valid=_evaluation_loader(valid, rows, vocab_size) if valid else None,
        tokenizer=None if tokenizer is None else tokenizer.path,
        train_tokens=sum(stream.num_tokens for stream in train),
        train_documents=sum(stream.num_documents for stream in train),
        mask_documents=masked,
        objective=config.objective,
        next_sentence=config.next_sentence,
    )


class _RowMaker:
    """Makes the samples of an objective from samples of text, each of `text_len` tokens."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None, seq_len: int, vocab_size: int | None) -> None:
        self._config, self._tokenizer, self._seq_len = config, tokenizer, seq_len
        self.text_len = seq_len
        if config.objective == "causal":
            return
        assert tokenizer is not None, "the table asks for a tokenizer"
        self._vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        if config.objective == "masked":
            self.text_len = seq_len - num_marks(config.next_sentence)
            self._vocabulary = Vocabulary(tokenizer, self._vocab_size)
        else:
            self.text_len = text_tokens(seq_len)

    @property
    def predicts_text(self) -> bool:
        """Whether the labels are all tokens of the text."""
        return self._config.objective == "causal"

    def made_from(self, source: Sampler, num_samples: int | None = None) -> Sampler:
        """The sampler of rows; `num_samples` is how many `source` has, if they end."""
        config, tokenizer = self._config, self._tokenizer
        if config.objective == "causal" or tokenizer is None:
            return source
        if config.objective == "span":
            size = self._vocab_size
            return SpanSampler(source, tokenizer, seq_len=self._seq_len, vocab_size=size, seed=config.seed)
        pool = {} if num_samples is None else {"pool": num_samples}
        return MaskedSampler(source, self._vocabulary, seed=config.seed, pairs=config.next_sentence, **pool)


def _training_sampler(config: DataConfig, streams: Sequence[TokenStream], seq_len: int) -> Sampler:
    # The key names the position in the blend and not the path, so that a run can be resumed after its data moved.
    samplers = [
        ShuffledSampler(stream, seq_len=seq_len, key=f"seed {config.seed}/source {number}")
        for number, stream in enumerate(streams)
    ]
    return BlendedSampler(samplers, weights=[source.weight for source in config.train])


def _evaluation_loader(streams: Sequence[TokenStream], rows: _RowMaker, vocab_size: int | None) -> EvaluationLoader:
    manifests = [read_manifest(stream.tokens.prefix) for stream in streams]
    known = [manifest for manifest in manifests if manifest is not None]
    # Of a held-out tail the bytes are not known, so the ratio is that of the whole file.
    ratio = None
    if rows.predicts_text and len(known) == len(manifests):
        shares = [
            stream.num_tokens * manifest.text_bytes / manifest.tokens
            for stream, manifest in zip(streams, known, strict=True)
        ]
        ratio = sum(stream.num_tokens for stream in streams) / sum(shares)
    source = SequentialSampler(streams, seq_len=rows.text_len)
    count = source.num_samples
    made = rows.made_from(source, count)
    return EvaluationLoader(made, num_samples=count, vocab_size=vocab_size, tokens_per_byte=ratio)


def _held_out(tokens: IndexedTokens, split: float) -> int:
    """The number of leading documents to train on, so that the rest hold about the share `split` of the tokens."""
    if not split:
        return len(tokens)
    if len(tokens) < 2:
        raise DataError(
            f"{tokens.prefix}: one document cannot be split by data.split={split}; give data.valid its own file"
        )
    goal = tokens.num_tokens - math.ceil(split * tokens.num_tokens)
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if tokens.document_start(middle) < goal else (low, middle)
    return min(max(low, 1), len(tokens) - 1)


def _open(source: DataSource, tokenizer: Tokenizer | None, vocab_size: int | None) -> IndexedTokens:
    tokens = IndexedTokens(source.path)
    manifest = read_manifest(tokens.prefix)
    if manifest is None:
        return tokens
    _check_tokenizer(tokens.prefix, manifest, tokenizer)
    if vocab_size is not None and manifest.vocab_size > vocab_size:
        raise DataError(
            f"{tokens.prefix}: tokenized with a vocabulary of {manifest.vocab_size}, "
            f"but model.vocab_size is {vocab_size}; "
            f"set model.vocab_size = {manifest.vocab_size}, or build the data with the model's tokenizer"
        )
    return tokens


def _check_tokenizer(prefix: Path, manifest: DataManifest, tokenizer: Tokenizer | None) -> None:
    if tokenizer is not None and manifest.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{prefix}: tokenized with another tokenizer ({manifest.tokenizer}, "
            f"sha256 {manifest.tokenizer_sha256[:12]}) than data.tokenizer={tokenizer.path} "
            f"(sha256 {tokenizer.sha256[:12]}); use that one, or build the data again"
        )
