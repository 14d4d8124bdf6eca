"""Samples that tell their documents: as the index of the token file has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.config import DataConfig, open_data
from pretrain.data.sampler import IGNORE
from pretrain.objective import NextToken, Rows, Share, document_positions, to_batch
from tests.pretrain.data.helpers import write_tokens


@given(lengths=st.lists(st.integers(1, 9), min_size=4, max_size=12), seq_len=st.integers(1, 7))
def test_samples_know_the_document_of_every_token_and_predict_only_inside_it(
    tmp_path_factory, lengths: list[int], seq_len: int
) -> None:
    prefix = tmp_path_factory.mktemp("tokens") / "a"
    write_tokens(prefix, lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    if len(owner) <= seq_len:
        return
    config = DataConfig.model_validate({"train": str(prefix), "valid": [str(prefix)], "mask_documents": True})
    data = open_data(config, seq_len=seq_len)
    assert data.valid is not None
    samples = [data.train.sampler.sample(index) for index in range(5)]
    samples += [data.valid.sampler.sample(index) for index in range(data.valid.num_samples + 1)]
    for sample in samples:
        assert sample.documents is not None
        real = sample.documents >= 0
        tokens = sample.input_ids[real]  # ids count up through the file, so they are places
        assert np.array_equal(sample.documents[real], owner[tokens])
        inside = owner[tokens] == np.append(owner, -1)[tokens + 1]
        assert np.array_equal(sample.labels[real], np.where(inside, tokens + 1, IGNORE))
        assert (sample.labels[~real] == IGNORE).all()


def test_positions_begin_anew_with_each_document() -> None:
    documents = np.array([[4, 4, 4, 5, 6, 6], [0, 1, 1, 1, 1, -1]])
    assert document_positions(documents).tolist() == [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 0]]


def test_masked_rows_reach_the_model_with_documents_and_positions_and_plain_ones_do_not(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a", [5, 6, 30])
    share = Share(micro_size=2, dp_rank=0, dp_size=1)

    def rows(**fields: object) -> Rows:
        data = open_data(DataConfig.model_validate({"train": str(tmp_path / "a"), **fields}), seq_len=8)
        objective = NextToken(data, seed=1)
        assert objective.identity.get("mask_documents") == fields.get("mask_documents")
        return objective.train_rows(share, step=0, first_sample=0, global_size=2)[0]

    plain, masked = rows(), rows(mask_documents=True)
    assert np.array_equal(plain.input_ids, masked.input_ids)
    assert plain.num_labels == 16 and masked.num_labels < plain.num_labels + 1
    batch = to_batch(masked, torch.device("cpu"))
    assert masked.documents is not None and batch.documents is not None and batch.positions is not None
    assert batch.positions.tolist() == document_positions(masked.documents).tolist()
    assert to_batch(plain, torch.device("cpu")).documents is None
