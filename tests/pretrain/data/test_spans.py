"""Span corruption loses nothing: input and target together spell the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.masking import draws
from pretrain.data.sampler import IGNORE, Sample
from pretrain.data.spans import SpanSampler, hidden_tokens, lengths_of, spans_of, text_tokens
from tests.pretrain.data.helpers import small_tokenizer
from workbench.errors import DataError
from workbench.tokenizer import Tokenizer

SEQ_LEN = 40


class Counting:
    """Sample n is tokens from n on; the last of them are padding in every third sample."""

    seq_len = text_tokens(SEQ_LEN)

    def sample(self, index: int) -> Sample:
        ids = 3 + np.arange(index, index + self.seq_len) % 200
        labels = np.where(np.arange(self.seq_len) < self.seq_len - (index % 3 == 2) * 9, ids, IGNORE)
        return Sample(ids, labels)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("spans"))


@given(st.integers(2, 600), st.integers(0, 10**9))
def test_as_many_tokens_and_spans_are_hidden_as_the_lengths_say(tokens: int, seed: int) -> None:
    is_hidden = hidden_tokens(tokens, draws(seed, 0))
    hidden, spans = spans_of(tokens)
    assert len(is_hidden) == tokens and is_hidden.sum() == hidden
    assert not is_hidden[0] and (np.diff(is_hidden.astype(int)) == 1).sum() == spans


@given(st.integers(4, 2000))
def test_the_text_is_the_longest_whose_input_fits(seq_len: int) -> None:
    tokens = text_tokens(seq_len)
    assert lengths_of(tokens)[0] <= seq_len < lengths_of(tokens + 2)[0]


def test_input_and_target_spell_the_text(tokenizer: Tokenizer) -> None:
    sampler = SpanSampler(Counting(), tokenizer, seq_len=SEQ_LEN, vocab_size=320, seed=1)
    for index in range(50):
        row, text = sampler.sample(index), Counting().sample(index)
        target = row.labels[row.labels != IGNORE].tolist()
        assert row.decoder_ids is not None and row.decoder_ids[1 : len(target)].tolist() == target[:-1]
        assert row.input_ids.shape == (SEQ_LEN,) and len(row.labels) == len(row.decoder_ids) == sampler.target_len
        spans: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token >= 290:
                spans[token] = []
            else:
                spans[list(spans)[-1]].append(token)
        assert list(spans) == [319 - n for n in range(len(spans))]
        assert target[-1] == row.input_ids[row.length - 1] == tokenizer.eos_id
        spelt = [t for token in row.input_ids[: row.length - 1].tolist() for t in spans.get(token, [token])]
        assert spelt == text.input_ids[text.labels != IGNORE].tolist()


def test_a_vocabulary_without_sentinels_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"vocab_size=291 leaves 1 sentinels past the 290 .* needs 2"):
        SpanSampler(Counting(), tokenizer, seq_len=SEQ_LEN, vocab_size=291, seed=1)
