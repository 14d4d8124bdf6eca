"""Where a run of Megatron stood, as a training state of ours: steps, samples, rates of the optimizer. No torch.

What has a place is carried over; the rest is listed by name with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from converters.untrusted.torch_file import StridedTensor
from workbench.checkpoint.manifest import TrainingState
from workbench.errors import CheckpointError
from workbench.spec.geometry import Box

SCHEDULES: Final = {
    "constant": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "inverse-square-root": "inverse_sqrt",
    "WSD": "wsd",
}
"""Megatron's names of curves of the learning rate -> ours."""
DROPPED: Final = {
    "rng_state": "random numbers here are functions of the seed and the step",
    "rerun_state_machine": "Megatron's own search for faulty hardware",
    "num_floating_point_operations_so_far": "counted anew",
    "ft_state": "times of Megatron's own watchdog",
}
"""What else Megatron saves of a run, and why it is left out."""
HYSTERESIS: Final = 2
"""Overflows after which Megatron lowers the loss scale, unless told otherwise: what is left of them after a growth."""
_LARGEST: Final = 1 << 62  # larger numbers are damage
_PLAIN: Final = {"wd_mult": (0.0, 1.0), "lr_mult": (1.0,), "is_decoupled_lr": (False,)}


@contextmanager
def plain_data(where: str) -> Iterator[None]:
    """CheckpointError where what is read inside has other types or keys than Megatron's plain data have."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: what it says of the optimizer and the run is not built as Megatron builds it "
            f"({type(error).__name__}: {error}); the file is damaged"
        ) from error


def training_state(
    arguments: Mapping[str, Any], common: Mapping[str, Any], optimizer: Any, where: str
) -> TrainingState:
    """The state of a run from its arguments, what is saved beside its tensors, and what the optimizer says.

    In the state, optimizer and scheduler hold what the configuration that goes on with the run should say.
    """
    groups = param_groups(optimizer)
    step = _count(common.get("iteration", 0), "iteration", where)
    samples = _count(arguments.get("consumed_train_samples") or 0, "consumed_train_samples", where)
    length = _count(arguments.get("seq_length") or 0, "seq_length", where)
    scheduler = common.get("opt_param_scheduler") or {}
    return TrainingState(
        step=step,
        samples=samples,
        tokens=samples * length,
        seed=_count(arguments.get("seed") or 0, "seed", where),
        scheduler=_schedule(arguments, scheduler),
        optimizer={**_optimizer(scheduler, groups, step), **_loss_scale(optimizer)} if groups else {},
    )


def _count(value: Any, name: str, where: str) -> int:
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{where}: {name}={value!r} is not a number of them; the file is damaged")
    return value


def _schedule(arguments: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The curve of the learning rate, in steps; Megatron counts it in samples."""
    batch = arguments.get("global_batch_size")
    if not scheduler or not isinstance(batch, int) or batch < 1:
        return {}
    style = str(scheduler.get("lr_decay_style"))
    return {
        "schedule": SCHEDULES.get(style, style),
        "horizon": int(_number(scheduler.get("lr_decay_steps")) or 0) // batch,
        "warmup": int(_number(scheduler.get("lr_warmup_steps")) or 0) // batch,
        "lr": _number(scheduler.get("max_lr")),
        "min_lr": _number(scheduler.get("min_lr")),
    }


def _optimizer(scheduler: Mapping[str, Any], groups: list[dict[str, Any]], step: int) -> dict[str, Any]:
    decayed = next((group for group in groups if group.get("wd_mult", 1.0) == 1.0), groups[0])
    updates = next((group["step"] for group in groups if group.get("step") is not None), step)
    return {
        "name": "adamw",
        "step": int(_number(updates) or 0),
        "betas": [_number(beta) for beta in decayed.get("betas", ())],
        "eps": _number(decayed.get("eps")),
        "weight_decay": _number(scheduler.get("end_wd", decayed.get("weight_decay"))),
    }


def param_groups(state: Any) -> list[dict[str, Any]]:
    """The groups of parameters of an optimizer's plain state, of all optimizers when it has several, each with `step`.

    The step of a group is its own, or else that of all parameters, which are told apart nowhere.
    """
    found: list[dict[str, Any]] = []
    for inner in _holding("param_groups", state):
        parameters = inner.get("state") or {}
        common = parameters.get("common_step")
        each = [held.get("step") for held in parameters.values() if isinstance(held, dict)]
        step = common if common is not None else each[0] if each else None
        found += [{"step": _scalar(step), **group} for group in inner["param_groups"]]
    return found


def _loss_scale(state: Any) -> dict[str, Any]:
    """The dynamic loss scale of a run in fp16, as pretrain's LossScale keeps it; empty when there is none."""
    for held in _holding("grad_scaler", state):
        scaler = held["grad_scaler"]
        for inner in _holding("scale", scaler):
            steps = inner.get("growth_tracker", 0)
            value = {"value": float(_scalar(inner["scale"])), "finite_steps": int(steps), "skipped_steps": 0}
            return {"loss_scale": value}
    return {}


def _holding(key: str, tree: Any) -> Iterator[Mapping[str, Any]]:
    """The dictionaries with `key` in a tree of dictionaries and lists."""
    if isinstance(tree, Mapping) and key in tree:
        yield tree
    elif isinstance(tree, (Mapping, list, tuple)):
        for inner in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _holding(key, inner)


def _scalar(value: Any) -> Any:
    """A number that may have been stored as a tensor of one element."""
    return value.read(Box.whole(value.shape)).item() if isinstance(value, StridedTensor) else value


def _number(value: Any) -> int | float | None:
    """A finite number, if there is any."""
    value = _scalar(value)
    if value is not None and (type(value) not in (int, float) or not -_LARGEST < value < _LARGEST):
        raise TypeError(f"{value!r} where a number should be")
    return value


def left_out(common: Mapping[str, Any], optimizer: Any) -> dict[str, str]:
    """What a checkpoint says of its run and has no place here: name -> reason."""
    groups = param_groups(optimizer)
    found = {name: reason for name, reason in DROPPED.items() if common.get(name) is not None}
    for scaler in (held["grad_scaler"] for held in _holding("grad_scaler", optimizer)):
        for inner in _holding("hysteresis_tracker", scaler):
            if inner["hysteresis_tracker"] != HYSTERESIS:
                found["hysteresis_tracker"] = f"{inner['hysteresis_tracker']}: the loss scale is lowered at once here"
    for name, usual in _PLAIN.items():
        other = sorted({group[name] for group in groups if name in group and group[name] not in usual})
        if other:
            found[f"param_groups.{name}"] = f"{', '.join(map(str, other))}: one rate holds for all parameters here"
    if any(group.get("decoupled_weight_decay") is False for group in groups):
        found["decoupled_weight_decay"] = "False: weight decay is not part of the gradient here"
    return found
