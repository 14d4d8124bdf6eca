"""One forward, one backward in turn (Narayanan et al. 2021, PipeDream-Flush, section 2.2)."""

from pretrain.schedules import Action, Schedule


def actions(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    """Warm-up forwards until the pipeline behind this stage is full, then forward and backward in turn, then the rest.

    At most min(num_microbatches, num_stages - stage) microbatches are held at once.
    """
    assert 0 <= stage < num_stages, (stage, num_stages)
    warmup = min(num_microbatches, num_stages - stage - 1)
    found = [Action("F", m) for m in range(warmup)]
    for backward in range(num_microbatches):
        forward = warmup + backward
        if forward < num_microbatches:
            found.append(Action("F", forward))
        found.append(Action("B", backward))
    return tuple(found)


SCHEDULE = Schedule("1f1b", "one forward, one backward in turn", actions)
