"""Faults of training numerics that users of other engines met, and the tests that would show them here.

The sources are public reports: Megatron-LM's issues 1754, 6660 and 7452, and the usual slips of accumulation, clipping
and sharded losses.
"""

from __future__ import annotations

import ast
from functools import cache

import pytest

from tests.helpers.mutation import ROOT

GUARDS = {
    "losses of TP=1 and TP=2 differ when the vocabulary is not a multiple of TP": (
        "tests/parallel/test_chunked_loss.py::test_losses_of_tp_1_and_tp_2_are_equal_when_tp_does_not_divide_the_vocabulary",
        "tests/parallel/test_loss.py::test_loss_and_gradient_equal_cross_entropy_of_the_whole_vocabulary",
    ),
    "a loss off by log(TP) with gathered logits": (
        "tests/parallel/test_chunked_loss.py::test_a_model_that_knows_nothing_loses_log_vocab_and_not_log_tp_more",
    ),
    "a loss per token under unequal masks": (
        "tests/parallel/test_gradients.py::test_accumulated_gradients_are_of_the_mean_over_labels_and_no_mean_of_means",
    ),
    "recompute or scatter on the wrong group": (
        "tests/pretrain/test_pipeline_parity.py::test_layers_that_are_computed_again_equal_one_process",
        "tests/parity/test_mutations.py::test_a_collective_that_is_taken_out_is_missed",
    ),
    "parameters missing from the norm that clips": (
        "tests/parallel/test_gradients.py::test_the_norm_that_clips_counts_each_element_of_each_parameter_once",
    ),
    "context parallelism that divides by the local count of tokens": (
        "tests/pretrain/test_token_parity.py::test_a_context_rank_without_labels_adds_nothing_and_no_rank_divides_by_its_own_count",
    ),
    "the gradient of a norm that is not summed over TP under sequence parallelism": (
        "tests/parallel/test_sequence.py::test_gradients_of_what_acts_between_the_cut_layers_are_partial_and_no_others",
    ),
    "a layer index local to its stage when a run is resumed at another PP": (
        "tests/pretrain/test_trainer.py::test_a_run_resumed_at_another_layout_sees_the_same_data_and_loses_alike",
    ),
    "a gradient norm off by sqrt(2) to 2 under TP or tied weights": (
        "tests/parallel/test_gradients.py::test_the_gradient_norm_of_a_step_with_tied_weights_is_that_of_one_process",
    ),
    "a data-parallel group of one rank that amplifies gradients": (
        "tests/parallel/test_gradients.py::test_a_data_parallel_group_of_one_rank_does_not_amplify_gradients",
    ),
    "accumulation that averages the means of microbatches": (
        "tests/parallel/test_gradients.py::test_accumulated_gradients_are_of_the_mean_over_labels_and_no_mean_of_means",
        "tests/pretrain/test_pipeline.py::test_accumulated_microbatches_equal_one_large_batch",
    ),
    "a share without labels that gives NaN where 0 is right": (
        "tests/parallel/test_chunked_loss.py::test_a_microbatch_without_labels_costs_nothing_and_moves_nothing",
        "tests/pretrain/test_token_parity.py::test_a_context_rank_without_labels_adds_nothing_and_no_rank_divides_by_its_own_count",
    ),
    "learning rate, moments, data position or order changed by a resume": (
        "tests/pretrain/test_trainer.py::test_six_steps_equal_four_steps_a_crash_and_a_resume_bit_for_bit",
        "tests/pretrain/data/test_loader.py::test_the_seed_alone_decides_the_order",
    ),
    "auxiliary losses of experts scaled by TP or CP": (
        "tests/models/test_moe.py::test_losses_of_routers_are_scaled_by_no_degree",
        "tests/models/test_router.py::test_the_gradient_of_the_whole_loss_is_that_of_transformers",
    ),
    "a gradient norm off under EP": ("tests/models/test_moe.py::test_the_norm_that_clips_counts_each_expert_once",),
    "label smoothing under TP": (
        "tests/parallel/test_loss.py::test_loss_and_gradient_equal_cross_entropy_of_the_whole_vocabulary",
        "tests/finetune/test_comforts.py::test_smoothing_and_noise_are_the_same_at_every_layout",
    ),
    "experts dropped without a word": (
        "tests/models/test_router.py::test_an_expert_that_drops_its_tokens_is_seen",
        "tests/converters/families/test_experts.py::test_a_missing_expert_is_refused_by_name",
    ),
}


@cache
def names_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("fault", GUARDS)
def test_a_known_fault_has_a_test_that_would_show_it(fault: str) -> None:
    for guard in GUARDS[fault]:
        path, _, name = guard.partition("::")
        assert name in names_in(path), guard
