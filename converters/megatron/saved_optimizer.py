"""What Megatron finds of an optimizer in a torch_dist folder of ours: mode `fully_reshardable`. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from converters.megatron.buffers import MASTER, MOMENTS
from converters.megatron.training import SCHEDULES
from converters.names import summarise
from converters.rules import Rule
from workbench.checkpoint.manifest import TrainingState
from workbench.errors import ConversionError
from workbench.spec.geometry import LogicalTensor
from workbench.spec.layout import ParallelLayout
from workbench.spec.schema import OPTIMIZER_PREFIX

MODE: Final = "fully_reshardable"
CONTENT: Final = {"distrib_optim_sharding_type": MODE, "chained_optim_avoid_prefix": True}
"""What the metadata of a folder's content says of its optimizer."""
_ADAM: Final = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "bias_correction": True,
    "decoupled_weight_decay": True,
}
"""Settings of torch's AdamW and Transformer Engine's, which have one value here."""


def split_kind(foreign: str) -> tuple[str, str]:
    """The kind of optimizer state ("" for weights) and the tensor of the whole model that a name stands for."""
    kind, _, name = foreign.rpartition("/")
    return kind, name


def with_moments(rules: Mapping[str, Rule], schema: Mapping[str, LogicalTensor]) -> dict[str, tuple[Rule, ...]]:
    """The places of every tensor of `schema`, by the rules of weights.

    A weight that has moments is its own 32-bit master, so that it lies in two places. ConversionError for state that is
    not Adam's, and for weights of 16 bits beside it.
    """
    found: dict[str, tuple[Rule, ...]] = {}
    strange = []
    for name, tensor in schema.items():
        kind, _, weight = name.removeprefix(OPTIMIZER_PREFIX).rpartition("/")
        if weight not in rules or (kind and kind not in MOMENTS):
            strange.append(name)
        elif kind:
            found[name] = (_of(kind, rules[weight], name),)
        elif f"{OPTIMIZER_PREFIX}{MOMENTS[0]}/{name}" not in schema:
            found[name] = (rules[name],)
        elif tensor.dtype == "F32":
            found[name] = (rules[name], _of(MASTER, rules[name], name))
        else:
            raise ConversionError(
                f"{name} is {tensor.dtype}: Megatron's optimizer keeps 32-bit masters of all weights; leave out "
                "--dtype, or the optimizer (--optimizer drop)"
            )
    if strange:
        raise ConversionError(
            f"{summarise(strange, 'has', 'have')} no place in Megatron's Adam; leave the optimizer out "
            "(--optimizer drop)"
        )
    return found


def _of(kind: str, rule: Rule, name: str) -> Rule:
    return Rule(name, f"{kind}/{rule.foreign}", rule.view)


def common_state(training: TrainingState, layout: ParallelLayout) -> dict[str, Any]:
    """What lies beside the tensors: groups of parameters, and the schedule where it is known.

    ConversionError when the checkpoint does not say the settings that Megatron would go on with.
    """
    settings = {"lr": training.scheduler.get("lr"), **{k: training.optimizer.get(k) for k in ("betas", "eps")}}
    settings["weight_decay"] = training.optimizer.get("weight_decay")
    if lacking := [name for name, value in settings.items() if value is None]:
        raise ConversionError(
            f"the checkpoint does not say {', '.join(lacking)} of its optimizer, with which Megatron would go on; "
            "save it again with this version, or leave the optimizer out (--optimizer drop)"
        )
    step = training.optimizer.get("step", training.step)
    optimizers = [
        {
            "optimizer": {"param_groups": _groups(settings, training, step, expert=expert)},
            "param_state_sharding_type": MODE,
        }
        for expert in ((False, True) if layout.ep > 1 else (False,))
    ]
    whole = dict(enumerate(optimizers)) if len(optimizers) > 1 else optimizers[0]
    return {"optimizer": whole, **_schedule(training, settings)}


def _groups(settings: Mapping[str, Any], training: TrainingState, step: int, *, expert: bool) -> list[dict[str, Any]]:
    """Parameters with weight decay, and those without."""
    return [
        {
            "is_expert_parallel": expert,
            "default_config": True,
            "wd_mult": decays,
            "lr_mult": 1.0,
            "is_decoupled_lr": False,
            "max_lr": settings["lr"],
            "min_lr": training.scheduler.get("min_lr", 0.0),
            **settings,
            "betas": tuple(settings["betas"]),
            "weight_decay": settings["weight_decay"] * decays,
            **_ADAM,
            "step": step,
        }
        for decays in (1.0, 0.0)
    ]


def _schedule(training: TrainingState, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state of Megatron's OptimizerParamScheduler, which counts samples; nothing where the curve has no end."""
    scheduler = training.scheduler
    theirs = {ours: name for name, ours in SCHEDULES.items()}.get(scheduler.get("schedule", ""))
    if theirs is None or not scheduler.get("horizon") or not training.step:
        return {}
    batch = training.samples // training.step
    return {
        "opt_param_scheduler": {
            "max_lr": settings["lr"],
            "min_lr": scheduler.get("min_lr", 0.0),
            "lr_warmup_steps": scheduler.get("warmup", 0) * batch,
            "num_steps": training.samples,
            "lr_decay_style": theirs,
            "lr_decay_steps": scheduler["horizon"] * batch,
            "start_wd": settings["weight_decay"],
            "end_wd": settings["weight_decay"],
            "wd_incr_style": "constant",
            "wd_incr_steps": 0,
        }
    }


def has_moments(names: Collection[str]) -> bool:
    """Whether any of these logical tensors is a moment."""
    return any(name.startswith(OPTIMIZER_PREFIX) for name in names)
