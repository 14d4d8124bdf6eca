"""Who executes a run, found out on the machine that it runs on."""

from __future__ import annotations

from pretrain.capabilities import device_faults, te_faults
from pretrain.config import EngineConfig
from workbench.errors import LaunchError
from workbench.parallel.backends import Choice, choose_backend
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig


def choose_executor(config: EngineConfig, model: ModelConfig, layout: ParallelLayout, device: str) -> Choice:
    """The backend of a run on `device` ("cpu", "cuda"); LaunchError with what the configuration asks of it in vain."""
    if faults := device_faults(config, device):
        raise LaunchError("; ".join(faults))
    return choose_backend(config.asked_backend, device, te_faults(config, model, layout))
