"""`wb export` and `wb generate` of a checkpoint that holds an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from converters.formats import peft
from converters.formats._peft_source import to_file
from converters.formats._peft_table import adapter_config
from tests.finetune.adapters import write_adapter, write_base
from tests.helpers.models import gated_model
from tests.helpers.tokenizers import make_tokenizer
from workbench.cli.main import main
from workbench.spec.lora import LoraSpec

pytestmark = pytest.mark.timeout(600)  # fresh processes that import transformers, on a busy machine


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A native base and a native adapter to it."""
    root = tmp_path_factory.mktemp("lora")
    base = write_base(root / "base", gated_model())
    return base, write_adapter(root / "adapter", gated_model(), LoraSpec(r=3, alpha=48), base)


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_an_adapter_leaves_as_a_peft_folder_proven_by_peft(
    checkpoints: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(capsys, "export", checkpoints[1], tmp_path / "out", "--to", "peft")
    assert code == 0, result
    assert result["format"] == "peft" and result["logits"]["difference"] <= result["logits"]["tolerance"]
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_an_adapter_leaves_as_a_whole_model_when_asked_for_a_hugging_face_folder(
    checkpoints: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(capsys, "export", checkpoints[1], tmp_path / "out")
    assert code == 0, result
    assert result["format"] == "huggingface" and result["logits"]["difference"] <= result["logits"]["tolerance"]
    code, result = run(capsys, "verify", checkpoints[0], tmp_path / "out")
    assert code == 4 and "layers.0.self_attn.q_proj.weight" in result["different"]


def test_a_whole_model_is_no_adapter(
    checkpoints: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(capsys, "export", checkpoints[0], tmp_path / "out", "--to", "peft")
    assert code == 3 and "export it with --to hf" in result["error"]["message"]


def test_generate_runs_an_adapter_on_its_base(
    checkpoints: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--prompt", "ab", "--max-new-tokens", "8", "--tokenizer", make_tokenizer(tmp_path / "words", 90))
    code, plain = run(capsys, "generate", checkpoints[0], *words)
    assert code == 0, plain
    code, adapted = run(capsys, "generate", checkpoints[1], *words)
    assert code == 0 and adapted["answers"][0]["tokens"] != plain["answers"][0]["tokens"]
    moved = checkpoints[0].rename(tmp_path / "moved")
    try:
        code, result = run(capsys, "generate", checkpoints[1], *words)
        assert code == 5 and "--base" in result["error"]["message"]
        code, again = run(capsys, "generate", checkpoints[1], *words, "--base", moved)
        assert code == 0 and again["answers"] == adapted["answers"]
    finally:
        moved.rename(checkpoints[0])


def without_prefix(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)


def only_a(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".lora_B." in name]:
        del tensors[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (without_prefix, "names must begin with 'base_model.model.'"),
        pytest.param(only_a, "down_proj.lora_B.weight', 4 tensors", marks=pytest.mark.exhaustive),
        pytest.param(
            {"target_modules": ["q_proj"]},
            "target_modules or modules_to_save in adapter_config.json pass over",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            {"use_rslora": True},
            "use_rslora, lora_alpha or alpha_pattern in adapter_config.json scale",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param({"lora_alpha": 3}, "by 1, not 16", marks=pytest.mark.exhaustive),
        pytest.param({"use_dora": True}, "use_dora=true in adapter_config.json, but", marks=pytest.mark.exhaustive),
    ],
    ids=["no prefix", "only A", "fewer targets", "other scaling", "other alpha", "no magnitudes"],
)
def test_what_peft_would_pass_over_in_silence_is_no_export(
    damage: Any,
    cause: str,
    checkpoints: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted in what is written, each is found, named, and nothing is left behind."""

    def damaged_config(*args: Any, **keywords: Any) -> dict[str, Any]:
        return {**adapter_config(*args, **keywords), **(damage if isinstance(damage, dict) else {})}

    def damaged_file(*args: Any) -> dict[str, Any]:
        tensors = to_file(*args)
        if callable(damage):
            damage(tensors)
        return tensors

    monkeypatch.setattr(peft, "adapter_config", damaged_config)
    monkeypatch.setattr(peft, "to_file", damaged_file)
    code, result = run(capsys, "export", checkpoints[1], tmp_path / "out", "--to", "peft")
    assert code == 4 and cause in result["error"]["message"]
    assert not any(tmp_path.iterdir())
