"""The [data] table and the loaders that it describes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pretrain.data.indexed import IndexedTokens
from pretrain.data.loader import EvaluationLoader, Loader
from pretrain.data.manifest import DataManifest, read_manifest
from pretrain.data.sampler import BlendedSampler, Sampler, SequentialSampler, ShuffledSampler, TokenStream
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
    return OpenedData(
        train=Loader(_training_sampler(config, train, seq_len), vocab_size=vocab_size),
        valid=_evaluation_loader(valid, seq_len, vocab_size) if valid else None,
        tokenizer=None if tokenizer is None else tokenizer.path,
        train_tokens=sum(stream.num_tokens for stream in train),
        train_documents=sum(stream.num_documents for stream in train),
        mask_documents=masked,
    )


def _training_sampler(config: DataConfig, streams: Sequence[TokenStream], seq_len: int) -> Sampler:
    # The key names the position in the blend and not the path, so that a run can be resumed after its data moved.
    samplers = [
        ShuffledSampler(stream, seq_len=seq_len, key=f"seed {config.seed}/source {number}")
        for number, stream in enumerate(streams)
    ]
    return BlendedSampler(samplers, weights=[source.weight for source in config.train])


def _evaluation_loader(streams: Sequence[TokenStream], seq_len: int, vocab_size: int | None) -> EvaluationLoader:
    manifests = [read_manifest(stream.tokens.prefix) for stream in streams]
    known = [manifest for manifest in manifests if manifest is not None]
    # Of a held-out tail the bytes are not known, so the ratio is that of the whole file.
    ratio = None
    if len(known) == len(manifests):
        shares = [
            stream.num_tokens * manifest.text_bytes / manifest.tokens
            for stream, manifest in zip(streams, known, strict=True)
        ]
        ratio = sum(stream.num_tokens for stream in streams) / sum(shares)
    return EvaluationLoader(SequentialSampler(streams, seq_len=seq_len), vocab_size=vocab_size, tokens_per_byte=ratio)


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
