"""1F1B over several chunks of layers a stage (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

The order is Megatron-LM's (core/pipeline_parallel/schedules.py, forward_backward_pipelining_with_interleaving), whose
groups of microbatches are here evened out when the stages do not divide the microbatches.
"""

from pretrain.schedules import Action, Schedule
from pretrain.schedules._loop import one_each


def actions(stage: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    """As 1F1B, each chunk in the place of a stage. A bubble of (p - 1) / (v m + p - 1) when p stages divide m
    microbatches, for (v - 1) / v more activations; with one chunk it is 1F1B."""
    return one_each(stage, num_stages, num_microbatches, num_chunks, lead=1 if num_chunks == 1 else 2)


SCHEDULE = Schedule("interleaved", "1F1B over several chunks of layers a stage", actions, num_chunks=None)
