"""Moments and master weights of Megatron's checkpoints are bit for bit those of the optimizer that saved them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.format import MegatronRun, OpenedCheckpoint
from converters.formats import megatron_dist
from converters.full import Reader
from converters.job import JobOptions, make_job
from converters.open import get_format, open_checkpoint
from converters.untrusted.dcp import read_dcp
from pretrain.engine import Trainer
from tests.converters.megatron.conftest import MODES, QUICK, trained
from tests.helpers.megatron_trained import BATCH, SIZES, STEPS, TOKENS, VOCAB, Trained, expected, train
from tests.pretrain import models
from workbench.checkpoint.store import Store
from workbench.errors import ConversionError
from workbench.registry import load
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout
from workbench.spec.schema import OPTIMIZER_PREFIX

pytest.importorskip("megatron.core")

SLOW: dict[str, dict[str, Any]] = {
    "chunks": {"pp": 2, "vpp": 2, "dtype": "float32", "modes": MODES},
    "replicas": {"tp": 2, "dp": 2, "modes": MODES},
    "cut experts": {"tp": 2, "dp": 2, "ep": 2, "experts": 4, "modes": MODES[:3]},
}
DAMAGED = ("buckets", "fully_reshardable")
"""megatron-core 0.16.1 itself warns that it corrupts this one."""


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("megatron"), SLOW)


def _cases(cases: dict[str, dict[str, Any]]) -> Iterator[Any]:
    for name, what in cases.items():
        for mode in what["modes"]:
            if (name, mode) != DAMAGED:
                yield pytest.param(name, mode, id=f"{name}-{mode}")


def arrays(opened: OpenedCheckpoint) -> dict[str, np.ndarray]:
    source = opened.source
    return {name: source.read(name, Box.whole(tensor.shape)) for name, tensor in source.schema.items()}


def require_equal(opened: OpenedCheckpoint, out: Path, what: Trained, mode: str) -> None:
    """All of the optimizer's state, to the bit, as two readers find it."""
    found = arrays(opened)
    second: Reader = load("converters.independent", opened.format, "READER")(opened.path, opened.source)
    for name, tensor in opened.source.schema.items():
        assert second.read(tensor, slice(0, tensor.shape[0])).tobytes() == found[name].tobytes(), name
    wanted = expected(out, what, distributed=not mode.startswith("plain"))
    names = {f"{OPTIMIZER_PREFIX}{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq") for name in wanted[kind]}
    assert found.keys() == names | wanted["param"].keys()
    for kind, tensors in wanted.items():
        for name, tensor in tensors.items():
            key = name if kind == "param" else f"{OPTIMIZER_PREFIX}{kind}/{name}"
            assert found[key].dtype == np.float32
            assert found[key].tobytes() == tensor.float().contiguous().numpy().tobytes(), key
    assert opened.optimizer_fault is None


@pytest.mark.parametrize(("case", "mode"), list(_cases(QUICK)))
def test_moments_and_masters_are_those_of_the_live_optimizer(quick: Path, case: str, mode: str) -> None:
    opened = open_checkpoint(quick / case / mode)
    require_equal(opened, quick / case, Trained(sizes=SIZES, **QUICK[case]), mode)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("case", "mode"), list(_cases(SLOW)))
def test_moments_and_masters_of_further_layouts_are_those_of_the_live_optimizer(
    slow: Path, case: str, mode: str
) -> None:
    opened = open_checkpoint(slow / case / mode)
    require_equal(opened, slow / case, Trained(sizes=SIZES, **SLOW[case]), mode)


@pytest.mark.parametrize("mode", ["dp_reshardable", "fully_reshardable", "plain", "plain_legacy"])
def test_a_run_goes_on_where_megatron_stood(mode: str, quick: Path) -> None:
    training = open_checkpoint(quick / "experts" / mode).training
    assert training is not None
    assert (training.step, training.samples, training.tokens) == (STEPS, STEPS * BATCH, STEPS * BATCH * TOKENS)
    assert training.seed == 1234
    assert training.optimizer == {
        "name": "adamw",
        "step": STEPS,
        "betas": [0.9, 0.99],
        "eps": 1e-8,
        "weight_decay": 0.1,
        "loss_scale": {"value": 2.0**32, "finite_steps": STEPS, "skipped_steps": 0},
    }
    assert training.scheduler == {"schedule": "cosine", "horizon": 100, "warmup": 1, "lr": 0.01, "min_lr": 0.001}


def test_weights_rounded_are_those_of_the_model(quick: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(quick / "buckets" / "legacy")
    options = JobOptions(ParallelLayout(), dtype="BF16", optimizer="drop")
    make_job(opened, get_format("native"), tmp_path / "bf16", options, operation="import").run()
    rows = open_checkpoint(tmp_path / "bf16").source.read("embed_tokens.weight", Box.whole((VOCAB, 24)))
    files = sorted((quick / "buckets" / "legacy").glob("iter_*/mp_rank_*_000/model_optim_rng.pt"))
    model = [torch.load(file, weights_only=False)["model"]["embedding.word_embeddings.weight"] for file in files]
    assert rows.tobytes() == torch.cat(model)[:VOCAB].view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize("mode", ["dp_reshardable", "legacy"])
def test_moments_stay_equal_through_native_layouts(mode: str, quick: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(quick / "buckets" / mode)
    before = arrays(opened)
    path = tmp_path / "one"
    make_job(opened, get_format("native"), path, JobOptions(ParallelLayout()), operation="import").run()
    for number, layout in enumerate((ParallelLayout(tp=4), ParallelLayout(tp=1, pp=4))):
        after = tmp_path / str(number)
        make_job(open_checkpoint(path), get_format("native"), after, JobOptions(layout), operation="reshard").run()
        path = after
    found = arrays(open_checkpoint(path))
    assert {name: array.tobytes() for name, array in found.items()} == {n: a.tobytes() for n, a in before.items()}


def test_a_buffer_of_another_size_is_refused_with_its_number_and_both_sizes(quick: Path, tmp_path: Path) -> None:
    shutil.copytree(quick / "buckets" / "legacy", tmp_path / "cut")
    (path,) = (tmp_path / "cut").glob("iter_*/mp_rank_01_001/distrib_optim.pt")
    state = torch.load(path, weights_only=False)
    (tensors,) = state[0].values()
    tensors["exp_avg"] = tensors["exp_avg"][:-64].clone()
    torch.save(state, path)
    opened = open_checkpoint(tmp_path / "cut")
    held = len(tensors["exp_avg"])
    assert opened.optimizer_fault is not None
    assert f"{path}: buffer 0 holds exp_avg of shape [{held}]" in opened.optimizer_fault
    assert f"fill [{held + 64}]" in opened.optimizer_fault
    with pytest.raises(ConversionError, match=r"buffer 0 holds exp_avg.*use --optimizer drop"):
        make_job(opened, get_format("native"), tmp_path / "out", JobOptions(ParallelLayout()), operation="import")
    options = JobOptions(ParallelLayout(), optimizer="drop")
    make_job(opened, get_format("native"), tmp_path / "out", options, operation="import").run()
    assert {t.dtype for t in open_checkpoint(tmp_path / "out").source.schema.values()} == {"BF16"}


def test_state_of_other_weights_is_refused(quick: Path, tmp_path: Path) -> None:
    shutil.copytree(quick / "buckets" / "legacy", tmp_path / "mixed")
    (path,) = (tmp_path / "mixed").glob("iter_*/mp_rank_00_000/distrib_optim.pt")
    state = torch.load(path, weights_only=False)
    (tensors,) = state[0].values()
    tensors["param"] = tensors["param"].roll(64)
    torch.save(state, path)
    fault = open_checkpoint(tmp_path / "mixed").optimizer_fault
    assert fault is not None and "is not its 32-bit master" in fault


def test_a_bucket_of_another_size_is_refused_with_its_number_and_both_sizes(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_dcp(next((quick / "buckets" / "dp_reshardable").glob("iter_*")))
    name = next(key for key in found.tensors if "dp_group_idx_1." in key and key.endswith("bucket_idx_2.exp_avg"))
    size = found.tensors[name].shape[0]
    wrong = replace(found, tensors={**found.tensors, name: replace(found.tensors[name], shape=(size + 8,))})
    monkeypatch.setattr(megatron_dist, "read_dcp", lambda _: wrong)
    fault = open_checkpoint(quick / "buckets" / "dp_reshardable").optimizer_fault
    assert fault is not None
    assert f"dp_group_idx_1.gbuf_idx_0: bucket 2 holds {size + 8} elements" in fault
    assert f"the parameters left for it fill {size};" in fault


def test_state_that_megatron_damaged_as_it_saved_it_is_refused(quick: Path) -> None:
    opened = open_checkpoint(quick / DAMAGED[0] / DAMAGED[1])
    assert opened.optimizer_fault is not None
    assert "is not its 32-bit master in the optimizer's state, rounded" in opened.optimizer_fault
    assert {tensor.dtype for tensor in opened.source.schema.values()} == {"BF16"}


def test_modules_in_another_order_are_refused(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = megatron_dist.load_arguments

    def others(arguments: Any, where: str) -> Any:
        said = given(arguments, where)
        return replace(said, given={**said.given, "transformer_impl": "transformer_engine"})

    monkeypatch.setattr(megatron_dist, "load_arguments", others)
    fault = open_checkpoint(quick / "experts" / "dp_reshardable").optimizer_fault
    assert fault is not None and "where no piece begins; the modules of this model were in another order" in fault


@dataclass(frozen=True)
class Exported:
    """What is exported, at which layout and for which run, and what megatron-core loads it as."""

    source: str
    format: str
    layout: ParallelLayout
    what: dict[str, Any]
    run: MegatronRun = field(default_factory=MegatronRun)

    @property
    def mode(self) -> str:
        if self.format == "megatron_dist":
            return "fully_reshardable"
        return "legacy" if self.run.distributed_optimizer else "plain_legacy"


CHUNKS = {"tp": 2, "pp": 2, "vpp": 2}
OWN = MegatronRun(own_layers=True)
SHARED_OUT = MegatronRun(own_layers=True, distributed_optimizer=True)
HALVES = {"experts": 4, "dtype": "float16"}
EXPORTED = {
    "torch_dist": Exported(
        "buckets/dp_reshardable",
        "megatron_dist",
        ParallelLayout(tp=4, pp=2, vocab_multiple=4),
        {"tp": 1, "tied": True},
    ),
    "torch_dist of experts": Exported(
        "experts/dp_reshardable",
        "megatron_dist",
        ParallelLayout(tp=2, dp=2, ep=2, vocab_multiple=8),
        {"tp": 2, "dp": 2, "ep": 2, **HALVES},
        OWN,
    ),
    "folders": Exported(
        "buckets/legacy", "megatron", ParallelLayout(**CHUNKS, vocab_multiple=8), {**CHUNKS, "tied": True}
    ),
    "folders of experts": Exported(
        "experts/plain_legacy",
        "megatron",
        ParallelLayout(dp=2, ep=2, vocab_multiple=8),
        {"dp": 2, "ep": 2, "experts": 4, "dtype": "float32"},
    ),
    "folders of own layers with biases": Exported(
        "biases/plain_legacy", "megatron", ParallelLayout(pp=2, vocab_multiple=8), {"pp": 2, "biases": True}, OWN
    ),
    "buffers": Exported(
        "buckets/legacy", "megatron", ParallelLayout(**CHUNKS, vocab_multiple=8), {**CHUNKS, "tied": True}, SHARED_OUT
    ),
    "buffers of experts": Exported(
        "experts/plain_legacy",
        "megatron",
        ParallelLayout(dp=2, ep=2, vocab_multiple=8),
        {"dp": 2, "ep": 2, **HALVES},
        SHARED_OUT,
    ),
}


def further(case: str, source: str, layout: dict[str, Any], run: MegatronRun, **what: Any) -> tuple[str, Exported]:
    replicas = {"dp": layout["ep"]} if "ep" in layout else {}
    layout = {**layout, **replicas}
    return case, Exported(source, "megatron", ParallelLayout(**layout, vocab_multiple=4), {**layout, **what}, run)


MORE_EXPORTED = dict(
    further(f"{kind} of {case}", source, layout, run, **what)
    for kind, run in (("folders", OWN), ("buffers", SHARED_OUT))
    for case, source, layout, what in (
        ("one rank", "buckets/legacy", {}, {"tied": True}),
        ("tensor ranks", "biases/plain_legacy", {"tp": 4}, {"biases": True}),
        ("stages", "buckets/legacy", {"pp": 4}, {"tied": True, "dtype": "float32"}),
        ("chunks of experts", "experts/legacy", {"pp": 2, "vpp": 2}, HALVES),
        ("cut experts", "experts/legacy", {"tp": 2, "ep": 2}, {"experts": 4}),
        ("all at once", "experts/legacy", {"tp": 2, "pp": 2, "ep": 2}, {"experts": 4, "dtype": "float32"}),
    )
)


@pytest.fixture(scope="session")
def loaded(quick: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each export the native checkpoint, the exported one, and what megatron-core's optimizers then hold; and what
    megatron-core itself saved again at the layout of "torch_dist of experts"."""
    first = str(quick / "experts" / "fully_reshardable" / f"iter_{STEPS:07d}")
    again = {**EXPORTED["torch_dist of experts"].what, "load": first, "again": "fully_reshardable"}
    return _loaded(tmp_path_factory.mktemp("loaded"), quick, EXPORTED, again=again)


@pytest.fixture(scope="session")
def more_loaded(quick: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _loaded(tmp_path_factory.mktemp("more-loaded"), quick, MORE_EXPORTED)


def _loaded(root: Path, quick: Path, cases: dict[str, Exported], **more: dict[str, Any]) -> Path:
    for name, case in cases.items():
        path = quick / case.source
        for number, (operation, layout) in enumerate([("import", ParallelLayout()), ("reshard", case.layout)]):
            before, path = path, root / name / f"native-{number}"
            make_job(open_checkpoint(before), get_format("native"), path, JobOptions(layout), operation=operation).run()
        options = JobOptions(case.layout, optimizer="require", megatron=case.run)
        job = make_job(
            open_checkpoint(path), get_format(case.format), root / name / "exported", options, operation="export"
        )
        job.run(verify="full")
    live = {
        str(root / name / "live"): {**case.what, "load": str(root / name / "exported" / f"iter_{STEPS:07d}")}
        for name, case in cases.items()
    }
    train({**live, **{str(root / name): what for name, what in more.items()}})
    return root


@pytest.mark.parametrize("name", EXPORTED)
def test_megatron_core_loads_the_moments_that_were_exported(quick: Path, loaded: Path, name: str) -> None:
    require_loaded(EXPORTED[name], quick, loaded, name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MORE_EXPORTED)
def test_megatron_core_loads_the_moments_at_further_layouts(quick: Path, more_loaded: Path, name: str) -> None:
    require_loaded(MORE_EXPORTED[name], quick, more_loaded, name)


def require_loaded(case: Exported, quick: Path, loaded: Path, name: str) -> None:
    """What was exported holds what was imported, and so did megatron-core after it had loaded it."""
    opened, again = open_checkpoint(quick / case.source), open_checkpoint(loaded / name / "exported")
    assert again.training == open_checkpoint(loaded / name / "native-1").training
    assert {n: a.tobytes() for n, a in arrays(again).items()} == {n: a.tobytes() for n, a in arrays(opened).items()}
    require_equal(opened, loaded / name / "live", Trained(sizes=SIZES, **case.what), case.mode)
    held = torch.load(loaded / name / "live" / "plain.pt")
    for group in held["groups"]:
        assert (group["step"], group["betas"], group["eps"]) == (STEPS, (0.9, 0.99), 1e-8)
    assert len(held["scalers"]) == (case.what.get("dtype") == "float16") * case.what.get("ep", 1)
    for scaler in held["scalers"]:
        assert (scaler["scale"].item(), scaler["growth_tracker"], scaler["hysteresis_tracker"]) == (2.0**32, STEPS, 2)


def test_megatron_cores_own_resharding_agrees_with_ours_bit_for_bit(loaded: Path) -> None:
    """From tp=1 to tp=2, of every tensor: name, shape, values. Ours has 32-bit weights, and zero rows of no word."""
    ours = tensors_of(loaded / "torch_dist of experts" / "exported" / f"iter_{STEPS:07d}")
    theirs = tensors_of(loaded / "again" / "fully_reshardable" / f"iter_{STEPS:07d}")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (np.float32, array.shape)
        assert array.dtype == (np.float32 if name.startswith("optimizer.") else np.float16)
        words = VOCAB if name.endswith(("embeddings.weight", "output_layer.weight")) else len(array)
        np.testing.assert_array_equal(ours[name].astype(array.dtype)[:words], array[:words], err_msg=name)
        assert not ours[name][words:].any()


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a torch_dist folder, put together."""
    found = {}
    for name, tensor in read_dcp(folder).tensors.items():
        found[name] = array = np.zeros(tensor.shape, {"F32": np.float32, "F16": np.float16}[tensor.dtype])
        for piece in tensor.pieces:
            array[piece.box.slices] = piece.locate().mapped()
    return found


def test_pretrain_resumes_what_was_imported(quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "VOCAB", VOCAB)
    opened = open_checkpoint(quick / "buckets" / "dp_reshardable")
    path = Store(tmp_path / "checkpoints").path(STEPS)
    path.parent.mkdir()
    make_job(opened, get_format("native"), path, JobOptions(ParallelLayout()), operation="import").run()
    config = models.tiny_config(
        str(tmp_path), run={"seed": 1234, "steps": 5, "resume": "must"}, batch={"seq_len": TOKENS, "global_size": BATCH}
    )
    objective = models.Noise(tokens=TOKENS)
    trainer = Trainer(config, models.tiny_subject(opened.model), objective, models.mesh_of(ParallelLayout()))
    assert (trainer.state.step, trainer.optimizer.step_count) == (STEPS, STEPS)
    what = Trained(sizes=SIZES, **QUICK["buckets"])
    for kind, tensors in expected(quick / "buckets", what).items():
        name = "norm.weight"
        held = {p.path: p.data for p in trainer.built.parameters}[name]
        found = held if kind == "param" else trainer.optimizer.moments()[f"{OPTIMIZER_PREFIX}{kind}"][name]
        assert torch.equal(found, tensors[name])
    assert trainer.run().step == 5
    assert min(objective.asked) == STEPS * BATCH
