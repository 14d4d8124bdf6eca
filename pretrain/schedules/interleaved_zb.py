"""Interleaved 1F1B with its backward in halves (as ScheduleInterleavedZeroBubble of torch.distributed.pipelining)."""

from pretrain.schedules import Action, Schedule
from pretrain.schedules._loop import one_each


def actions(stage: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    """ZB-H1, each chunk in the place of a stage; with one chunk it is ZB-H1."""
    return one_each(stage, num_stages, num_microbatches, num_chunks, lead=1, split=True)


SCHEDULE = Schedule(
    "interleaved_zb", "interleaved, with its backward in halves", actions, num_chunks=None, splits_backward=True
)
