"""When logits differ, the first layer that does is named: the engine's hidden states are transformers'."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from converters import copy
from converters.divergence import engine_states, first_divergence, state_names
from converters.format import OpenedCheckpoint
from converters.formats.huggingface import FORMAT
from converters.logits import compare_sources, probe_inputs, probe_sequences, reference_request
from converters.reference import arrays, load
from tests.converters.test_full import FIRST_OF_A_FAMILY
from tests.helpers.checkpoints import MemorySource, random_native, whole_arrays
from tests.helpers.hf_models import save_model
from workbench.checkpoint.reader import NativeSource
from workbench.cli.main import main
from workbench.errors import VerificationError
from workbench.spec.geometry import Box

ROTATED = "layers.2.self_attn.k_proj.weight"


def states(opened: OpenedCheckpoint) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Hidden states of the longest probe sequence: the engine's, and transformers'."""
    sequence = probe_sequences(opened.model)[-1]
    names = (
        ("encoder_hidden_states", "decoder_hidden_states") if opened.model.num_encoder_layers else ("hidden_states",)
    )
    request = {**reference_request(opened.model, opened.path, [sequence]), "states": names}
    ours = engine_states(opened.model, opened.source, probe_inputs(opened.model, sequence))
    return ours, arrays(load(request)[0], request)


@pytest.mark.parametrize("case", sorted(FIRST_OF_A_FAMILY.values()))
def test_hidden_states_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    opened = FORMAT.open(save_model(case, tmp_path))
    ours, theirs = states(opened)
    assert len(ours) == len(theirs) == len(state_names(opened.model))
    for name, a, b in zip(state_names(opened.model), ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1.0, np.abs(b).max() / 10), err_msg=name)
    assert first_divergence(opened.model, ours, theirs, 1e-4).startswith("all layers agree")


def rotated(opened: OpenedCheckpoint, name: str = ROTATED) -> MemorySource:
    """The tensors of a checkpoint with the rows of one tensor turned by one."""
    held = whole_arrays(opened.source)  # type: ignore[arg-type]
    return MemorySource(opened.source.schema, {**held, name: np.roll(held[name], 1, axis=0)})


@pytest.mark.parametrize("case", ["llama, tied, grouped, llama3 rope", "gemma2, tied, grouped, capped"])
def test_the_first_layer_that_differs_is_named(case: str, tmp_path: Path) -> None:
    opened = FORMAT.open(save_model(case, tmp_path))
    theirs = states(opened)[1]
    inputs = probe_inputs(opened.model, probe_sequences(opened.model)[-1])
    wrong = engine_states(opened.model, rotated(opened), inputs)
    assert first_divergence(opened.model, wrong, theirs, 1e-4).startswith(
        "the first to differ is the output of layer 2,"
    )
    wrong = engine_states(opened.model, rotated(opened, "embed_tokens.weight"), inputs)
    assert "is the output of the embeddings" in first_divergence(opened.model, wrong, theirs, 1e-4)


def test_two_sources_that_differ_are_told_apart_by_layer(tmp_path: Path) -> None:
    opened = FORMAT.open(save_model("llama, untied, a KV head per head", tmp_path))
    report = compare_sources(opened.model, opened.source, opened.source, tmp_path)
    assert asdict(report)["difference"] == 0 and report.against == "the copy"
    with pytest.raises(VerificationError, match=r"logits differ .*the first to differ is the output of layer 2, by"):
        compare_sources(opened.model, opened.source, rotated(opened), tmp_path)
    with pytest.raises(VerificationError, match="it is the head that differs"):
        compare_sources(opened.model, opened.source, rotated(opened, "lm_head.weight"), tmp_path)


def test_reshard_compares_logits_and_leaves_nothing_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    random_native(tmp_path / "a", dtype="F32")
    words = ["reshard", str(tmp_path / "a"), "--verify", "logits", "--tp", "2"]
    assert main([*words, str(tmp_path / "b")]) == 0
    assert "logits equal those of the copy within 0 over " in capsys.readouterr().out
    assert main([*words, str(tmp_path / "c"), "--dtype", "bf16"]) == 0
    read_native = NativeSource.read
    copying: list[bool] = []

    def read_wrong(self: NativeSource, name: str, box: Box) -> np.ndarray:
        array = read_native(self, name, box)
        return array[::-1] if name == ROTATED and copying else array

    def run_plan(*args: object, **options: object) -> dict[str, str]:
        copying.append(True)
        try:
            return right_plan(*args, **options)  # type: ignore[arg-type]
        finally:
            copying.clear()

    right_plan = copy.run_plan
    monkeypatch.setattr(NativeSource, "read", read_wrong)
    monkeypatch.setattr(copy, "run_plan", run_plan)
    capsys.readouterr()
    assert main([*words, str(tmp_path / "d")]) == 4
    assert "the first to differ is the output of layer 2, by" in capsys.readouterr().err
    assert not list(tmp_path.glob("d*"))
