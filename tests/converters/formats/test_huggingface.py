"""Hugging Face folders: what is read is what is there, what is written is what transformers reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from converters.family import family_named
from converters.format import OpenedCheckpoint, WriteRequest, no_progress
from converters.formats.huggingface import FORMAT
from converters.independent.huggingface import HuggingFaceFiles
from converters.rules import Rule, Slice
from tests.helpers.hf_models import CASES, save_model
from workbench.errors import CheckpointError, ConfigError, ConversionError, VerificationError
from workbench.spec.geometry import Box
from workbench.spec.model import ModelConfig
from workbench.spec.schema import logical_tensors

PLAIN = "llama, tied, grouped, llama3 rope"
FUSED = "gpt2, untied, own width, exact gelu"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {case: save_model(case, root / str(i)) for i, case in enumerate(CASES)}


def write(opened: OpenedCheckpoint, path: Path, *, rows: int = 7, commit: bool = True, **options: Any) -> Any:
    """Copies a checkpoint to a Hugging Face folder in slabs of a few rows of the sweep."""
    request = WriteRequest(path, opened.source.schema, opened.model, lineage=opened.lineage, **options)
    destination = FORMAT.destination(request)
    destination.begin()
    for name, tensor in destination.schema.items():
        dim = destination.sweep(name)
        for start in range(0, tensor.shape[dim], rows):
            offset = tuple(start if d == dim else 0 for d in range(len(tensor.shape)))
            size = tuple(min(rows, n - start) if d == dim else n for d, n in enumerate(tensor.shape))
            destination.write(name, Box(offset, size), opened.source.read(name, Box(offset, size)))
    destination.check(no_progress)
    if commit:
        destination.commit({})
    return destination


def edit_json(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_logical_tensor_is_there_and_equals_the_reference(folders: Mapping[str, Path], case: str) -> None:
    opened = FORMAT.open(folders[case])
    assert set(opened.source.schema) == set(logical_tensors(opened.model, "F32"))
    theirs = load_file(folders[case] / "model.safetensors")

    def read(name: str) -> np.ndarray:
        return opened.source.read(name, Box.whole(opened.source.schema[name].shape))

    if opened.family == "gpt2":
        q, k, v = theirs["transformer.h.1.attn.c_attn.weight"].split(32, dim=1)
        pairs = {"q": q.T, "k": k.T, "v": v.T}
        assert np.array_equal(read("layers.1.mlp.down_proj.weight"), theirs["transformer.h.1.mlp.c_proj.weight"].T)
        assert np.array_equal(read("embed_positions.weight"), theirs["transformer.wpe.weight"])
    elif opened.family == "bert":
        path = "encoder.layer.1.attention.self" if case == "bert body" else "bert.encoder.layer.1.attention.self"
        pairs = {name[0]: theirs[f"{path}.{name}.weight"] for name in ("query", "key", "value")}
    elif opened.family == "t5":
        pairs = {name: theirs[f"encoder.block.1.layer.0.SelfAttention.{name}.weight"] for name in "qkv"}
    elif opened.family == "gpt_neox":
        pairs = {"o": theirs["gpt_neox.layers.1.attention.dense.weight"]}
    elif opened.family in ("deepseek_v2", "deepseek_v3", "phi3"):
        pairs = {"o": theirs["model.layers.1.self_attn.o_proj.weight"]}
    else:
        pairs = {name: theirs[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"}
        assert np.array_equal(read("norm.weight"), theirs["model.norm.weight"])
    for name, expected in pairs.items():
        assert np.array_equal(read(f"layers.1.self_attn.{name}_proj.weight"), expected.numpy())


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_that_is_read_and_written_again_is_equal(
    folders: Mapping[str, Path], tmp_path: Path, case: str, shards: int
) -> None:
    source = folders[case]
    size = (source / "model.safetensors").stat().st_size
    write(FORMAT.open(source), tmp_path / "out", max_shard_bytes=2 * size if shards == 1 else size // 3)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) >= shards
    ours = {key: value for file in files for key, value in load_file(file).items()}
    theirs = load_file(source / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name in ("config.json", "generation_config.json"):
        if (source / name).exists():
            assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((source / name).read_text())


def test_transformers_reads_a_folder_in_several_files(folders: Mapping[str, Path], tmp_path: Path) -> None:
    write(FORMAT.open(folders[PLAIN]), tmp_path / "out", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * index["metadata"]["total_parameters"]
    assert max(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")) < 24_000
    ours, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    theirs = AutoModelForCausalLM.from_pretrained(folders[PLAIN])
    ids = torch.arange(10)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_a_folder_in_several_files_by_save_pretrained_is_read(tmp_path: Path) -> None:
    one = FORMAT.open(save_model(FUSED, tmp_path / "one"))
    many = FORMAT.open(save_model(FUSED, tmp_path / "many", max_shard_size="40KB"))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for name, tensor in one.source.schema.items():
        box = Box.whole(tensor.shape)
        assert np.array_equal(one.source.read(name, box), many.source.read(name, box))


def test_bfloat16_is_carried_as_its_bits(tmp_path: Path) -> None:
    opened = FORMAT.open(save_model(PLAIN, tmp_path / "in", dtype=torch.bfloat16))
    assert opened.source.schema["norm.weight"].dtype == "BF16"
    write(opened, tmp_path / "out")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "in"))
    assert all(torch.equal(ours[key].view(torch.int16), theirs[key].view(torch.int16)) for key in theirs)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_folder_of_the_bare_body_is_read_without_the_prefix(tmp_path: Path, family: str) -> None:
    case, prefix = {"gpt2": ("gpt2", "transformer."), "llama": (PLAIN, "model.")}[family]
    source = save_model(case, tmp_path / "in")
    whole = FORMAT.open(source)
    tensors = load_file(source / "model.safetensors")
    bare = {key.removeprefix(prefix): value for key, value in tensors.items()}
    if family == "gpt2":
        bare["h.0.attn.bias"] = torch.ones(1, 1, 48, 48)
        bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    (tmp_path / "bare").mkdir()
    save_file(bare, tmp_path / "bare/model.safetensors", {"format": "pt"})
    shutil.copy(source / "config.json", tmp_path / "bare")
    opened = FORMAT.open(tmp_path / "bare")
    assert opened.source.schema == whole.source.schema
    box = Box((3, 2), (4, 5))
    name = "layers.2.self_attn.v_proj.weight"
    assert np.array_equal(opened.source.read(name, box), whole.source.read(name, box))
    if family == "gpt2":
        assert "causal mask" in opened.info["ignored tensors"]


def with_tensors(source: Path, target: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """A copy of a folder with some tensors replaced, added, or (None) left out."""
    shutil.copytree(source, target)
    tensors: dict[str, Any] = load_file(source / "model.safetensors") | change
    save_file({k: v for k, v in tensors.items() if v is not None}, target / "model.safetensors", {"format": "pt"})
    return target


def test_unknown_missing_and_misshapen_tensors_are_refused_together(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    change: dict[str, torch.Tensor | None] = {
        f"model.layers.{i}.self_attn.q_norm.weight": torch.ones(8) for i in range(4)
    }
    change |= {"model.norm.weight": None, "model.layers.0.mlp.up_proj.weight": torch.ones(48, 31)}
    with pytest.raises(ConversionError) as error:
        FORMAT.open(with_tensors(folders[PLAIN], tmp_path / "odd", change))
    for words in (
        "4 tensors 'model.layers.*.self_attn.q_norm.weight' have no place in family 'llama'",
        "tensor 'model.norm.weight' is missing",
        "'model.layers.0.mlp.up_proj.weight' has shape [48, 31], the configuration says [48, 32]",
    ):
        assert words in str(error.value)


def test_the_wrong_family_names_the_right_one(folders: Mapping[str, Path], tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(folders["gpt2"], mixed)
    shutil.copy(folders[PLAIN] / "config.json", mixed / "config.json")
    with pytest.raises(ConversionError, match=r"have no place in family 'llama'; is this 'gpt2'\? try --family gpt2"):
        FORMAT.open(mixed)


def test_a_tied_head_that_is_stored_all_the_same_must_equal_the_embedding(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    embedding = load_file(folders[PLAIN] / "model.safetensors")["model.embed_tokens.weight"]
    opened = FORMAT.open(with_tensors(folders[PLAIN], tmp_path / "same", {"lm_head.weight": embedding.clone()}))
    assert "lm_head.weight" not in opened.source.schema
    changed = embedding.clone()
    changed[50, 3] += 1e-3
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        FORMAT.open(with_tensors(folders[PLAIN], tmp_path / "other", {"lm_head.weight": changed}))


def test_an_untied_model_without_a_head_is_refused_with_the_likely_cause(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[PLAIN], tmp_path / "in")
    edit_json(tmp_path / "in/config.json", {"tie_word_embeddings": False})
    with pytest.raises(ConversionError, match=r"'lm_head.weight' is missing; .*tie_word_embeddings=true"):
        FORMAT.open(tmp_path / "in")


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_that_climbs_out_of_its_folder_is_refused(tmp_path: Path, file: str) -> None:
    source = save_model(PLAIN, tmp_path / "in", max_shard_size="40KB")
    index = source / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(places))
    with pytest.raises(CheckpointError, match="not a file of this folder"):
        FORMAT.open(source)


def test_files_and_index_that_disagree_are_refused(tmp_path: Path) -> None:
    source = save_model(PLAIN, tmp_path / "in", max_shard_size="40KB")
    first, second = sorted(source.glob("*.safetensors"))[:2]
    first.rename(source / "kept")
    with pytest.raises(CheckpointError, match=rf"{first.name} missing"):
        FORMAT.open(source)
    shutil.copy(second, first)
    with pytest.raises(CheckpointError, match=r"holds .*, which model.safetensors.index.json places in"):
        FORMAT.open(source)


@pytest.mark.parametrize("case", [PLAIN, FUSED])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before the zip format"])
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "one file"])
def test_the_pickle_of_an_older_release_reads_as_its_safetensors(
    folders: Mapping[str, Path], tmp_path: Path, case: str, zipped: bool, sharded: bool
) -> None:
    save_as_pickle(folders[case], tmp_path / "in", zipped=zipped, sharded=sharded)
    expected, found = FORMAT.open(folders[case]).source, FORMAT.open(tmp_path / "in").source
    assert found.schema == expected.schema
    second = HuggingFaceFiles(tmp_path / "in", found)
    for name, tensor in expected.schema.items():
        whole = expected.read(name, Box.whole(tensor.shape))
        assert np.array_equal(second.read(tensor, slice(0, tensor.shape[0])), whole), name
        rows = Box((tensor.shape[0] // 2, *(0 for _ in tensor.shape[1:])), (1, *tensor.shape[1:]))
        for box in (Box.whole(tensor.shape), rows):
            assert np.array_equal(found.read(name, box), expected.read(name, box)), name


def save_as_pickle(source: Path, folder: Path, *, zipped: bool, sharded: bool) -> None:
    """A folder as transformers wrote it before safetensors: shared storages, a tied head, parameters."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    tensors: dict[str, Any] = dict(load_file(source / "model.safetensors"))
    if "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors = {name: torch.nn.Parameter(value) for name, value in tensors.items()}
    files = {
        name: f"pytorch_model-{1 + i % 3}.bin" if sharded else "pytorch_model.bin" for i, name in enumerate(tensors)
    }
    for file in sorted(set(files.values())):
        part = {name: value for name, value in tensors.items() if files[name] == file}
        torch.save(part, folder / file, _use_new_zipfile_serialization=zipped)
    if sharded:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))


class Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_a_pickle_that_would_run_code_is_refused_by_name_and_runs_nothing(
    folders: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_as_pickle(folders[PLAIN], tmp_path / "in", zipped=True, sharded=False)
    torch.save({"model.norm.weight": Payload()}, tmp_path / "in/pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: names 'builtins.getattr'|names 'pathlib.Path"):
        FORMAT.open(tmp_path / "in")
    assert not (tmp_path / "executed").exists()
    (tmp_path / "in/pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        FORMAT.open(tmp_path / "in")


def test_a_byte_that_changes_after_it_was_written_is_found(folders: Mapping[str, Path], tmp_path: Path) -> None:
    destination = write(FORMAT.open(folders[FUSED]), tmp_path / "out", commit=False, read_back=False)
    file = tmp_path / "out.partial/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerificationError, match="reads back other than written"):
        destination.check(no_progress)
    destination.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_exists_is_left_alone(folders: Mapping[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        write(FORMAT.open(folders[PLAIN]), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_rules_that_leave_a_part_of_a_foreign_tensor_empty_are_found_before_anything_is_written(
    folders: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = FORMAT.open(folders[FUSED])
    family = family_named("gpt2")

    def lopsided(model: ModelConfig) -> tuple[Rule, ...]:
        return tuple(
            replace(rule, view=(Slice(0, 0, 32, 96),)) if rule.logical.endswith("v_proj.bias") else rule
            for rule in family.rules(model)
        )

    monkeypatch.setattr("converters.families.gpt2.FAMILY", replace(family, rules=lopsided))
    with pytest.raises(AssertionError, match=r"do not fill transformer.h.0.attn.c_attn.bias: boxes at .* overlap"):
        FORMAT.destination(WriteRequest(tmp_path / "out", opened.source.schema, opened.model))


def test_optimizer_state_is_refused_with_the_way_out(folders: Mapping[str, Path], tmp_path: Path) -> None:
    opened = FORMAT.open(folders[PLAIN])
    schema = {**opened.source.schema, "optim.exp_avg/norm.weight": opened.source.schema["norm.weight"]}
    with pytest.raises(ConversionError, match=r"'optim.exp_avg/norm.weight' has no place.*--optimizer drop"):
        FORMAT.destination(WriteRequest(tmp_path / "out", schema, opened.model))


def test_tokenizer_files_and_a_model_card_come_along(folders: Mapping[str, Path], tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "weights.bin").write_text("not a tokenizer")
    write(FORMAT.open(folders[FUSED]), tmp_path / "out", tokenizer=tokenizer)
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out/weights.bin").exists()
    card = (tmp_path / "out/README.md").read_text()
    assert "GPT2LMHeadModel" in card and f"folder `{folders[FUSED].name}`" in card
    assert FORMAT.open(tmp_path / "out").tokenizer == tmp_path / "out"


def test_names_of_old_files_and_heads_that_were_stored_twice_are_understood(tmp_path: Path) -> None:
    source = save_model("bert", tmp_path / "in")
    path = source / "model.safetensors"
    tensors = load_file(path)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): values
        for name, values in tensors.items()
    }
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"].clone()
    old["bert.pooler.dense.bias"] = torch.zeros(32)
    save_file(old, path, {"format": "pt"})
    found = FORMAT.open(source).source
    values = found.read("embed_norm.weight", Box.whole((32,)))
    assert np.array_equal(values, tensors["bert.embeddings.LayerNorm.weight"].numpy())
    old["cls.predictions.decoder.weight"][0, 0] += 1
    save_file(old, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'cls.predictions.decoder.weight' differs from"):
        FORMAT.open(source)
