"""DualPipeV: DualPipe's order cut in half, two chunks a stage that go there and back (DeepSeek-V3, arXiv:2412.19437,
section 3.2.1; github.com/deepseek-ai/DualPipe, dualpipev.py).

There a forward and the backward that follows it run at once and hide each other's communication; here they run in turn.
"""

from pretrain.schedules import Action, Schedule
from pretrain.schedules._vee import spell


def actions(stage: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    """Whole backwards in the steady state, halves at the ends. Made for at least 2 p microbatches on p stages; every
    stage holds up to 2 p + 1 chunks."""
    assert 0 <= stage < num_stages and num_chunks == 2, (stage, num_stages, num_chunks)
    behind = num_stages - stage - 1
    planned = max(num_microbatches, 2 * num_stages)
    whole, half = divmod(stage + 1, 2)
    return spell(
        num_microbatches,
        (2 * behind, "F0"),
        (stage + 1, "F0 F1"),
        (behind, "I1 W F1"),
        (planned - 2 * num_stages + stage + 1, "F0 B1 F1 B0"),
        (behind, "B1 F1 B0"),
        (whole, "B1 B0"),
        (half, "B1 I0"),
        (whole, "I1 I0"),
        (behind, "W I0"),
        (stage + 1, "W"),
    )


SCHEDULE = Schedule(
    "dualpipev",
    "DualPipe's order, two chunks there and back",
    actions,
    placement="vee",
    num_chunks=2,
    splits_backward=True,
)
