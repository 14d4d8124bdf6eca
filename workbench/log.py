"""What a run says about itself: log lines that name their rank, and metrics to every sink that is there."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from workbench.errors import ConfigError

ROOT = "workbench"
Metrics = Mapping[str, Any]


def get_logger(name: str) -> logging.Logger:
    """A logger under the one that `setup_logging` arranges: `get_logger(__name__)`."""
    return logging.getLogger(name if name.split(".")[0] == ROOT else f"{ROOT}.{name}")


def setup_logging(
    *, rank: int = 0, folder: Path | None = None, level: str = "info", console: TextIO | None = None
) -> None:
    """Sends log lines of this process to `folder`/rank-0000.log, and to the console: all of rank 0, warnings of others.

    May be called again; the earlier arrangement is closed and replaced.
    """
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    stream = logging.StreamHandler(console or sys.stderr)
    stream.setLevel(level.upper() if rank == 0 else logging.WARNING)
    stream.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(levelname)s: %(message)s"))
    logger.addHandler(stream)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / f"rank-{rank:04d}.log", encoding="utf-8")
        file.setFormatter(logging.Formatter(f"%(asctime)s [{rank}] %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(file)


class MetricSink(Protocol):
    """Takes the metrics of a step."""

    def write(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one object a line, complete after every write.

    A resumed run passes the step it goes on from: rows past it were written by the run that died, and are cut off, so
    that each step is there once.
    """

    def __init__(self, path: Path, *, resumed_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _keep_rows(path, resumed_step if resumed_step is not None else -1)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Metrics) -> None:
        row = {"step": step, **{name: _plain(value) for name, value in metrics.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """tensorboard/: every number as a scalar."""

    def __init__(self, folder: Path, *, resumed_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=None if resumed_step is None else resumed_step + 1)

    def write(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run with the name of the run folder, resumed under the same id."""

    def __init__(self, folder: Path, *, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "log.wandb_project is set, but wandb is not installed; pip install 'workbench[track]' or unset it"
            ) from None
        self._run = wandb.init(
            project=project, name=folder.name, id=folder.name, dir=str(folder), config=dict(config), resume="allow"
        )

    def write(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, step: int, metrics: Metrics) -> None:
        for sink in self._sinks:
            sink.write(step, metrics)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def open_sinks(
    folder: Path,
    *,
    resumed_step: int | None = None,
    tensorboard: bool = True,
    wandb_project: str = "",
    config: Mapping[str, Any] | None = None,
) -> Sinks:
    """The sinks of a run folder: JSON lines always, TensorBoard when installed, W&B when a project is named."""
    sinks: list[MetricSink] = [JsonLines(folder / "metrics.jsonl", resumed_step=resumed_step)]
    if tensorboard:
        try:
            sinks.append(TensorBoard(folder / "tensorboard", resumed_step=resumed_step))
        except ImportError:
            get_logger(__name__).debug("tensorboard is not installed; metrics are in metrics.jsonl only")
    if wandb_project:
        sinks.append(WeightsAndBiases(folder, project=wandb_project, config=config or {}))
    return Sinks(sinks)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a killed process left unfinished does not count."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _keep_rows(path: Path, last_step: int) -> None:
    """Cuts the rows past `last_step` and an unfinished last line, by an atomic replacement."""
    rows = read_metrics(path)
    kept = [row for row in rows if row["step"] <= last_step]
    if not path.exists() or (len(kept) == len(rows) and path.read_bytes()[-1:] in (b"", b"\n")):
        return
    scratch = path.with_suffix(".jsonl.partial")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(scratch, path)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as text, and a diverged run stays readable."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
