"""Whatever happened to a file, its reader answers or refuses: no other error, no hang, no memory beyond a bound."""

from __future__ import annotations

import io
import os
import pickle
import resource
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from converters.job import JobOptions, make_job
from converters.open import formats, get_format, open_checkpoint
from converters.untrusted.dcp import read_dcp
from converters.untrusted.pickle import read_pickle
from converters.untrusted.torch_file import MEGATRON, StridedTensor, read_torch
from tests.converters.formats.test_deepspeed_universal import save_universal
from tests.converters.formats.test_huggingface import save_as_pickle
from tests.converters.formats.test_peft import exported
from tests.helpers.checkpoints import random_native, tiny_model
from tests.helpers.fuzz import MUTATIONS, Mutation, mutate
from tests.helpers.hf_models import save_model
from tests.helpers.models import gated_model
from workbench.cli.common import Output
from workbench.cli.inspect import inspect
from workbench.errors import WorkbenchError
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import LoraSpec

SECONDS, MEMORY_BYTES = 20, 1 << 30
LLAMA = "llama, tied, grouped, llama3 rope"
FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
MANY = settings(FEW, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "10000")))


def native(root: Path) -> Path:
    random_native(root / "native", layout=ParallelLayout(tp=2))
    return root / "native"


def hugging_face(root: Path) -> Path:
    return save_model(LLAMA, root / "hf")


def sharded(root: Path) -> Path:
    return save_model(LLAMA, root / "sharded", max_shard_size="40KB")


def pickled(root: Path) -> Path:
    save_as_pickle(save_model(LLAMA, root / "hf2"), root / "pickled", zipped=True, sharded=True)
    return root / "pickled"


def legacy(root: Path) -> Path:
    save_as_pickle(save_model(LLAMA, root / "hf3"), root / "legacy", zipped=False, sharded=False)
    return root / "legacy"


def sliding(root: Path) -> Path:
    return save_model("gemma3, untied, biased, capped", root / "sliding")


def adapter(root: Path) -> Path:
    return exported(root / "adapted", gated_model(), LoraSpec(r=2))[2]


def universal(root: Path) -> Path:
    save_universal(save_model(LLAMA, root / "hf4"), root / "universal", zero=2)
    return root / "universal"


def exported_to(name: str) -> Callable[[Path], Path]:
    """Makes a checkpoint of a format that Workbench writes, with what that format holds of optimizer state."""

    def make(root: Path) -> Path:
        random_native(root / f"from-{name}", gated_model(), dtype="F32")
        source = open_checkpoint(root / f"from-{name}")
        make_job(
            source, get_format(name), root / name, JobOptions(layout=ParallelLayout(tp=2)), operation="export"
        ).run()
        return root / name

    return make


OTHERS = sorted(formats().keys() - {"native", "huggingface", "peft", "deepspeed_universal"})
FORMATS: dict[str, Callable[[Path], Path]] = {name: exported_to(name) for name in OTHERS} | {
    f.__name__: f for f in (native, hugging_face, sharded, pickled, legacy, sliding, adapter, universal)
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("fuzz")
    return {name: make(root) for name, make in FORMATS.items()}


def read_everything(path: Path) -> None:
    """What `wb inspect` and a conversion read."""
    inspect(Output(json=True, stdout=io.StringIO()), path, "*")
    opened = open_checkpoint(path)
    for name, tensor in opened.source.schema.items():
        opened.source.read(name, Box.whole(tensor.shape))
    if opened.check is not None:
        opened.check(lambda _: None)


@contextmanager
def bounds() -> Iterator[None]:
    """AssertionError when what is done inside takes too long or too much memory; a WorkbenchError is an answer."""
    start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(WorkbenchError):
        yield
    assert time.monotonic() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) << 10 < MEMORY_BYTES


def attack(folder: Path, choice: int, mutations: list[Mutation], read: Callable[[Path], None]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[choice % len(files)]
    data = path.read_bytes()
    path.write_bytes(mutate(data, mutations))
    try:
        with bounds():
            read(folder)
    finally:
        path.write_bytes(data)


def test_files_that_nobody_touched_are_read(folders: Mapping[str, Path]) -> None:
    for folder in folders.values():
        read_everything(folder)


@pytest.mark.parametrize("name", FORMATS)
@given(choice=st.integers(0, 1000), mutations=MUTATIONS)
@FEW
def test_a_checkpoint_with_a_damaged_file_is_read_or_refused(
    folders: Mapping[str, Path], name: str, choice: int, mutations: list[Mutation]
) -> None:
    attack(folders[name], choice, mutations, read_everything)


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", FORMATS)
@given(choice=st.integers(0, 1000), mutations=MUTATIONS)
@MANY
def test_ten_thousand_damaged_files_of_a_format_are_read_or_refused(
    folders: Mapping[str, Path], name: str, choice: int, mutations: list[Mutation]
) -> None:
    attack(folders[name], choice, mutations, read_everything)


# What Megatron saves beside its tensors, with other values.

STATES = ({"param_groups": 3}, {"param_groups": [{}]}, {"state": {}, "param_groups": [{"params": [1]}]})
VALUES = st.sampled_from(
    (None, -1, 0, 1, 10**30, float("nan"), "x", b"x", [], [[]], [{}], {}, {"a": 1}, (), True, torch.ones(2), *STATES)
)
PLAIN = {"megatron": "*/mp_rank_00/model_optim_rng.pt", "megatron_dist": "*/common.pt"}


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a tree, and each key in it."""
    inside = vars(tree) if isinstance(tree, Namespace) else tree
    keys = list(inside) if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ()
    for key in keys:
        yield inside, key
        yield from places(inside[key])


def attack_plain(folder: Path, pattern: str, choice: int, value: Any) -> None:
    (path,) = folder.glob(pattern)
    data = path.read_bytes()
    state = torch.load(path, weights_only=False)
    found = list(places(state))
    inside, key = found[choice % len(found)]
    inside[key] = value
    torch.save(state, path)
    try:
        with bounds():
            read_everything(folder)
            opened = open_checkpoint(folder)
            for name in ("native", "megatron"):
                make_job(opened, get_format(name), folder / "never", JobOptions(ParallelLayout()), operation="test")
    finally:
        path.write_bytes(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    random_native(root / "native", tiny_model(), dtype="F32")
    for name in PLAIN:
        opened = open_checkpoint(root / "native")
        make_job(opened, get_format(name), root / name, JobOptions(ParallelLayout()), operation="export").run()
    return root


@pytest.mark.parametrize("name", PLAIN)
@given(choice=st.integers(0, 1000), value=VALUES)
@FEW
def test_a_run_of_megatron_with_another_value_is_read_or_refused(
    runs: Path, name: str, choice: int, value: Any
) -> None:
    attack_plain(runs / name, PLAIN[name], choice, value)


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", PLAIN)
@given(choice=st.integers(0, 1000), value=VALUES)
@MANY
def test_ten_thousand_runs_of_megatron_with_another_value_are_read_or_refused(
    runs: Path, name: str, choice: int, value: Any
) -> None:
    attack_plain(runs / name, PLAIN[name], choice, value)


# Single files, as fast as they go.


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("files")
    state = {
        "args": {"lr": 1e-3, "path": Path("a/b"), "dtype": torch.bfloat16, "layers": (1, 2)},
        "w": torch.arange(12.0).view(3, 4).T,
        "rng": (*np.random.RandomState(0).get_state()[:1], np.arange(4)),
        "buffer": io.BytesIO(b"abc"),
    }
    torch.save(state, root / "x.pt")
    plain = {name: value for name, value in state.items() if name != "buffer"}
    torch.save(plain, root / "old.pt", _use_new_zipfile_serialization=False, pickle_protocol=2)
    dcp.save({"w": torch.ones(4, 5), "step": 3, "b": io.BytesIO(b"x")}, checkpoint_id=root / "dcp", no_dist=True)
    return {"zip": root / "x.pt", "before the zip format": root / "old.pt", "dcp": root / "dcp/.metadata"}


def read_tensors(value: object) -> None:
    if type(value) is StridedTensor:
        value.read(Box.whole(value.shape))
    for item in value.values() if isinstance(value, dict) else ():
        read_tensors(item)


def read_folder(folder: Path) -> None:
    found = read_dcp(folder)
    for tensor in found.tensors.values():
        for piece in tensor.pieces:
            read_tensors(piece.locate())
    for name in found.objects:
        found.read_object(name)


def attack_file(path: Path, mutations: list[Mutation]) -> None:
    data = path.read_bytes()
    path.write_bytes(mutate(data, mutations))
    try:
        with bounds():
            if path.name == ".metadata":
                read_folder(path.parent)
            else:
                read_tensors(read_torch(path))
    finally:
        path.write_bytes(data)


KINDS = ("zip", "before the zip format", "dcp")


@pytest.mark.parametrize("kind", KINDS)
@given(mutations=MUTATIONS)
@settings(FEW, max_examples=100)
def test_a_damaged_file_of_torch_is_read_or_refused(
    files: Mapping[str, Path], kind: str, mutations: list[Mutation]
) -> None:
    attack_file(files[kind], mutations)


PICKLES = [
    pickle.dumps({"a": [1, 2.5, ("x", None)], "b": {3: b"y", "c": {1, 2}}, "d": np.arange(3)}, protocol)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
]


@given(source=st.sampled_from(PICKLES), mutations=MUTATIONS)
@settings(FEW, max_examples=200)
def test_a_damaged_pickle_is_read_or_refused(source: bytes, mutations: list[Mutation]) -> None:
    with bounds():
        read_pickle(mutate(source, mutations), MEGATRON, "x.pkl")


@given(data=st.binary(max_size=60))
@settings(FEW, max_examples=200)
def test_any_bytes_are_read_or_refused_as_a_pickle(data: bytes) -> None:
    with bounds():
        read_pickle(data, MEGATRON, "x.pkl")


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@given(source=st.sampled_from(PICKLES), mutations=MUTATIONS)
@settings(FEW, max_examples=100_000)
def test_a_hundred_thousand_damaged_pickles_are_read_or_refused(source: bytes, mutations: list[Mutation]) -> None:
    with bounds():
        read_pickle(mutate(source, mutations), MEGATRON, "x.pkl")
