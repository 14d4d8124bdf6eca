"""`wb inspect`, `wb verify` and `wb diff` on native checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.checkpoints import random_native, random_source, tiny_model, write_native
from workbench.checkpoint.manifest import read_manifest
from workbench.cli.main import main
from workbench.spec.layout import ParallelLayout


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    random_native(tmp_path / "a", layout=ParallelLayout(tp=2, pp=2))
    random_native(tmp_path / "b", layout=ParallelLayout(tp=4))
    return tmp_path / "a", tmp_path / "b"


def run(capsys, *words: object) -> tuple[int, dict]:
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_inspect_tells_what_a_checkpoint_holds(pair, capsys):
    code, found = run(capsys, "inspect", pair[0])
    assert code == 0
    assert (found["format"], found["step"], found["parameters"]) == ("native", 100, 8672)
    assert (found["layout"]["tp"], found["layout"]["pp"]) == (2, 2)
    assert found["weight_bytes"] == 8672 * 2 and found["optimizer_bytes"] == 8672 * 8
    assert found["moments"] == ["optim.exp_avg", "optim.exp_avg_sq"]


def test_inspect_lists_the_tensors_of_a_pattern(pair, capsys):
    code, found = run(capsys, "inspect", pair[1], "--tensors", "layers.0.*.k_proj.weight")
    assert code == 0
    (tensor,) = found["matches"]
    assert (tensor["name"], tensor["shape"], tensor["pieces"]) == ("layers.0.self_attn.k_proj.weight", [8, 16], 2)
    assert main(["inspect", str(pair[1]), "--tensors", "nothing.*"]) == 2
    assert "--tensors 'nothing.*' matches none of 114 tensors" in capsys.readouterr().err


def test_two_layouts_of_one_checkpoint_verify_as_equal(pair, capsys):
    code, found = run(capsys, "verify", *pair)
    assert code == 0 and found["equal"] and found["same"] == 114
    assert run(capsys, "diff", *pair)[0] == 0
    assert run(capsys, "diff", *pair, "--recorded")[0] == 0


def test_verify_checks_a_checkpoint_against_itself(pair, capsys):
    code, found = run(capsys, "verify", pair[0], "--full")
    assert code == 0 and found["checked"] == ["structure", "checksums", "fingerprints"]
    stored = read_manifest(pair[0]).tensors["norm.weight"].boxes[0]
    content = bytearray((pair[0] / stored.file).read_bytes())
    content[stored.start] ^= 1
    (pair[0] / stored.file).write_bytes(content)
    assert main(["verify", str(pair[0])]) == 5
    assert f"{stored.file}: tensor 'norm.weight'" in capsys.readouterr().err


def test_diff_names_the_tensor_the_first_element_and_the_distance(tmp_path, capsys):
    model = tiny_model()
    source = random_source(model, "F32", optimizer=False)
    write_native(tmp_path / "a", source, model, ParallelLayout(tp=2))
    name = "layers.2.mlp.down_proj.weight"
    array = source.arrays[name].copy()
    array[3, 17] += np.float32(0.5)
    source.arrays[name] = array
    write_native(tmp_path / "b", source, model, ParallelLayout(pp=2))
    code, found = run(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 4 and found["different"] == [name] and found["same"] == 37
    (detail,) = found["details"]
    assert (detail["elements"], detail["first"]) == (1, [3, 17])
    assert detail["largest"] == pytest.approx(0.5, abs=1e-6)
    assert main(["verify", str(tmp_path / "a"), str(tmp_path / "b")]) == 4
    assert name in capsys.readouterr().out


def test_rows_that_were_swapped_are_found(tmp_path, capsys):
    model = tiny_model()
    source = random_source(model, "F32", optimizer=False)
    write_native(tmp_path / "a", source, model)
    array = source.arrays["embed_tokens.weight"].copy()
    array[[4, 5]] = array[[5, 4]]
    source.arrays["embed_tokens.weight"] = array
    write_native(tmp_path / "b", source, model)
    code, found = run(capsys, "verify", tmp_path / "a", tmp_path / "b")
    assert code == 4 and found["different"] == ["embed_tokens.weight"]


def test_a_missing_tensor_and_another_dtype_are_differences(tmp_path, capsys):
    tied, untied = tiny_model(), tiny_model(tie_word_embeddings=False)
    write_native(tmp_path / "a", random_source(tied, "F32", optimizer=False), tied)
    write_native(tmp_path / "b", random_source(untied, "BF16", optimizer=False), untied)
    code, found = run(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 4
    assert found["only_second"] == ["lm_head.weight"]
    assert found["dtype"]["norm.weight"] == "F32 and BF16"
    assert found["model"] == {"tie_word_embeddings": [True, False]}


def test_weights_alone_are_compared_when_one_side_has_no_optimizer_and_the_result_says_so(pair, tmp_path, capsys):
    assert main(["reshard", str(pair[0]), str(tmp_path / "bare"), "--optimizer", "drop", "-q"]) == 0
    capsys.readouterr()
    code, found = run(capsys, "verify", pair[0], tmp_path / "bare")
    assert code == 0 and found["same"] == 38
    assert "bare has no optimizer state; only weights are compared" in found["notes"][0]


def test_a_checkpoint_compared_with_itself_is_a_slip(pair, capsys):
    assert main(["verify", str(pair[0]), str(pair[0])]) == 2
    assert "are the same folder" in capsys.readouterr().err
