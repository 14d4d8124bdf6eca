"""ZB-V: two chunks a stage that go there and back, backward in halves (Qi et al. 2024, arXiv:2405.15362, V-ZB)."""

from pretrain.schedules import Action, Schedule
from pretrain.schedules._vee import spell


def actions(stage: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    """No stage waits once it has begun, where the three computations take equally long, if there are at least
    2 p - 1 microbatches for p stages. Every stage holds up to 2 p chunks, as much as p whole stages of 1F1B."""
    assert 0 <= stage < num_stages and num_chunks == 2, (stage, num_stages, num_chunks)
    behind = num_stages - stage
    planned = max(num_microbatches, 2 * num_stages - 1)
    return spell(
        num_microbatches,
        (2 * behind - 1, "F0"),
        (stage, "F1 F0"),
        (behind, "F1 I1 W"),
        (planned - num_stages - behind + 1, "F0 I0 W F1 I1 W"),
        (behind - 1, "I0 W F1 I1 W"),
        (stage, "I0 I1"),
        (behind, "I0 W"),
        (2 * stage, "W"),
    )


SCHEDULE = Schedule(
    "zbv", "two chunks there and back, backward in halves", actions, placement="vee", num_chunks=2, splits_backward=True
)
