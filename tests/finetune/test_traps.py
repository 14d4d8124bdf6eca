"""Faults of fine-tuning data that users of other tools met, and the tests that would show them here."""

from __future__ import annotations

import pytest

from tests.parity.test_traps import names_in

GUARDS = {
    "all labels masked, and a run that is called successful": (
        "tests/finetune/test_tasks.py::test_a_prompt_that_leaves_no_room_for_an_answer_is_refused",
    ),
    "padding that is the end of text, so that the model never stops": (
        "tests/finetune/test_tasks.py::test_where_padding_is_the_end_of_text_the_end_is_still_learned_and_padding_is_not",
        "tests/finetune/test_chat.py::test_answers_that_never_teach_the_model_to_stop_are_warned_of",
    ),
    "a chat template without generation markers": (
        "tests/finetune/test_chat.py::test_without_markers_the_same_is_learned_from_what_answers_add",
        "tests/finetune/test_chat.py::test_a_template_that_rewrites_earlier_turns_is_refused_unless_it_marks_its_answers",
    ),
    "packing that leaks across samples": (
        "tests/finetune/test_packing.py::test_loss_and_gradients_of_shared_rows_are_those_of_rows_apart",
        "tests/finetune/test_packing.py::test_no_example_feels_what_shares_its_row",
    ),
    "a data file refused because it is not registered": (
        "tests/finetune/test_rows.py::test_a_file_needs_no_registration_to_be_read",
    ),
    "a typo in the config ignored": (
        "tests/finetune/test_config.py::test_a_fault_is_named",
        "tests/finetune/test_rows.py::test_columns_are_called_as_the_user_says",
    ),
}


@pytest.mark.parametrize("fault", GUARDS)
def test_a_known_fault_has_a_test_that_would_show_it(fault: str) -> None:
    for guard in GUARDS[fault]:
        path, _, name = guard.partition("::")
        assert name in names_in(path), guard
