"""The configuration of a fine-tuning run names its task and its method, and nothing in it is ignored."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from finetune.config import FinetuneConfig, adapter_of, task_of
from workbench.config import load_config, resolved_json
from workbench.errors import ConfigError

TEXT = """base = "runs/tiny"
[task]
kind = "sft"
train = "train.jsonl"
[method]
kind = "lora"
r = 4
[run]
steps = 10
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sft.toml"
    path.write_text(TEXT)
    return path


def test_kind_chooses_the_table_and_the_plug_in(file: Path) -> None:
    config = load_config(file, FinetuneConfig).config
    assert (task_of(config).name, adapter_of(config).name) == ("sft", "lora")
    assert FinetuneConfig.model_validate_json(resolved_json(config)) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "method.rank=3",
            "method.rank: unknown key; there are: alpha, alpha_pattern, b_lr_ratio, dora, dropout, frozen_format,",
        ),
        ("method.kind=lroa", """method.kind = "lroa": must be 'freeze' or 'full' or 'lora'"""),
        ("task.kind=stf", """task.kind = "stf": must be 'classification' or 'embedding' or"""),
        ("task.trian=[1]", "task.trian: unknown key; did you mean 'train'?"),
        ("task.too_long=ignore", "must be 'truncate', 'drop' or 'error'"),
        ("method.r=0", "method.r = 0: must be greater than 0"),
        ("bsae=x", "bsae: unknown key; did you mean 'base'?"),
        ("optim.warmup=11", "optim.warmup=11 is longer than the run of 10 steps"),
    ],
)
def test_a_fault_is_named(override: str, message: str, file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, FinetuneConfig, [override])
    assert message in str(caught.value)


def test_the_configuration_is_read_without_torch() -> None:
    words = "import sys, finetune.config, converters.merge, converters.formats.peft; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], check=False, cwd=Path(__file__).parents[2]).returncode == 0
