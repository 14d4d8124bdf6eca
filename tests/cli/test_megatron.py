"""Megatron's rank folders at the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from converters.open import open_checkpoint
from tests.helpers.checkpoints import RUN, random_source, tiny_model, write_native
from tests.helpers.megatron_cases import Case
from tests.helpers.megatron_saved import LLAMA, save
from workbench.cli.main import main

SPARSE = tiny_model(
    tie_word_embeddings=False, moe={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run at tp=2 that does not tell how large its vocabulary is."""
    return save(Case(LLAMA, tp=2), tmp_path / "run", vocab_size=None)


def test_a_run_of_megatron_goes_to_native_and_back_at_another_layout(saved: Path, tmp_path: Path) -> None:
    native, again, folder = (str(tmp_path / name) for name in ("native", "again", "megatron"))
    assert main(["import", str(saved), native, "--vocab-size", "100", "--tp", "1", "-q"]) == 0
    assert main(["export", native, folder, "--to", "megatron", "--tp", "2", "--pp", "2", "--vpp", "2", "-q"]) == 0
    names = sorted(path.name for path in Path(folder, "release").iterdir())
    assert names == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    assert Path(folder, "latest_checkpointed_iteration.txt").read_text() == "release"
    assert main(["import", folder, again, "--tp", "4", "--pp", "1", "--vpp", "1", "-q"]) == 0
    assert main(["verify", native, again, "-q"]) == 0
    assert main(["verify", native, folder, "-q"]) == 0


def test_inspect_tells_format_layout_and_vocabulary(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved), "--vocab-size", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["layout"]["tp"], found["model"]["vocab_size"]) == ("megatron", 2, 100)


def test_the_vocabulary_that_nobody_tells_is_asked_for(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved)]) == 3
    assert "only padded_vocab_size=112; say how many words the tokenizer has" in capsys.readouterr().err


def test_a_format_without_a_layout_takes_no_options_of_one(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native = str(tmp_path / "native")
    assert main(["import", str(saved), native, "--vocab-size", "100", "-q"]) == 0
    words = ["--tp", "2", "--vocab-multiple", "8", "--distributed-optimizer"]
    assert main(["export", native, str(tmp_path / "hf"), *words]) == 2
    said = "--tp, --vocab-multiple, --distributed-optimizer: only folders of Megatron are written so"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--distributed-optimizer"], ["--transformer-impl", "local"]])
def test_an_export_is_made_for_the_run_that_loads_it(words: list[str], tmp_path: Path) -> None:
    native, folder, again = (str(tmp_path / name) for name in ("native", "megatron", "again"))
    write_native(tmp_path / "native", random_source(SPARSE, "F32"), SPARSE, training=RUN)
    layout = ["--tp", "2", "--ep", "2", "--etp", "1"]
    assert main(["export", native, folder, "--to", "megatron", *layout, *words, "-q"]) == 0
    files = {path.name for path in Path(folder, "iter_0000100").rglob("*.pt")}
    assert ("distrib_optim.pt" in files) == (words == ["--distributed-optimizer"])
    held = torch.load(Path(folder, "iter_0000100", "mp_rank_01_001", "model_optim_rng.pt"), weights_only=False)
    assert ("decoder.layers.0.input_layernorm.weight" in held["model"]) == ("local" in words)
    assert (held["args"].expert_tensor_parallel_size, held["args"].sequence_parallel) == (1, True)
    assert main(["import", folder, again, "-q"]) == 0
    assert main(["verify", native, again, "-q"]) == 0
    layout = open_checkpoint(Path(again)).layout
    assert layout is not None and (layout.tp, layout.ep, layout.etp) == (2, 2, 1)


def test_layers_that_megatron_does_not_have_are_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native, folder = str(tmp_path / "native"), str(tmp_path / "megatron")
    assert main(["import", str(saved), native, "--vocab-size", "100", "-q"]) == 0
    assert main(["export", native, folder, "--to", "megatron", "--transformer-impl", "te"]) == 2
    assert "--transformer-impl 'te' is not known; use one of transformer_engine, local" in capsys.readouterr().err
