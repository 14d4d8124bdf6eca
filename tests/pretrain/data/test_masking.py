"""Hidden words: whole ones, the right share of them, and nothing that depends on who asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from pretrain.data.config import DataConfig, open_data
from pretrain.data.masking import SHARE, Vocabulary, draws
from pretrain.data.sampler import IGNORE
from tests.pretrain.data.helpers import TEXT, small_tokenizer
from workbench.errors import DataError
from workbench.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def prefix(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pretrain.data.indexed import IndexedWriter

    path = tmp_path_factory.mktemp("tokens") / "text"
    with IndexedWriter(path, vocab_size=tokenizer.vocab_size) as writer:
        for _ in range(6):
            writer.add(np.array(tokenizer.encode(TEXT)))
            writer.end_document()
    return path


def test_words_begin_with_spaces_and_where_letters_digits_and_signs_meet(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size + 3)
    text = "def function_12(value):\n    return gęślą"
    ids = np.array(tokenizer.encode(text))
    words: dict[int, list[int]] = {}
    for token, number in zip(ids.tolist(), vocabulary.words(ids).tolist(), strict=True):
        words.setdefault(number, []).append(token)
    found = [tokenizer.decode(tokens) for tokens in words.values()]
    assert "".join(found) == text
    kept = [word for word in found if word.strip()]
    assert kept == ["def", " function", "_", "12", "(", "value", "):", " return", " gęślą"]


def test_marked_continuations_go_with_the_word_before_them(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordPiece

    words = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "play", "##ing", "ball", "##s"]
    backend = Backend(WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.add_special_tokens(words[:5])
    backend.save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary(Tokenizer.load(tmp_path), 9)
    assert np.diff(vocabulary.words(np.array([1, 5, 6, 7, 8, 2]))).tolist() == [1, 0, 1, 0, 1]
    assert vocabulary.specials.mask == 3
    assert (vocabulary.specials.first, vocabulary.specials.separator, vocabulary.specials.padding) == (1, 2, 4)


def test_about_fifteen_percent_are_hidden_in_the_papers_three_ways(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size + 3)
    ids = np.array(tokenizer.encode(TEXT))[:400]
    ways, share, runs = np.zeros(3), 0.0, 200
    for sample in range(runs):
        hidden, labels = vocabulary.hide(ids, draws(7, sample))
        chosen = labels != IGNORE
        assert np.array_equal(labels[chosen], ids[chosen]) and np.array_equal(hidden[~chosen], ids[~chosen])
        words = vocabulary.words(ids)
        assert all(chosen[words == number].all() for number in np.unique(words[chosen]))
        ways += [(hidden[chosen] == vocabulary.specials.mask).sum(), 0, (hidden[chosen] == ids[chosen]).sum()]
        ways[1] += ((hidden[chosen] != vocabulary.specials.mask) & (hidden[chosen] != ids[chosen])).sum()
        share += chosen.mean() / runs
    assert share == pytest.approx(SHARE, abs=0.01)
    assert ways / ways.sum() == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_row_is_the_same_whoever_asks_for_it(prefix: Path, tokenizer: Tokenizer, pairs: bool) -> None:
    config = {"train": str(prefix), "objective": "masked", "tokenizer": str(tokenizer.path), "next_sentence": pairs}
    size = tokenizer.vocab_size + 3
    one, two = (open_data(DataConfig.model_validate(config), seq_len=32, vocab_size=size) for _ in range(2))
    whole = one.train.batch(1, global_size=8, micro_size=8, dp_rank=0, dp_size=1)[0]
    for rank in (1, 0):
        parts = two.train.batch(1, global_size=8, micro_size=2, dp_rank=rank, dp_size=2)
        for number, part in enumerate(parts):
            rows = slice(4 * number + 2 * rank, 4 * number + 2 * rank + 2)
            assert np.array_equal(part.input_ids, whole.input_ids[rows])
            assert np.array_equal(part.labels, whole.labels[rows])
    other = open_data(DataConfig.model_validate({**config, "seed": 5}), seq_len=32, vocab_size=size)
    assert not np.array_equal(
        other.train.batch(1, global_size=8, micro_size=8, dp_rank=0, dp_size=1)[0].labels, whole.labels
    )


def test_pairs_are_two_segments_that_follow_each_other_half_of_the_time(prefix: Path, tokenizer: Tokenizer) -> None:
    config = DataConfig(train=str(prefix), objective="masked", tokenizer=str(tokenizer.path), next_sentence=True)
    loader = open_data(config, seq_len=32, vocab_size=tokenizer.vocab_size + 3).train
    found = loader.rows(np.arange(400))
    assert found.segments is not None and found.pair_labels is not None and found.lengths is None
    assert found.pair_labels.mean() == pytest.approx(0.5, abs=0.1)
    first, separator = tokenizer.vocab_size + 1, tokenizer.vocab_size
    assert (found.input_ids[:, 0] == first).all() and (found.input_ids[:, -1] == separator).all()
    assert ((found.input_ids == separator).sum(axis=1) == 2).all()
    assert (np.diff(found.segments, axis=1).sum(axis=1) == 1).all()


def test_evaluation_pads_the_last_row_and_counts_nothing_in_it(prefix: Path, tokenizer: Tokenizer) -> None:
    config = DataConfig(train=str(prefix), valid=str(prefix), objective="masked", tokenizer=str(tokenizer.path))
    valid = open_data(config, seq_len=32, vocab_size=tokenizer.vocab_size + 3).valid
    assert valid is not None and valid.tokens_per_byte is None
    rows = valid.rows(np.array([valid.num_samples - 1, valid.num_samples]))
    assert rows.lengths is not None and rows.lengths[1] == 2
    beyond = np.arange(32) >= rows.lengths[:, None]
    assert (rows.labels[beyond] == IGNORE).all() and (rows.labels[1] == IGNORE).all()


def test_a_vocabulary_without_room_for_the_marks_is_refused(prefix: Path, tokenizer: Tokenizer) -> None:
    config = DataConfig(train=str(prefix), objective="masked", tokenizer=str(tokenizer.path))
    with pytest.raises(DataError, match=r"vocab_size=290 leaves no ids for \[MASK\], .* set model.vocab_size = 293"):
        open_data(config, seq_len=32, vocab_size=290)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"next_sentence": True}, r"next_sentence=true goes with objective='masked', not 'causal'"),
        ({"objective": "masked"}, r"objective='masked' needs to know the tokens"),
        ({"objective": "masked", "tokenizer": "x", "mask_documents": True}, r"mask_documents=true is for"),
    ],
)
def test_what_does_not_go_with_an_objective_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DataConfig.model_validate({"train": "x", **change})
