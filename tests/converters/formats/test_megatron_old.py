"""Rank folders of older Megatrons, damaged ones and incomplete ones. Made here from what a plain one holds."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.format import no_progress
from converters.job import JobOptions, make_job
from converters.megatron.stages import KEYS as STAGE_KEYS
from converters.open import get_format, open_checkpoint
from tests.helpers.megatron_cases import ITERATION, Case, logical
from tests.helpers.megatron_saved import EXPERTS, GPT, LLAMA, State, save
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout


def assert_same(path: Path, case: Case) -> None:
    opened = open_checkpoint(path)
    assert opened.source.schema.keys() == logical(case).keys()
    for name, tensor in logical(case).items():
        found = opened.source.read(name, Box.whole(tuple(tensor.shape)))
        np.testing.assert_array_equal(found, tensor.numpy(), err_msg=name)
    assert opened.check is not None
    opened.check(no_progress)


OLD = {
    "decoder.final_layernorm": "encoder.final_layernorm",
    "decoder.layers": "encoder.layers",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "linear_qkv": "query_key_value",
    "linear_proj": "dense",
    "linear_fc1": "dense_h_to_4h",
    "linear_fc2": "dense_4h_to_h",
}


def before_core(state: State) -> State:
    """The nested state of a GPT before Megatron-Core, in which the encoder alone is flat."""
    found: State = {"language_model": {"encoder": {}}}
    inner = found["language_model"]
    for name, tensor in state.items():
        for new, old in OLD.items():
            name = name.replace(new, old)
        if name.startswith("encoder."):
            inner["encoder"][name.removeprefix("encoder.")] = tensor
        elif name == "output_layer.weight":
            found["word_embeddings_for_head"] = {"weight": tensor}
        else:
            _, kind, leaf = name.split(".")
            inner.setdefault("embedding", {})[kind] = {leaf: tensor}
    return found


def reordered(version: float) -> Callable[[State], State]:
    """Rows of queries, keys and values as this version of checkpoints has them: the inverse of Megatron's fix."""

    def change(state: State) -> State:
        for name, tensor in state.items():
            if "linear_qkv" in name:
                grid = tensor.view(-1, 3, 8, *tensor.shape[1:])
                state[name] = (grid.transpose(0, 1) if version == 0 else grid.transpose(1, 2)).reshape(tensor.shape)
        return before_core(state)

    return change


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("version", [0, 1.0, 2.0])
def test_checkpoints_from_before_megatron_core_are_read(tmp_path: Path, version: float, tp: int, pp: int) -> None:
    case = Case(GPT, tp=tp, pp=pp)
    change = reordered(version) if version < 2 else before_core
    assert_same(save(case, tmp_path / "old", change, version), case)


def test_optimizer_state_in_an_old_order_is_told_and_not_read(tmp_path: Path) -> None:
    path = save(Case(GPT), tmp_path / "old", reordered(1.0), 1.0)
    (file,) = path.glob("iter_*/mp_rank_00/model_optim_rng.pt")
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]}
    torch.save(torch.load(file, weights_only=False) | {"optimizer": optimizer}, file)
    opened = open_checkpoint(path)
    assert opened.optimizer_fault is not None
    assert "checkpoint_version=1 keeps queries, keys and values in another order" in opened.optimizer_fault
    job = make_job(
        opened, get_format("native"), tmp_path / "new", JobOptions(ParallelLayout(), optimizer="drop"), operation="test"
    )
    job.run(verify="full")


def flat_experts(state: State) -> State:
    """What GroupedMLP has in the place of single experts: buffers [experts, hidden, width] and [experts, width, hidden]
    under other shapes."""
    found = {name: tensor for name, tensor in state.items() if "local_experts" not in name}
    for layer in range(4):
        for matrix in (1, 2):
            base = f"decoder.layers.{layer}.mlp.experts"
            each = [state.get(f"{base}.local_experts.{e}.linear_fc{matrix}.weight") for e in range(4)]
            stack = torch.stack([tensor.T for tensor in each if tensor is not None])
            shape = (stack.shape[1], -1) if matrix == 1 else (-1, stack.shape[2])
            found[f"{base}.weight{matrix}"] = stack.contiguous().view(shape)
    return found


def grouped_experts(state: State) -> State:
    """TEGroupedMLP's names."""
    pattern = re.compile(r"local_experts\.(\d+)\.(linear_fc\d\.weight)")
    return {pattern.sub(r"\2\1", name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("change", [flat_experts, grouped_experts])
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 2), (1, 4)])
def test_experts_are_read_in_every_form(tmp_path: Path, change: Callable[[State], State], tp: int, ep: int) -> None:
    case = Case(EXPERTS, tp=tp, ep=ep)
    assert_same(save(case, tmp_path / "experts", change), case)


def test_old_orders_of_grouped_queries_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"checkpoint_version=1.0 orders queries, keys and values as no model"):
        open_checkpoint(save(Case(LLAMA), tmp_path / "old", version=1.0))


def test_an_unknown_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="checkpoint_version=4.0 is not known; 0 to 3 are"):
        open_checkpoint(save(Case(LLAMA), tmp_path / "new", version=4.0))


def test_the_size_of_a_padded_vocabulary_must_be_known(tmp_path: Path) -> None:
    path = save(Case(LLAMA), tmp_path / "padded", vocab_size=None)
    with pytest.raises(ConversionError, match="only padded_vocab_size=104; say how many words .* with --vocab-size"):
        open_checkpoint(path)
    assert open_checkpoint(path, vocab_size=100).source.schema["lm_head.weight"].shape == (100, 32)
    path = save(Case(LLAMA), tmp_path / "told")
    with pytest.raises(ConversionError, match="has 100 words, not --vocab-size 90"):
        open_checkpoint(path, vocab_size=90)


def test_missing_files_are_listed_all_at_once(tmp_path: Path) -> None:
    path = save(Case(LLAMA, tp=2, pp=2), tmp_path / "part")
    for name in ("mp_rank_00_001", "mp_rank_01_001"):
        (path / f"iter_{ITERATION:07d}" / name).rename(tmp_path / name)
    with pytest.raises(CheckpointError, match="4 folders .* mp_rank_00_001 is missing, mp_rank_01_001 is missing"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("case", "name", "files"),
    [
        (Case(LLAMA, tp=2), "decoder.layers.2.input_layernorm.weight", ["mp_rank_00", "mp_rank_01"]),
        (Case(GPT, tp=2), "decoder.layers.0.self_attention.linear_proj.bias", ["mp_rank_00", "mp_rank_01"]),
        (Case(GPT, pp=2), "output_layer.weight", ["mp_rank_00_000", "mp_rank_00_001"]),
        (Case(EXPERTS, ep=2), "decoder.layers.3.mlp.router.weight", ["mp_rank_00_000", "mp_rank_00_001"]),
    ],
)
def test_a_copy_that_differs_is_named_with_its_ranks(tmp_path: Path, case: Case, name: str, files: list[str]) -> None:
    path = save(case, tmp_path / "run")
    last = path / f"iter_{ITERATION:07d}" / files[-1] / "model_optim_rng.pt"
    state = torch.load(last, weights_only=False)
    state["model"][name] = state["model"][name].clone()
    state["model"][name].view(torch.int32).flatten()[5] ^= 1
    torch.save(state, last)
    opened = open_checkpoint(path)
    assert opened.check is not None
    shown = "embedding.word_embeddings.weight" if name == "output_layer.weight" else name
    with pytest.raises(CheckpointError, match=rf"'{shown}' differs between .*{files[0]}.* and .*{files[1]}"):
        opened.check(no_progress)


def renamed(state: State) -> State:
    return {name.replace("linear_proj", "linear_prong"): tensor for name, tensor in state.items()}


def shortened(state: State) -> State:
    return {n: t[:-1] if n == "decoder.layers.1.mlp.linear_fc2.weight" else t for n, t in state.items()}


def deepened(state: State) -> State:
    return {name.replace("layers.3.", "layers.4."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed, r"4 tensors .*linear_proj.* are missing"),
        (
            lambda state: state | {"visual.weight": torch.ones(3)},
            "'visual.weight' has no place in family 'llama'; --allow-drop REGEX",
        ),
        (shortened, r"linear_fc2.weight' has shape \[31, 48\], but the args say \[32, 48\]"),
        (deepened, r"'decoder.layers.4.*' is past the 4 layers that its args say"),
        (lambda _: [], "holds list"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(
    tmp_path: Path, change: Callable[[State], State], said: str
) -> None:
    with pytest.raises((CheckpointError, ConversionError), match=said):
        open_checkpoint(save(Case(LLAMA), tmp_path / "run", change))


def test_files_of_several_saves_are_refused(tmp_path: Path) -> None:
    path = save(Case(LLAMA, tp=2), tmp_path / "run")
    last = path / f"iter_{ITERATION:07d}" / "mp_rank_01" / "model_optim_rng.pt"
    torch.save(torch.load(last, weights_only=False) | {"iteration": 7}, last)
    with pytest.raises(CheckpointError, match="its iteration is 7, but 5 in mp_rank_00; these are files of several"):
        open_checkpoint(path)


def test_scales_of_delayed_fp8_are_refused(tmp_path: Path) -> None:
    scales = torch.frombuffer(bytearray(b"amax_history_fwd"), dtype=torch.uint8)
    key = "decoder.layers.0.self_attention.linear_qkv._extra_state"
    with pytest.raises(ConversionError, match="_extra_state' holds scales of fp8 with delayed scaling"):
        open_checkpoint(save(Case(LLAMA), tmp_path / "run", lambda state: state | {key: scales}))
    assert_same(save(Case(LLAMA), tmp_path / "none", lambda state: state | {key: torch.empty(0)}), Case(LLAMA))


def test_an_iteration_folder_and_a_release_are_opened_too(tmp_path: Path) -> None:
    path = save(Case(LLAMA), tmp_path / "run")
    assert_same(path / f"iter_{ITERATION:07d}", Case(LLAMA))
    (path / f"iter_{ITERATION:07d}").rename(path / "release")
    (path / "latest_checkpointed_iteration.txt").write_text("release")
    assert_same(path, Case(LLAMA))


ODD = st.sampled_from([None, -1, 0, 1, 3, 1 << 70, 2.5, float("nan"), True, "", "abc", "E|tL", "(", (), [1], {}, b"x"])
NAMES = sorted(vars(Case(EXPERTS, tp=2).arguments()).keys() | set(STAGE_KEYS))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), value=ODD)
def test_arguments_of_any_kind_are_read_or_refused(tmp_path: Path, name: str, value: Any) -> None:
    path = save(Case(EXPERTS), Path(tempfile.mkdtemp(dir=tmp_path)), **{name: value})
    with contextlib.suppress(CheckpointError, ConversionError):
        open_checkpoint(path)
