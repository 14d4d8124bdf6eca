"""What Megatron finds of an optimizer in a checkpoint of ours, beside its tensors. No torch.

In torch_dist folders that is the mode `fully_reshardable`; for rank folders see `saved_rank_optimizer`.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from typing import Any, Final

from converters.containers.torch_zip import new_tensor
from converters.format import WriteRequest
from converters.megatron.buffers import MASTER, MOMENTS
from converters.megatron.modules import BUFFERS
from converters.megatron.training import HYSTERESIS, SCHEDULES
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


def with_moments(
    rules: Mapping[str, Rule], schema: Mapping[str, LogicalTensor], *, masters: bool
) -> dict[str, tuple[Rule, ...]]:
    """The places of every tensor of `schema`, by the rules of weights.

    A weight that has moments is its own 32-bit master; masters: which is stored apart, so that it lies in two places.
    ConversionError for state that is not Adam's, or not of all weights, and for weights of 16 bits beside it.
    """
    found: dict[str, tuple[Rule, ...]] = {}
    strange = []
    for name, tensor in schema.items():
        kind, _, weight = name.removeprefix(OPTIMIZER_PREFIX).rpartition("/")
        if weight not in rules or (kind and kind not in MOMENTS) or (kind and rules[weight].foreign.endswith(BUFFERS)):
            strange.append(name)
        elif kind:
            found[name] = (_of(kind, rules[weight], name),)
        elif not _moments(name, schema):
            found[name] = (rules[name],)
        elif tensor.dtype == "F32":
            found[name] = (rules[name], *([_of(MASTER, rules[name], name)] if masters else ()))
        else:
            raise ConversionError(
                f"{name} is {tensor.dtype}: Megatron's optimizer keeps 32-bit masters of all weights; leave out "
                "--dtype, or the optimizer (--optimizer drop)"
            )
    trained = [name for name in found if name in rules and not rules[name].foreign.endswith(BUFFERS)]
    bare = [name for name in trained if len(_moments(name, schema)) < len(MOMENTS)] if has_moments(schema) else []
    for names, fault in ((strange, "no place in Megatron's Adam"), (bare, "not both moments of Adam")):
        if names:
            raise ConversionError(
                f"{summarise(names, 'has', 'have')} {fault}; leave the optimizer out (--optimizer drop)"
            )
    return found


def _moments(weight: str, schema: Mapping[str, LogicalTensor]) -> list[str]:
    """The moments of a weight that are there."""
    return [kind for kind in MOMENTS if f"{OPTIMIZER_PREFIX}{kind}/{weight}" in schema]


def _of(kind: str, rule: Rule, name: str) -> Rule:
    return Rule(name, f"{kind}/{rule.foreign}", rule.view)


def common_state(training: TrainingState, layout: ParallelLayout) -> dict[str, Any]:
    """What lies beside the tensors of a torch_dist folder: groups of parameters, and the schedule where it is known.

    ConversionError when the checkpoint does not say the settings that Megatron would go on with.
    """
    optimizers = [
        {**plain_state(training, expert=expert), "param_state_sharding_type": MODE}
        for expert in ((False, True) if layout.ep > 1 else (False,))
    ]
    whole = dict(enumerate(optimizers)) if len(optimizers) > 1 else optimizers[0]
    return {"optimizer": whole, **schedule(training)}


def plain_state(training: TrainingState, *, expert: bool) -> dict[str, Any]:
    """What an optimizer, of experts or of the rest, says where its tensors are stored apart.

    ConversionError as of `common_state`.
    """
    groups = [param_group(training, expert=expert, decayed=decayed) for decayed in (True, False)]
    return {"optimizer": {"param_groups": groups}, **grad_scaler(training)}


def grad_scaler(training: TrainingState) -> dict[str, Any]:
    """The dynamic loss scale of a run in fp16, as Megatron's DynamicGradScaler keeps it; nothing where there is none.

    It is lowered after a number of overflows, of which none is counted here: our runs lower it after each.
    """
    if (scale := training.optimizer.get("loss_scale")) is None:
        return {}
    value = new_tensor("F32", (1,), struct.pack("<f", scale["value"]))
    trackers = {"growth_tracker": scale["finite_steps"], "hysteresis_tracker": HYSTERESIS}
    return {"grad_scaler": {"scale": value, **trackers}}


def _settings(training: TrainingState) -> dict[str, Any]:
    """The rates of the optimizer; ConversionError names those that are not known."""
    settings = {"lr": training.scheduler.get("lr")}
    settings |= {name: training.optimizer.get(name) for name in ("betas", "eps", "weight_decay")}
    if lacking := [name for name, value in settings.items() if not _is_known(value, 2 if name == "betas" else 0)]:
        raise ConversionError(
            f"the checkpoint does not say {', '.join(lacking)} of its optimizer, with which Megatron would go on; "
            "save it again with this version, or leave the optimizer out (--optimizer drop)"
        )
    return settings


def _is_known(value: Any, count: int) -> bool:
    """Whether this is a number, or as many of them."""
    if count:
        return isinstance(value, (list, tuple)) and len(value) == count and all(_is_known(one, 0) for one in value)
    return type(value) in (int, float)


def param_group(training: TrainingState, *, expert: bool, decayed: bool) -> dict[str, Any]:
    """A group of parameters, those with weight decay or those without; ConversionError as of `common_state`."""
    settings, multiple = _settings(training), float(decayed)
    return {
        "is_expert_parallel": expert,
        "default_config": True,
        "wd_mult": multiple,
        "lr_mult": 1.0,
        "is_decoupled_lr": False,
        "max_lr": settings["lr"],
        "min_lr": training.scheduler.get("min_lr") or 0.0,
        **settings,
        "betas": tuple(settings["betas"]),
        "weight_decay": settings["weight_decay"] * multiple,
        **_ADAM,
        "step": training.optimizer.get("step", training.step),
    }


def schedule(training: TrainingState) -> dict[str, Any]:
    """The state of Megatron's OptimizerParamScheduler, which counts samples; nothing where the curve has no end."""
    scheduler, settings = training.scheduler, _settings(training)
    theirs = {ours: name for name, ours in SCHEDULES.items()}.get(str(scheduler.get("schedule")))
    horizon, warmup = scheduler.get("horizon"), scheduler.get("warmup", 0)
    if theirs is None or type(horizon) is not int or type(warmup) is not int or not training.step:
        return {}
    batch = training.samples // training.step
    return {
        "opt_param_scheduler": {
            "max_lr": settings["lr"],
            "min_lr": scheduler.get("min_lr") or 0.0,
            "lr_warmup_steps": warmup * batch,
            "num_steps": training.samples,
            "lr_decay_style": theirs,
            "lr_decay_steps": horizon * batch,
            "start_wd": settings["weight_decay"],
            "end_wd": settings["weight_decay"],
            "wd_incr_style": "constant",
            "wd_incr_steps": 0,
        }
    }


def has_moments(names: Collection[str]) -> bool:
    """Whether any of these logical tensors is a moment."""
    return any(name.startswith(OPTIMIZER_PREFIX) for name in names)


def saved_training(request: WriteRequest) -> TrainingState | None:
    """Where the run stood whose optimizer is to be written; None for a release, which has none."""
    return (request.training or TrainingState(step=0)) if has_moments(request.schema) else None
