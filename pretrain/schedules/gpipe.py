"""All forwards, then all backwards (Huang et al. 2019, GPipe, section 2.3)."""

from pretrain.schedules import Action, Schedule


def actions(stage: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    """Every forward in order, then every backward in order; holds all microbatches at once."""
    assert 0 <= stage < num_stages and num_chunks == 1, (stage, num_stages, num_chunks)
    forwards = tuple(Action("F", m) for m in range(num_microbatches))
    backwards = tuple(Action("B", m) for m in range(num_microbatches))
    return forwards + backwards


SCHEDULE = Schedule("gpipe", "all forwards, then all backwards", actions)
