"""Span corruption: spans of a sample are each replaced by one sentinel, and the target spells them out.

15 % of the tokens in spans of 3 on average (arXiv:1910.10683, sec. 3.1.4), lengths drawn as its program does
(t5/data/preprocessors.py, random_spans_noise_mask): a function of the seed and the sample's number alone.
"""

import numpy as np
import numpy.typing as npt

from pretrain.data.masking import draws
from pretrain.data.sampler import IGNORE, Ids, Sample, Sampler
from workbench.errors import DataError
from workbench.tokenizer import Tokenizer

SHARE, MEAN_SPAN = 0.15, 3


def spans_of(tokens: int) -> tuple[int, int]:
    """How many of `tokens` tokens are hidden, and in how many spans."""
    hidden = min(max(round(tokens * SHARE), 1), tokens - 1)
    return hidden, max(1, round(hidden / MEAN_SPAN))


def lengths_of(tokens: int) -> tuple[int, int]:
    """The tokens of input and target, end marks included, that `tokens` tokens of text become."""
    hidden, spans = spans_of(tokens)
    return tokens - hidden + spans + 1, hidden + spans + 1


def text_tokens(seq_len: int) -> int:
    """The most tokens of text whose input is no longer than `seq_len`."""
    return next(tokens for tokens in range(2 * seq_len, 1, -1) if lengths_of(tokens)[0] <= seq_len)


class SpanSampler:
    """Inputs of `seq_len` tokens and their targets, from another sampler's samples of `text_tokens(seq_len)`."""

    def __init__(self, source: Sampler, tokenizer: Tokenizer, *, seq_len: int, vocab_size: int, seed: int) -> None:
        self._source, self._seed, self.seq_len = source, seed, seq_len
        self.target_len = lengths_of(source.seq_len)[1]
        self._sentinel = vocab_size - 1
        self._padding = tokenizer.pad_id or 0
        if tokenizer.eos_id is None:
            raise DataError(f"{tokenizer.path}: names no end token, which ends inputs and targets; name its eos_token")
        self._end = tokenizer.eos_id
        needed = tokenizer.vocab_size + spans_of(source.seq_len)[1]
        if vocab_size < needed:
            raise DataError(
                f"model.vocab_size={vocab_size} leaves {vocab_size - tokenizer.vocab_size} sentinels past the "
                f"{tokenizer.vocab_size} tokens of {tokenizer.path}, but batch.seq_len={seq_len} needs "
                f"{needed - tokenizer.vocab_size}; set model.vocab_size = {needed} or more"
            )

    def sample(self, index: int) -> Sample:
        """The row of sample `index`; the decoder reads the target moved by one, after a padding token."""
        found = self._source.sample(index)
        tokens = found.input_ids[: np.count_nonzero(found.labels != IGNORE)]
        if len(tokens) < 2:
            inputs, target = tokens, tokens[:0]
        else:
            is_hidden = hidden_tokens(len(tokens), draws(self._seed, index))
            inputs, target = self._replaced(tokens, is_hidden), self._replaced(tokens, ~is_hidden)
        inputs, target = np.append(inputs, self._end), np.append(target, self._end)
        decoder_ids = np.full(self.target_len, self._padding, dtype=np.int64)
        decoder_ids[1 : len(target)] = target[:-1]
        labels = np.full(self.target_len, IGNORE, dtype=np.int64)
        if len(tokens) > 1:
            labels[: len(target)] = target
        input_ids = np.full(self.seq_len, self._padding, dtype=np.int64)
        input_ids[: len(inputs)] = inputs
        return Sample(input_ids, labels, length=len(inputs), decoder_ids=decoder_ids)

    def _replaced(self, tokens: Ids, is_replaced: npt.NDArray[np.bool_]) -> Ids:
        """The tokens with each run of replaced ones as a sentinel, counted down from the end of the vocabulary."""
        begins = is_replaced & ~np.append(False, is_replaced[:-1])
        found = np.where(begins, self._sentinel + 1 - np.cumsum(begins), tokens)
        return found[begins | ~is_replaced]


def hidden_tokens(tokens: int, draw: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which of `tokens` tokens are hidden: spans of text and hidden ones in turn, text first."""
    hidden, spans = spans_of(tokens)
    lengths = np.stack((_segments(tokens - hidden, spans, draw), _segments(hidden, spans, draw)), axis=1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths.reshape(-1))


def _segments(total: int, count: int, draw: np.random.Generator) -> npt.NDArray[np.int64]:
    """`count` lengths of at least one that add up to `total`, all such ways equally likely."""
    cuts = np.sort(np.argsort(draw.random(total - 1), kind="stable")[: count - 1]) + 1
    return np.diff(np.concatenate(([0], cuts, [total])))
