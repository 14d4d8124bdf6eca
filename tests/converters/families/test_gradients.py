"""Gradients equal transformers', tensor by tensor: of a decoder as its own checkpoint of gradients says through the
family's rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from converters.format import OpenedCheckpoint
from converters.formats.huggingface import FORMAT
from converters.rules import pull
from tests.helpers.hf_encoders import ENCODER_CASES
from tests.helpers.hf_models import CASES, make_model, save_model
from workbench.models.batch import Batch
from workbench.models.build import build_stage
from workbench.models.state import load, to_tensor
from workbench.parallel.live import shard_views
from workbench.parallel.mesh import Mesh
from workbench.spec.geometry import Box

# Beyond the length where frequencies of some begin to depend on it.
IDS = torch.randint(3, 97, (2, 41), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "case", sorted(case for case in CASES.keys() - ENCODER_CASES.keys() if "classifier" not in case)
)
def test_the_gradient_of_every_tensor_equals_that_of_transformers(tmp_path: Path, case: str) -> None:
    theirs = make_model(case)
    theirs.save_pretrained(tmp_path / "weights")
    logits_NV = theirs(input_ids=IDS[:, :-1]).logits.flatten(0, 1)
    F.cross_entropy(logits_NV, IDS[:, 1:].flatten(), reduction="sum").backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.0 if parameter.grad is None else parameter.grad)
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
    theirs.save_pretrained(tmp_path / "gradients")
    weights, gradients = (FORMAT.open(tmp_path / name) for name in ("weights", "gradients"))
    built = build_stage(weights.model, Mesh.single())
    load(built.parameters, weights.source)
    built.module(None, Batch(IDS[:, :-1], IDS[:, 1:])).backward()
    largest = max(float(parameter.require_grad().abs().max()) for parameter in built.parameters)
    for parameter in built.parameters:
        for shard, ours in shard_views(parameter, parameter.require_grad()):
            expected = to_tensor(gradients.source.read(shard.name, shard.box), "F32")
            # A gradient that is zero but for rounding, as a key's bias has, is measured against the largest of all.
            scale = max(float(expected.abs().max()), 1e-3 * largest)
            assert float((ours - expected).abs().max()) <= 1e-4 * scale, shard.name


@pytest.mark.parametrize("case", ["t5", "t5, gated, not scaled, more layers that read"])
def test_gradients_of_answers_equal_those_of_transformers(tmp_path: Path, case: str) -> None:
    opened = FORMAT.open(save_model(case, tmp_path / "in"))
    random = torch.Generator().manual_seed(1)
    ids, lengths = torch.randint(1, 90, (3, 12), generator=random), torch.tensor([12, 7, 10])
    answers = torch.randint(1, 90, (3, 8), generator=random)
    labels = torch.where(torch.arange(8) < torch.tensor([[8], [3], [6]]), answers, -100)
    decoder_ids = torch.cat((torch.zeros(3, 1, dtype=torch.long), answers[:, :-1]), dim=1)
    theirs = make_model(case)
    is_text = (torch.arange(12) < lengths.unsqueeze(-1)).long()
    theirs(input_ids=ids, attention_mask=is_text, decoder_input_ids=decoder_ids, labels=labels).loss.backward()
    assert_same_gradients(opened, theirs, Batch(ids, labels, lengths, decoder_ids=decoder_ids))


@pytest.mark.parametrize("case", ["bert", "bert, both heads, three segments, tanh gelu"])
def test_gradients_of_hidden_words_equal_those_of_transformers(tmp_path: Path, case: str) -> None:
    opened = FORMAT.open(save_model(case, tmp_path / "in"))
    random = torch.Generator().manual_seed(1)
    ids, lengths = torch.randint(1, 90, (3, 12), generator=random), torch.tensor([12, 7, 10])
    is_text = torch.arange(12) < lengths.unsqueeze(-1)
    labels = torch.where(is_text & (torch.rand(3, 12, generator=random) < 0.4), ids, -100)
    segments, pairs = (torch.arange(12) >= 5).long().expand(3, -1).contiguous(), torch.tensor([0, 1, 1])
    theirs = make_model(case)
    both = opened.model.next_sentence
    inputs = {"input_ids": ids, "attention_mask": is_text.long(), "token_type_ids": segments, "labels": labels}
    theirs(**inputs, **({"next_sentence_label": pairs} if both else {})).loss.backward()
    weight = int((labels != -100).sum()) / 3
    batch = Batch(ids, labels, lengths, segments=segments, pair_labels=pairs if both else None, pair_weight=weight)
    assert_same_gradients(opened, theirs, batch)


def assert_same_gradients(opened: OpenedCheckpoint, theirs: PreTrainedModel, batch: Batch) -> None:
    """Fails unless the mean loss of the batch has the gradients that `theirs` has now."""
    assert batch.labels is not None
    built = build_stage(opened.model, Mesh.single())
    load(built.parameters, opened.source)
    (built.module(None, batch) / int((batch.labels != -100).sum())).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for parameter in built.parameters:
        for shard, view in shard_views(parameter, parameter.require_grad()):
            name, rule = opened.source.match.places[shard.name]
            grad = expected[name].numpy()
            found = pull(rule.view, Box.whole(tuple(view.shape)), lambda box, grad=grad: grad[box.slices])
            np.testing.assert_allclose(view.numpy(), found, atol=1e-4 * max(1.0, float(np.abs(found).max())))
