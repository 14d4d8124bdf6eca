"""Samples and batches: a function of the seed and the position, of nothing else."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.config import DataConfig, OpenedData, open_data
from pretrain.data.sampler import IGNORE
from tests.pretrain.data.helpers import small_tokenizer, write_tokens
from workbench.errors import ConfigError, DataError

SEQ_LEN = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files `a` (205 tokens, 20 documents), `b` (100 tokens) and `tiny` (5 tokens); ids count up from 0."""
    root = tmp_path_factory.mktemp("tokens")
    write_tokens(root / "a", [*range(1, 20), 15])
    write_tokens(root / "b", [50, 50])
    write_tokens(root / "tiny", [3, 2])
    return root


def opened(folder: Path, seq_len: int = SEQ_LEN, **fields: object) -> OpenedData:
    return open_data(DataConfig.model_validate({"train": str(folder / "a")} | fields), seq_len=seq_len)


def ids_of_step(
    data: OpenedData, step: int, *, micro_size: int, dp_size: int, global_size: int = 12
) -> list[list[int]]:
    """Every row of one step over all ranks, in the order of its global sample ids."""
    rows = {}
    for dp_rank in range(dp_size):
        micros = data.train.batch(
            step, global_size=global_size, micro_size=micro_size, dp_rank=dp_rank, dp_size=dp_size
        )
        assert len(micros) == global_size // (micro_size * dp_size)
        for micro in micros:
            assert micro.input_ids.shape == micro.labels.shape == (micro_size, SEQ_LEN)
            rows |= dict(zip(micro.sample_ids.tolist(), micro.input_ids.tolist(), strict=True))
    assert sorted(rows) == list(range(step * global_size, (step + 1) * global_size))
    return [rows[number] for number in sorted(rows)]


def test_an_epoch_shows_every_window_once_and_labels_are_the_next_tokens(folder: Path) -> None:
    sampler = opened(folder).train.sampler
    starts = []
    for index in range(25):  # (205 - 1) // 8
        sample = sampler.sample(index)
        assert (sample.labels == sample.input_ids + 1).all()  # the ids of the file count up
        starts.append(int(sample.input_ids[0]))
    assert sorted(starts) == list(range(0, 200, SEQ_LEN))
    second = [int(sampler.sample(index).input_ids[0]) for index in range(25, 50)]
    assert sorted(second) == sorted(starts) and second != starts


@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 10**9), split=st.sampled_from([(1, 1), (1, 4), (2, 2), (3, 4), (12, 1), (1, 12), (6, 2)]))
def test_the_samples_of_a_step_do_not_depend_on_ranks_or_microbatches(
    folder: Path, step: int, split: tuple[int, int]
) -> None:
    data = opened(
        folder, train=[{"path": str(folder / "a"), "weight": 0.7}, {"path": str(folder / "b"), "weight": 0.3}]
    )
    micro_size, dp_size = split
    assert ids_of_step(data, step, micro_size=micro_size, dp_size=dp_size) == ids_of_step(
        data, step, micro_size=12, dp_size=1
    )


def test_a_resumed_run_goes_on_with_the_samples_it_had_not_seen(folder: Path) -> None:
    straight = [ids_of_step(opened(folder), step, micro_size=3, dp_size=2) for step in range(6)]
    resumed = [ids_of_step(opened(folder), step, micro_size=2, dp_size=1) for step in range(3, 6)]
    assert straight[3:] == resumed


def test_a_resume_at_another_batch_size_continues_at_the_sample_that_is_next(folder: Path) -> None:
    train = opened(folder).train
    before = [train.batch(step, global_size=4, micro_size=4, dp_rank=0, dp_size=1)[0] for step in range(6)]
    after = train.batch(3, global_size=12, micro_size=12, dp_rank=0, dp_size=1, first_sample=12)[0]
    assert after.input_ids.tolist() == np.concatenate([micro.input_ids for micro in before[3:]]).tolist()
    assert after.sample_ids.tolist() == list(range(12, 24))


def test_the_seed_alone_decides_the_order(folder: Path) -> None:
    orders = [
        [int(opened(folder, seed=seed).train.sampler.sample(n).input_ids[0]) for n in range(20)] for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_a_blend_draws_in_proportion_and_each_source_keeps_its_own_epochs(folder: Path) -> None:
    sources = [{"path": str(folder / "a"), "weight": 3}, {"path": str(folder / "tiny"), "weight": 1}]
    sampler = opened(folder, seq_len=4, train=sources).train.sampler
    rows = [sampler.sample(index).input_ids.tolist() for index in range(204)]
    expected = sorted([*range(0, 204, 4)] * 3 + [0] * 51)  # 3 epochs of `a`, and 51 of the one window of `tiny`
    assert sorted(row[0] for row in rows) == expected
    assert all(sum(row == [0, 1, 2, 3] for row in rows[start : start + 4]) >= 1 for start in range(0, 204, 4))


def test_evaluation_predicts_every_token_once_at_any_number_of_ranks(folder: Path) -> None:
    data = opened(folder, valid=[str(folder / "b"), str(folder / "tiny")])
    assert data.valid is not None and data.valid.num_samples == 13 + 1
    for micro_size, dp_size, num_microbatches in ((1, 1, 1), (4, 1, 1), (2, 3, 2), (5, 2, 3)):
        seen, lengths = [], set()
        for dp_rank in range(dp_size):
            batches = list(
                data.valid.batches(
                    micro_size=micro_size, dp_rank=dp_rank, dp_size=dp_size, num_microbatches=num_microbatches
                )
            )
            lengths.add(tuple(len(batch) for batch in batches))
            seen += [int(label) for batch in batches for micro in batch for label in micro.labels.ravel()]
        assert len(lengths) == 1  # all ranks take part equally often
        assert sorted(label for label in seen if label != IGNORE) == sorted([*range(1, 100), *range(1, 5)])


@pytest.mark.parametrize(("micro_size", "dp_size"), [(1, 1), (2, 2), (3, 1), (5, 4)])
def test_a_bounded_evaluation_scores_the_same_samples_at_any_number_of_ranks(
    folder: Path, micro_size: int, dp_size: int
) -> None:
    valid = opened(folder, valid=str(folder / "b")).valid
    assert valid is not None
    labels = [
        int(label)
        for dp_rank in range(dp_size)
        for batch in valid.batches(micro_size=micro_size, dp_rank=dp_rank, dp_size=dp_size, max_samples=3)
        for micro in batch
        for label in micro.labels.ravel()
        if label != IGNORE
    ]
    assert sorted(labels) == list(range(1, 25))


def test_a_split_holds_out_whole_documents_from_the_end(folder: Path) -> None:
    data = opened(folder, split=0.2)
    assert (data.train_documents, data.train_tokens) == (18, 171)
    assert data.valid is not None
    held_out = {
        int(label) for batch in data.valid.batches(micro_size=1, dp_rank=0, dp_size=1) for label in batch[0].labels[0]
    }
    assert held_out - {IGNORE} == set(range(172, 205))
    trained = {int(token) for index in range(21) for token in data.train.sampler.sample(index).input_ids}
    assert max(trained) < 171


def test_data_without_validation_has_none(folder: Path) -> None:
    assert opened(folder).valid is None


def test_too_little_data_for_one_sample_is_refused_with_both_numbers(folder: Path) -> None:
    with pytest.raises(DataError, match=r"tiny: 5 tokens to train on, but one sample of seq_len=8 needs 9"):
        opened(folder, train=str(folder / "tiny"))


def test_a_token_id_beyond_the_model_is_refused_before_it_reaches_an_embedding(folder: Path) -> None:
    data = open_data(DataConfig.model_validate({"train": str(folder / "a")}), seq_len=SEQ_LEN, vocab_size=100)
    with pytest.raises(DataError, match=r"token id \d+, but the model's vocab_size is 100"):
        data.train.batch(0, global_size=25, micro_size=25, dp_rank=0, dp_size=1)


def test_the_short_forms_of_train_mean_the_same(folder: Path) -> None:
    table = DataConfig.model_validate({"train": [{"path": "a", "weight": 1.0}]})
    assert DataConfig.model_validate({"train": "a"}) == DataConfig.model_validate({"train": ["a"]}) == table


@pytest.mark.parametrize(
    "table",
    [
        {"train": []},
        {"train": "a", "split": 1.0},
        {"train": "a", "split": 0.1, "valid": "b"},
        {"train": [{"path": "a", "weight": 0}]},
        {"train": [{"path": "a", "wait": 1}]},
    ],
)
def test_a_table_that_makes_no_sense_is_refused(table: dict[str, object]) -> None:
    with pytest.raises((ValueError, ConfigError)):
        DataConfig.model_validate(table)


def test_data_of_another_tokenizer_is_refused_with_both_digests(tmp_path: Path) -> None:
    from pretrain.data.documents import FileSource
    from pretrain.data.tokenizing import build_data

    one, other = small_tokenizer(_made(tmp_path / "one"), 280), small_tokenizer(_made(tmp_path / "other"), 290)
    build_data(FileSource(tmp_path / "one" / "tokenizer-text.txt"), tmp_path / "data", tokenizer=one)
    config = {"train": str(tmp_path / "data"), "tokenizer": str(other.path)}
    with pytest.raises(DataError, match=rf"{one.sha256[:12]}.*{other.sha256[:12]}"):
        open_data(DataConfig.model_validate(config), seq_len=8)
    with pytest.raises(DataError, match="vocabulary of 280, but model.vocab_size is 279"):
        open_data(DataConfig.model_validate({"train": str(tmp_path / "data")}), seq_len=8, vocab_size=279)


def _made(path: Path) -> Path:
    path.mkdir()
    return path
