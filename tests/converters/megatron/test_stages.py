"""Layers of Megatron's pipeline stages, against its own arithmetic where that can be had."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.megatron.stages import load_layout, stage_layers
from workbench.errors import CheckpointError, ConversionError


def arguments(layers: int, pp: int, vpp: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None,
        **more,
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (arguments(8, 4), (2, 2, 2, 2)),
        (arguments(8, 2, 2), (2, 2, 2, 2)),
        (arguments(8, 1, 2), (8,)),
        (arguments(9, 3, decoder_first_pipeline_num_layers=1), (1, 4, 4)),
        (arguments(9, 3, decoder_last_pipeline_num_layers=1), (4, 4, 1)),
        (arguments(9, 2, decoder_first_pipeline_num_layers=4, decoder_last_pipeline_num_layers=5), (4, 5)),
        (arguments(10, 3, 2, decoder_first_pipeline_num_layers=2), (1, 2, 2, 1, 2, 2)),
        (arguments(7, 4, account_for_embedding_in_pipeline_split=True), (1, 2, 2, 2)),
        (arguments(7, 4, account_for_loss_in_pipeline_split=True), (2, 2, 2, 1)),
        (
            arguments(6, 4, 2, account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True),
            (0, 1, 1, 1, 1, 1, 1, 0),
        ),
        (arguments(7, 2, 2, pipeline_model_parallel_layout="Et|(tt|)*2,ttL"), (1, 2, 2, 2)),
        (arguments(2, 2, pipeline_model_parallel_layout="E|ttL"), (0, 2)),
    ],
)
def test_layers_lie_on_stages_as_megatron_lays_them(given: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert stage_layers(given, "") == expected


@pytest.mark.parametrize(
    "given",
    [
        arguments(7, 2),
        arguments(6, 2, 2),
        arguments(8, 4, decoder_first_pipeline_num_layers=1),
        arguments(2, 3, decoder_first_pipeline_num_layers=4),
        arguments(1, 2, decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=1),
    ],
)
def test_layers_that_do_not_come_out_even_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConversionError, match=f"num_layers={given['num_layers']} cannot be dealt to pipeline_model"):
        stage_layers(given, "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Et|tXL", "has ['X']"),
        ("(t|)*99999999999999", "has too many layers"),
        ("t*" + "9" * 5000, "has too many layers"),
        ("Et|t|L", "has 2 layers on 3 virtual stages"),
        ("Et|ttL", "has 3 layers on 2 virtual stages"),
        (["E", 5], "is neither a text nor a list"),
    ],
)
def test_a_layout_that_is_none_is_refused(text: Any, why: str) -> None:
    with pytest.raises(ConversionError, match=re.escape(why)):
        stage_layers(arguments(2, 2, pipeline_model_parallel_layout=text), "")


def test_a_layout_is_read_as_megatron_documents_it() -> None:
    said = arguments(61, 32, pipeline_model_parallel_layout="Et*3|(tt|)*29,m|L")
    assert stage_layers(said, "") == (3, *[2] * 29, 0, 0)


@given(st.lists(st.sampled_from(["t", "t*3", "|", ",", "(tt|)*2", "(t|tt)*3", "m", "E", "L"]), max_size=12))
def test_a_layout_is_read_as_megatron_reads_it(words: list[str]) -> None:
    layouts = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    text = "t|t" + "".join(words)
    theirs = layouts.PipelineParallelLayerLayout.parse_str_to_list(text)
    counts = tuple(sum(kind.name == "decoder" for kind in stage) for stage in theirs)
    said = arguments(sum(counts), len(counts), pipeline_model_parallel_layout=text)
    assert stage_layers(said, "") == counts


def test_a_number_that_is_none_is_refused() -> None:
    with pytest.raises(CheckpointError, match="decoder_last_pipeline_num_layers='1', which is no number from 1 to"):
        stage_layers(arguments(4, 2, decoder_last_pipeline_num_layers="1"), "")


def test_the_layout_of_a_run_says_its_degrees() -> None:
    said = arguments(6, 2, decoder_first_pipeline_num_layers=2) | {
        "tensor_model_parallel_size": 4,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": True,
        "make_vocab_size_divisible_by": 64,
    }
    layout = load_layout(said, "")
    assert (layout.tp, layout.pp, layout.vpp, layout.ep, layout.dp, layout.etp) == (4, 2, 1, 2, 2, 1)
    assert layout.pp_layout == (2, 4) and layout.vocab_multiple == 64 and layout.sequence_parallel
    assert [list(chunk) for stage in layout.chunks(6) for chunk in stage] == [[0, 1], [2, 3, 4, 5]]
