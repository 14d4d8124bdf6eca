"""lm-evaluation-harness on an exported folder: a public benchmark's score of what other programs will load."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from workbench.errors import ConfigError


def run_harness(folder: Path, tasks: str, *, limit: int | None) -> dict[str, float]:
    """Metrics of the tasks (names with commas between them) by `<task>/<metric>`.

    Raises ConfigError when the harness is not installed or `folder` is not what transformers loads.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder}: --harness judges what transformers loads, and this is no Hugging Face folder; "
            f"`wb export {folder} DST` writes one"
        )
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "--harness needs lm-evaluation-harness, which is not installed; pip install 'workbench[harness]'"
        )
    import lm_eval

    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(folder)}, tasks=tasks.split(","), limit=limit
    )
    return {
        f"{task}/{metric.removesuffix(',none')}": float(value)
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float)
    }
