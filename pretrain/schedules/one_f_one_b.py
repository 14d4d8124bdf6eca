"""One forward, one backward in turn (Narayanan et al. 2021, PipeDream-Flush, section 2.2)."""

from pretrain.schedules import Action, Schedule
from pretrain.schedules._loop import one_each


def actions(stage: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    """Warm-up forwards until the pipeline behind this stage is full, then forward and backward in turn, then the rest.

    At most min(num_microbatches, num_stages - stage) microbatches are held at once.
    """
    assert num_chunks == 1, num_chunks
    return one_each(stage, num_stages, num_microbatches, num_chunks, lead=1)


SCHEDULE = Schedule("1f1b", "one forward, one backward in turn", actions)
