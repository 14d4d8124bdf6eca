"""`wb import`, `wb export` and `wb generate`, as a user runs them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters import logits
from converters.job import JobOptions, make_job
from converters.open import get_format, open_checkpoint
from tests.helpers.hf_models import save_model
from tests.helpers.tokenizers import make_tokenizer
from workbench.cli.main import main
from workbench.errors import VerificationError
from workbench.spec.layout import ParallelLayout

LLAMA = "llama, tied, grouped, llama3 rope"
GPT2 = "gpt2, wide epsilon"

pytestmark = pytest.mark.timeout(600)  # fresh processes that import transformers, on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer."""
    source = save_model(GPT2, tmp_path_factory.mktemp("hf") / "small")
    make_tokenizer(source)
    return source


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON result of a command."""
    capsys.readouterr()
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_import_and_export_prove_themselves_by_logits(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(capsys, "import", folder, tmp_path / "native", "--tp", "2", "--pp", "2")
    assert code == 0
    assert result["verify"] == "logits" and result["logits"]["difference"] <= result["logits"]["tolerance"] == 1e-4
    assert result["layout"]["tp"] == 2 and result["layout"]["pp"] == 2
    code, result = run(capsys, "export", tmp_path / "native", tmp_path / "out", "--max-shard-size", "40KB")
    assert code == 0 and result["logits"]["tokens"] > 60
    assert len([name for name in result["files"] if name.endswith(".safetensors")]) > 2
    before = load_file(folder / "model.safetensors")
    after = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("ab")["input_ids"] == AutoTokenizer.from_pretrained(folder)("ab")["input_ids"]


@pytest.mark.slow
def test_an_export_whose_logits_differ_leaves_nothing_and_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(capsys, "import", folder, tmp_path / "native", "--verify", "full")[0] == 0
    honest = logits.engine_logits

    def wrong(*words: Any) -> Any:
        return [array + 2e-4 for array in honest(*words)]

    monkeypatch.setattr(logits, "engine_logits", wrong)
    code, result = run(capsys, "export", tmp_path / "native", tmp_path / "out")
    assert code == VerificationError.exit_code
    assert "logits differ from the source's by 0.0002" in result["error"]["message"]
    assert [file.name for file in tmp_path.iterdir()] == ["native"]


@pytest.mark.slow
def test_a_cast_on_export_is_compared_with_the_cast_weights(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(capsys, "export", folder, tmp_path / "out", "--dtype", "bf16")
    assert code == 0 and result["logits"]["difference"] <= 1e-4
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    before = load_file(folder / "model.safetensors")
    for name, value in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(value, before[name].to(torch.bfloat16))


def test_faults_have_their_exit_codes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    cases: list[tuple[list[Any], int, str]] = [
        (["import", tmp_path / "nowhere", tmp_path / "x"], 5, "no such"),
        (["import", folder, tmp_path / "there"], 2, "exists already"),
        (["import", folder, tmp_path / "x", "--tp", "3"], 3, "num_attention_heads=4 cannot be split over tp=3"),
        (["import", folder, tmp_path / "x", "--family", "llama"], 3, "'llama'"),
        (["import", folder, tmp_path / "x", "--family", "bloom"], 3, "use one of: bert, deepseek_v2, deepseek_v3"),
        (["import", folder, tmp_path / "x", "--verify", "maybe"], 2, "none, crc, full, logits"),
        (["export", folder, tmp_path / "x", "--to", "onnx"], 2, "--to 'onnx' is not known"),
        (["export", folder, tmp_path / "x", "--family", "llama"], 3, "'llama'"),
    ]
    for words, code, message in cases:
        found, result = run(capsys, *words)
        assert (found, message in result["error"]["message"]) == (code, True), result
    assert sorted(file.name for file in tmp_path.iterdir()) == ["there"]


def test_import_of_a_native_checkpoint_names_the_right_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "import", folder, tmp_path / "native", "--verify", "crc")[0] == 0
    code, result = run(capsys, "import", tmp_path / "native", tmp_path / "again")
    assert code == 2 and "use wb reshard" in result["error"]["message"]
    code, result = run(capsys, "verify", folder, tmp_path / "native")
    assert code == 0 and result["equal"]


def test_generate_says_the_same_from_native_and_hugging_face_as_transformers_does(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "import", folder, tmp_path / "native", "--tp", "2", "--verify", "crc")[0] == 0
    words = ("--prompt", "a word", "--max-new-tokens", "20")
    code, found = run(capsys, "generate", folder, *words)
    (one,) = found["answers"]
    assert code == 0
    assert run(capsys, "generate", tmp_path / "native", *words)[1]["answers"] == [one]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a word", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder)
    theirs = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert one["tokens"] == [token for token in theirs if token != 2] and one["prompt_tokens"] == 6
    capsys.readouterr()
    assert main(["generate", str(folder), *words]) == 0
    assert capsys.readouterr().out == f"a word{one['text']}\n"


def test_generate_without_a_tokenizer_says_how_to_name_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(capsys, "generate", save_model(LLAMA, tmp_path / "bare"), "--prompt", "a")
    assert code == 2 and "name a folder with --tokenizer" in result["error"]["message"]
    named = make_tokenizer(tmp_path / "words")
    code, result = run(
        capsys, "generate", tmp_path / "bare", "--prompt", "a", "--max-new-tokens", "3", "--tokenizer", named
    )
    assert code == 0 and len(result["answers"][0]["tokens"]) == 3


def test_experts_are_imported_for_as_many_ranks_as_asked_and_exported_with_a_word_on_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_model("qwen3_moe, untied, wide heads", tmp_path / "in")
    native = tmp_path / "native"
    code, result = run(capsys, "import", source, native, "--tp", "2", "--ep", "3", "--verify", "crc")
    assert code == 0 and (result["layout"]["tp"], result["layout"]["ep"]) == (2, 3)
    opened = open_checkpoint(native)
    assert opened.model.moe is not None
    moe = opened.model.moe.model_copy(update={"router_z_loss_coef": 0.25})
    trained = replace(opened, model=opened.model.model_copy(update={"moe": moe}))
    make_job(
        trained, get_format("native"), tmp_path / "trained", JobOptions(ParallelLayout()), operation="reshard"
    ).run(verify="none")
    assert main(["export", str(tmp_path / "trained"), str(tmp_path / "out"), "--verify", "none"]) == 0
    said = capsys.readouterr().out
    assert "model.moe.router_z_loss_coef=0.25" in said
    assert "`moe.router_z_loss_coef=0.25`" in (tmp_path / "out/README.md").read_text()
