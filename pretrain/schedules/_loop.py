"""The order that schedules of the 1F1B kind share: forwards ahead, then forward and backward in turn, then the rest."""

from __future__ import annotations

from pretrain.schedules import Action, forward_turns, microbatch_groups


def one_each(
    stage: int, num_stages: int, num_microbatches: int, num_chunks: int, *, lead: int, split: bool = False
) -> tuple[Action, ...]:
    """The actions of `stage`: it runs `lead` forwards more ahead of its first backward than the stage after it does.

    With `split`, the weights' gradients lag `stage` turns behind the inputs' (arXiv:2401.10241, fig. 3), so that every
    stage holds as much as the first one, and are what is left to fill the end with.
    """
    assert 0 <= stage < num_stages, (stage, num_stages)
    turns = forward_turns(num_stages, num_microbatches, num_chunks)
    forwards = [Action("F", microbatch, chunk) for microbatch, chunk in turns]
    backwards = [(microbatch, num_chunks - 1 - chunk) for microbatch, chunk in turns]
    largest_group = len(microbatch_groups(num_stages, num_microbatches)[0])
    ahead = (num_chunks - 1) * largest_group + lead * (num_stages - 1 - stage)
    found, rest = forwards[:ahead], forwards[ahead:]
    for i, backward in enumerate(backwards):
        found += rest[i : i + 1]
        found.append(Action("I" if split else "B", *backward))
        if split and i >= stage:
            found.append(Action("W", *backwards[i - stage]))
    if split:
        found += [Action("W", *backward) for backward in backwards[max(len(backwards) - stage, 0) :]]
    return tuple(found)
