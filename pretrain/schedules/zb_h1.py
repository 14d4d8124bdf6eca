"""1F1B with its backward in halves (Qi et al. 2023, ZB-H1, arXiv:2401.10241, section 2.3)."""

from pretrain.schedules import Action, Schedule
from pretrain.schedules._loop import one_each


def actions(stage: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    """A third of 1F1B's bubble, where the three computations take equally long: a stage of p waits (p - 1) times as
    long as F + I - W. Every stage holds up to p microbatches, as the first one of 1F1B does."""
    assert num_chunks == 1, num_chunks
    return one_each(stage, num_stages, num_microbatches, num_chunks, lead=1, split=True)


SCHEDULE = Schedule("zb_h1", "1F1B with its backward in halves", actions, splits_backward=True)
