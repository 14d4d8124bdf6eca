"""`wb reshard` and its kin: bit for bit at any layout, whole or not at all, and every refusal by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.cast import cast_array
from converters.format import OpenedCheckpoint
from converters.job import JobOptions, make_job
from converters.open import get_format, open_checkpoint
from tests.helpers.checkpoints import MemorySource, random_arrays, random_native, read_all, tiny_model
from workbench.cli.main import main
from workbench.errors import CheckpointError, ConfigError, VerificationError
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import AdapterRecord, LoraSpec, adapter_tensors
from workbench.spec.stored import stored_tensors

MODELS = {
    "tied, two KV heads": tiny_model(),
    "untied, biases": tiny_model(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "layer norms, learned positions": tiny_model(norm="layernorm", position_embedding="learned", gated_mlp=False),
    "a sequence head": tiny_model(num_labels=3, attention_output_bias=True),
}
LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tp=2, pp=2),
    ParallelLayout(tp=4),
    ParallelLayout(pp=4),
    ParallelLayout(tp=4, pp=3, pp_layout=(1, 2, 1), vocab_multiple=16),
    ParallelLayout(tp=2, pp=2, pp_layout=(3, 1), vocab_multiple=1),
    ParallelLayout(tp=2, pp=2, vpp=2),
    ParallelLayout(pp=2, vpp=2, placement="vee", pp_layout=(1, 1, 1, 1)),
]


def reshard(source: Path, path: Path, layout: ParallelLayout, *, verify: str = "crc", **options) -> Path:
    job = make_job(
        open_checkpoint(source), get_format("native"), path, JobOptions(layout, **options), operation="reshard"
    )
    job.run(verify=verify)
    return path


def same_files(first: Path, second: Path) -> bool:
    names = sorted(file.name for file in first.glob("*.safetensors"))
    return names == sorted(file.name for file in second.glob("*.safetensors")) and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names
    )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model=st.sampled_from(sorted(MODELS)),
    chain=st.lists(st.sampled_from(LAYOUTS), min_size=2, max_size=4),
    verify=st.sampled_from(["none", "crc", "full"]),
)
def test_a_chain_of_layouts_ends_in_the_very_bytes_it_began_with(tmp_path_factory, model, chain, verify):
    folder = tmp_path_factory.mktemp("chain")
    source = random_native(folder / "0", MODELS[model], chain[0])
    path = folder / "0"
    for index, layout in enumerate([*chain[1:], chain[0]], start=1):
        path = reshard(path, folder / str(index), layout, verify=verify)
        found = read_all(path)
        assert found.keys() == source.arrays.keys()
        assert all(np.array_equal(found[name], array) for name, array in source.arrays.items())
    assert same_files(folder / "0", path)
    first, last = open_checkpoint(folder / "0"), open_checkpoint(path)
    assert last.fingerprints == first.fingerprints
    assert last.training == first.training and last.model == first.model
    assert [parent["operation"] for parent in last.lineage] == ["reshard"] * len(chain)
    shutil.rmtree(folder)


@pytest.fixture
def source(tmp_path) -> Path:
    random_native(tmp_path / "source", layout=ParallelLayout(tp=2, pp=2))
    return tmp_path / "source"


def test_weights_are_cast_and_moments_kept(source, tmp_path):
    path = reshard(source, tmp_path / "wide", ParallelLayout(), dtype="F32", verify="full")
    before, after = read_all(source), read_all(path)
    for name, array in before.items():
        expected = array if name.startswith("optim.") else cast_array(array, "BF16", "F32")
        assert np.array_equal(after[name], expected)
    back = reshard(path, tmp_path / "back", ParallelLayout(tp=2, pp=2), dtype="BF16")
    assert same_files(source, back)
    assert open_checkpoint(back).fingerprints == open_checkpoint(source).fingerprints


def test_optimizer_state_is_kept_dropped_or_required(source, tmp_path, capsys):
    path = reshard(source, tmp_path / "bare", ParallelLayout(), optimizer="drop")
    assert not [name for name in read_all(path) if name.startswith("optim.")]
    assert main(["reshard", str(path), str(tmp_path / "x"), "--optimizer", "require"]) == 3
    assert f"{path}: holds no optimizer state" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_tokenizer_travels_with_the_checkpoint_and_is_checked(tmp_path):
    from tests.helpers.checkpoints import random_source, write_native

    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    model = tiny_model()
    path = write_native(tmp_path / "a", random_source(model), model, tokenizer=folder)
    moved = reshard(path, tmp_path / "b", ParallelLayout(tp=2))
    assert (moved / "tokenizer" / "tokenizer.json").read_text() == "{}"
    (moved / "tokenizer" / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: checksum"):
        reshard(moved, tmp_path / "c", ParallelLayout())
    assert not list(tmp_path.glob("c*"))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_damaged_source_is_refused_and_leaves_nothing(source, tmp_path, capsys):
    flip(source / "optim-tp01-pp00.safetensors", -1)
    assert main(["reshard", str(source), str(tmp_path / "x"), "--tp", "4", "--pp", "1"]) == 5
    assert "optim-tp01-pp00.safetensors: tensor 'optim." in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def test_a_disk_that_writes_other_bytes_is_found_on_reading_back(source, tmp_path, capsys, monkeypatch):
    def faulty(descriptor: int, data: bytes, start: int) -> None:
        os.pwrite(descriptor, bytes(data[:-1]) + bytes([data[-1] ^ 1]), start)

    monkeypatch.setattr("workbench.checkpoint.writer._write_all", faulty)
    assert main(["reshard", str(source), str(tmp_path / "x"), "--workers", "1"]) == 4
    assert re.search(r"-pp0.\.safetensors: tensor '.*', box at .* read back with checksum", capsys.readouterr().err)
    assert not list(tmp_path.glob("x*"))


def test_damage_after_the_writing_is_found_by_full_verification(source, tmp_path):
    job = make_job(
        open_checkpoint(source), get_format("native"), tmp_path / "x", JobOptions(ParallelLayout()), operation="reshard"
    )
    check = job.destination.check

    def damaged(progress):
        check(progress)
        flip(tmp_path / "x.partial" / "model-tp00-pp00.safetensors", -1)

    job.destination.check = damaged
    with pytest.raises(VerificationError, match=r"norm\.weight, first at \[15\]: .* was written, the source has"):
        job.run(verify="full")
    assert not list(tmp_path.glob("x*"))


def test_without_reading_back_the_check_reads_everything(source, tmp_path):
    options = JobOptions(ParallelLayout(), read_back=False)
    job = make_job(open_checkpoint(source), get_format("native"), tmp_path / "x", options, operation="reshard")
    seen: list[int] = []
    job.run(verify="crc", progress=seen.append)
    assert sum(seen) == 2 * job.plan.num_bytes


def test_two_writers_of_one_destination_do_not_disturb_each_other(source, tmp_path):
    options = JobOptions(ParallelLayout())
    first, second = (
        make_job(open_checkpoint(source), get_format("native"), tmp_path / "x", options, operation="reshard")
        for _ in range(2)
    )
    first.destination.begin()
    with pytest.raises(ConfigError, match=r"x\.partial is being written by another process"):
        second.run()
    assert (tmp_path / "x.partial" / "model-tp00-pp00.safetensors").exists()
    first.destination.abort()
    second.run()
    assert not (tmp_path / "x.partial").exists()


def same_values(first: Path, second: Path) -> bool:
    ours, theirs = read_all(first), read_all(second)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


REFUSED = {
    "chunks without layers": (["--vpp", "4"], 3, "num_hidden_layers=4 are fewer than pp=2 x vpp=4 stages"),
    "a layout that does not divide": (["--tp", "3"], 3, "num_attention_heads=4 cannot be split over tp=3"),
    "stages that do not add up": (["--pp-layout", "1,1"], 3, "pp_layout adds up to 2 layers, but num_hidden_layers=4"),
    "stages of another number": (["--pp", "3", "--pp-layout", "2,2"], 3, "pp_layout has 2 entries, but pp=3 needs 3"),
    "more stages than layers": (["--pp", "8"], 3, "num_hidden_layers=4 are fewer than pp=8"),
    "words for stages": (["--pp-layout", "a,b"], 2, "--pp-layout 'a,b'"),
    "a degree of nothing": (["--tp", "0"], 2, "--tp 0"),
    "an unknown dtype": (["--dtype", "int8"], 2, "--dtype 'INT8' is not known; use one of F32, BF16, F16"),
    "an unknown check": (["--verify", "maybe"], 2, "--verify 'maybe'"),
    "no size": (["--mem", "much"], 2, "--mem 'much' is not a size"),
    "too little memory": (["--mem", "1MiB"], 6, "a memory budget of 1048576 bytes is too small"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_reshard_refuses_with_its_exit_code_and_writes_nothing(source, tmp_path, capsys, kind):
    words, code, message = REFUSED[kind]
    assert main(["reshard", str(source), str(tmp_path / "x"), *words]) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def test_chunks_of_a_stage_are_laid_out_as_asked_and_kept_until_then(source, tmp_path, capsys):
    assert main(["reshard", str(source), str(tmp_path / "looped"), "--vpp", "2", "--pp-layout", "1,1,1,1"]) == 0
    found = open_checkpoint(tmp_path / "looped").layout
    assert (found.pp, found.vpp, found.placement) == (2, 2, "loop")
    assert main(["reshard", str(tmp_path / "looped"), str(tmp_path / "kept"), "--tp", "1"]) == 0
    assert "tp=2 pp=2 vpp=2 pp_layout=1,1,1,1" in capsys.readouterr().out
    found = open_checkpoint(tmp_path / "kept").layout
    assert (found.tp, found.vpp, found.pp_layout) == (1, 2, (1, 1, 1, 1))
    names = {name for name, held in stored_tensors(tiny_model(), found).items() if held.stage == 0}
    assert "layers.2.mlp.down_proj.weight" in names and "layers.1.mlp.down_proj.weight" not in names
    assert main(["reshard", str(tmp_path / "kept"), str(tmp_path / "flat"), "--vpp", "1"]) == 0
    assert same_values(tmp_path / "flat", source)


def test_a_missing_foreign_and_existing_path_have_their_exit_codes(source, tmp_path, capsys):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "weights.bin").write_bytes(b"x")
    for path, code, message in [
        (tmp_path / "nowhere", 5, "nowhere: no such checkpoint"),
        (tmp_path / "foreign", 5, "foreign: not a checkpoint of any known format ("),
    ]:
        assert main(["reshard", str(path), str(tmp_path / "x")]) == code
        assert message in capsys.readouterr().err
    assert main(["reshard", str(source), str(tmp_path / "foreign")]) == 2
    assert f"{tmp_path / 'foreign'} exists already" in capsys.readouterr().err
    assert (tmp_path / "foreign" / "weights.bin").read_bytes() == b"x"


def test_no_space_is_noticed_before_anything_is_written(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    assert main(["reshard", str(source), str(tmp_path / "x")]) == 6
    assert f"but only 1000 are free in {tmp_path}" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def test_a_dry_run_tells_the_plan_and_writes_nothing(source, tmp_path, capsys):
    words = ["reshard", str(source), str(tmp_path / "x"), "--tp", "4", "--pp", "1", "--dry-run", "--json"]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["dry_run"] is True and plan["bytes"] == 86720
    assert sorted(plan["files"]) == sorted(
        f"{kind}-tp0{r}-pp00.safetensors" for r in range(4) for kind in ("model", "optim")
    )
    assert not list(tmp_path.glob("x*"))
    assert main([word for word in words if word != "--dry-run"]) == 0
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "x").glob("*.safetensors")}
    assert sizes == plan["files"]


def test_ctrl_c_leaves_no_destination_and_tells_how_to_go_on(tmp_path):
    random_native(tmp_path / "big", tiny_model(hidden_size=512, intermediate_size=2048, vocab_size=20011))
    code = (
        "import sys, time\n"
        "from converters.formats.native import NativeDestination as D\n"
        "write = D.write\n"
        "def slow(self, *words):\n"
        "    print('writing', flush=True); time.sleep(0.5); write(self, *words)\n"
        "D.write = slow\n"
        "from workbench.cli.main import main\n"
        "sys.exit(main(['reshard', sys.argv[1], sys.argv[2], '-q']))\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "big"), str(tmp_path / "x")]
    root = Path(__file__).parents[2]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)
    assert child.stdout is not None and child.stdout.readline().startswith("writing")
    assert (tmp_path / "x.partial").is_dir()
    os.kill(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert (
        f"nothing is at {tmp_path / 'x'}, what was written is in x.partial; run the same command with --resume"
        in errors
    )
    assert not (tmp_path / "x").exists()
    assert main(["reshard", str(tmp_path / "big"), str(tmp_path / "x"), "--resume", "-q"]) == 0
    assert not (tmp_path / "x.partial").exists()
    assert same_files(tmp_path / "x", tmp_path / "big")


def test_what_a_killed_reshard_has_left_is_replaced_by_the_next(source, tmp_path):
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "model-tp00-pp00.safetensors").write_bytes(b"half")
    reshard(source, tmp_path / "x", ParallelLayout())
    assert not (tmp_path / "x.partial").exists()
    assert main(["verify", str(tmp_path / "x"), str(source), "-q"]) == 0


def test_resharding_never_imports_torch(source, tmp_path):
    code = (
        "import sys\nfrom workbench.cli.main import main\n"
        "code = main(sys.argv[1:])\nassert code == 0, code\nassert 'torch' not in sys.modules\n"
    )
    root = Path(__file__).parents[2]
    started = time.monotonic()
    for words in (["reshard", str(source), str(tmp_path / "x"), "--tp", "1", "--verify", "full"],):
        subprocess.run([sys.executable, "-c", code, *words], check=True, cwd=root, capture_output=True)
    assert time.monotonic() - started < 60


def test_an_adapter_is_resharded_by_its_own_geometry_and_stays_an_adapter(tmp_path):
    model = tiny_model()
    record = AdapterRecord(lora=LoraSpec(r=3, alpha=6), base="runs/base", base_fingerprint="f" * 32)
    schema = adapter_tensors(model, record.lora, "F32")
    arrays = random_arrays(schema)
    opened = OpenedCheckpoint("native", tmp_path, MemorySource(schema, arrays), model, adapter=record)
    path = tmp_path / "0"
    make_job(opened, get_format("native"), path, JobOptions(ParallelLayout(tp=2, pp=2)), operation="test").run()
    moved = reshard(path, tmp_path / "1", ParallelLayout(tp=4, pp=1))
    found = read_all(moved)
    assert found.keys() == arrays.keys() and all(np.array_equal(found[name], arrays[name]) for name in arrays)
    assert open_checkpoint(moved).adapter == record
    boxes = open_checkpoint(moved).source.chunks("layers.0.mlp.down_proj.lora_A.weight")
    assert sorted(box.offset for box in boxes) == [(0, 0), (0, 6), (0, 12), (0, 18)]
    assert same_files(path, reshard(moved, tmp_path / "2", ParallelLayout(tp=2, pp=2)))
