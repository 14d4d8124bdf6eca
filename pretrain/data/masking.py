"""Masked words: which tokens of a sample are hidden is a function of the seed and the sample's number alone.

Of whole words, 15 % of a row's tokens: 80 % of these become the mask, 10 % another token, 10 % stay
(arXiv:1810.04805, sec. 3.1; whole words as in its later release, create_pretraining_data.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pretrain.data.sampler import IGNORE, Ids, Sample, Sampler
from workbench.errors import DataError
from workbench.tokenizer import Tokenizer

SHARE = 0.15
MASKED, REPLACED = 0.8, 0.9
"""Of the chosen tokens, those below the first become the mask, those up to the second another token."""
SPACE, OTHER_SPACES = "\u0120", "\u010a\u0109\u010d"
"""How a byte-level BPE writes a space; line feed, tab and carriage return."""
POOL = 1 << 20
"""Samples from which a second segment that does not follow is drawn."""


def draws(seed: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample. Only `random` is used: its stream is the one that NumPy never changes."""
    return np.random.Generator(np.random.PCG64([seed, sample]))


@dataclass(frozen=True)
class Specials:
    """Ids with a part in a row: the tokenizer's own [MASK], [CLS] and [SEP], or else the last ids of the model."""

    mask: int
    first: int
    separator: int
    padding: int


class Vocabulary:
    """What masking knows of each token. `num_words`: ids that a random token is drawn from, those of the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.num_words = tokenizer.vocab_size
        self.specials = _specials(tokenizer, vocab_size)
        pieces = tokenizer.pieces()
        self._first = np.array([_kind(piece[:1]) for piece in pieces] + [0] * (vocab_size - len(pieces)))
        self._last = np.array([_kind(piece[-1:]) for piece in pieces] + [0] * (vocab_size - len(pieces)))
        # A space goes with what follows it, where nothing was merged over the two.
        self._joins = np.array([piece.endswith(SPACE) for piece in pieces] + [False] * (vocab_size - len(pieces)))
        self._continues = np.zeros(vocab_size, dtype=bool)
        if mark := tokenizer.continuation:
            self._continues[: len(pieces)] = [piece.startswith(mark) for piece in pieces]
        self._marks_words = bool(tokenizer.continuation)
        self.is_special = np.zeros(vocab_size, dtype=bool)
        self.is_special[len(pieces) :] = True
        known = self.specials
        self.is_special[[*tokenizer.special_ids, known.mask, known.first, known.separator]] = True

    def words(self, ids: Ids) -> npt.NDArray[np.int64]:
        """The number, in the row, of the word that each token is part of.

        A word begins with a space and where letters, digits and other signs meet, which is how a byte-level BPE cuts
        text before it merges; or with what is not marked as a continuation, where the tokenizer marks that.
        """
        first, special = self._first[ids], self.is_special[ids]
        if self._marks_words:
            begins = ~self._continues[ids]
        else:
            begins = (first == 0) | ((first != np.roll(self._last[ids], 1)) & ~np.roll(self._joins[ids], 1))
        return np.cumsum(begins | special | np.roll(special, 1))

    def hide(self, ids: Ids, draw: np.random.Generator) -> tuple[Ids, Ids]:
        """The row with words hidden, and as labels what was there, IGNORE elsewhere."""
        words, may_hide = self.words(ids), ~self.is_special[ids]
        candidates, sizes = np.unique(words[may_hide], return_counts=True)
        goal, taken = max(1, round(SHARE * int(may_hide.sum()))), []
        for number in np.argsort(draw.random(len(candidates)), kind="stable"):
            # A word too long for what is left is passed over, as the paper's program does.
            if sizes[number] <= goal:
                taken.append(candidates[number])
                goal -= sizes[number]
        chosen = np.isin(words, taken) & may_hide
        how, other = draw.random(len(ids)), np.floor(draw.random(len(ids)) * self.num_words).astype(np.int64)
        hidden = np.where(how < MASKED, self.specials.mask, np.where(how < REPLACED, other, ids))
        return np.where(chosen, hidden, ids), np.where(chosen, ids, IGNORE)


class MaskedSampler:
    """Rows [CLS] tokens [SEP] of another sampler's samples, with hidden words.

    With `pairs` rows are [CLS] A [SEP] B [SEP]: a sample cut in two at a place of its own, or, every second time, its
    first part and the second part of another sample, one of `pool`.
    """

    def __init__(
        self, source: Sampler, vocabulary: Vocabulary, *, seed: int, pairs: bool = False, pool: int = POOL
    ) -> None:
        self._source, self._vocabulary, self._seed = source, vocabulary, seed
        self._pairs, self._pool = pairs, pool
        self.seq_len = source.seq_len + num_marks(pairs)

    def sample(self, index: int) -> Sample:
        """The row of sample `index`."""
        draw, specials = draws(self._seed, index), self._vocabulary.specials
        tokens = self._tokens(index)
        parts: Sequence[Ids] = (tokens,)
        label = IGNORE
        if self._pairs and len(tokens) > 1:
            cut = min(max(1, len(tokens) // 4 + int(draw.random() * len(tokens) / 2)), len(tokens) - 1)
            label = int(draw.random() < 0.5)
            other = self._tokens(int(draw.random() * self._pool)) if label else tokens
            parts = (tokens[:cut], other[-(len(tokens) - cut) :])
        ends = [np.append(part, specials.separator) for part in parts]
        ids = np.concatenate(([specials.first], *ends)).astype(np.int64)
        length, second = len(ids), len(ends[-1]) if len(ends) > 1 else 0
        hidden, labels = self._vocabulary.hide(ids, draw)
        segments = np.zeros(self.seq_len, dtype=np.int64)
        segments[length - second : length] = 1
        return Sample(
            _padded(hidden, self.seq_len, specials.padding),
            _padded(labels, self.seq_len, IGNORE),
            length=length,
            segments=segments if self._pairs else None,
            pair_label=label if self._pairs else None,
        )

    def _tokens(self, index: int) -> Ids:
        """The tokens of a source's sample; where it is padding, its labels are ignored."""
        found = self._source.sample(index)
        return found.input_ids[: np.count_nonzero(found.labels != IGNORE)]


def num_marks(pairs: bool) -> int:
    """The [CLS] and [SEP] of a row."""
    return 3 if pairs else 2


def _padded(ids: Ids, length: int, fill: int) -> Ids:
    return np.concatenate((ids, np.full(length - len(ids), fill, dtype=np.int64)))


def _specials(tokenizer: Tokenizer, vocab_size: int) -> Specials:
    names = ("[MASK]", "[CLS]", "[SEP]")
    own = [tokenizer.token_id(name) for name in names]
    found = [vocab_size - 1 - place if token is None else token for place, token in enumerate(own)]
    needed = tokenizer.vocab_size + len(names)
    if None in own and vocab_size < needed:
        raise DataError(
            f"model.vocab_size={vocab_size} leaves no ids for {', '.join(names)} past the {tokenizer.vocab_size} of "
            f"the tokenizer {tokenizer.path}; set model.vocab_size = {needed} or more"
        )
    mask, first, separator = found
    return Specials(mask, first, separator, padding=tokenizer.pad_id or 0)


def _kind(char: str) -> int:
    """0 for a space (and for nothing), 1 for a digit, 2 for another sign, 3 for a letter."""
    if not char or char == SPACE or char in OTHER_SPACES:
        return 0
    if char.isdigit():
        return 1
    return 2 if char.isascii() and not char.isalpha() else 3
