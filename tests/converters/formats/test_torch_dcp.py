"""Folders of torch.distributed.checkpoint, written by PyTorch and read here, and the other way round."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from converters.format import WriteRequest
from converters.formats._dcp_source import _scalar
from converters.job import JobOptions, make_job
from converters.open import get_format, open_checkpoint
from converters.untrusted.dcp import read_dcp
from tests.helpers.checkpoints import random_native, read_all, tiny_model
from tests.helpers.ranks import run_ranks
from workbench.checkpoint.source import TensorSource
from workbench.cli.main import main
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
LAYOUTS = {
    "whole": ParallelLayout(),
    "tensor": ParallelLayout(tp=2),
    "both, uneven": ParallelLayout(tp=2, pp=2, pp_layout=(1, 3)),
    "chunks, padded": ParallelLayout(pp=2, vpp=2, vocab_multiple=16),
}
MODELS = {"tied": {}, "untied": {"tie_word_embeddings": False}}


CASES = [(names, layout, model) for names in ("dcp", "torchtitan") for layout in LAYOUTS for model in MODELS]
QUICK = [("dcp", "both, uneven", "tied"), ("torchtitan", "chunks, padded", "untied"), ("torchtitan", "tensor", "tied")]


@pytest.mark.parametrize(
    ("names", "layout", "model"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.exhaustive) for case in CASES],
)
def test_weights_and_moments_come_back_from_a_folder_bit_for_bit(
    tmp_path: Path, names: str, layout: str, model: str
) -> None:
    random_native(tmp_path / "a", tiny_model(**MODELS[model]), LAYOUTS[layout])
    convert(tmp_path / "a", names, tmp_path / "b", max_shard_bytes=20000)
    assert len(list((tmp_path / "b").glob("__*_0.distcp"))) > 3
    convert(tmp_path / "b", "native", tmp_path / "c", layout=LAYOUTS[layout])
    before, after = read_all(tmp_path / "a"), read_all(tmp_path / "c")
    assert before.keys() == after.keys()
    assert [name for name in before if not np.array_equal(before[name], after[name])] == []
    assert open_checkpoint(tmp_path / "c").training == open_checkpoint(tmp_path / "a").training
    (tmp_path / "b/training.json").unlink()  # what other programs know of
    training = open_checkpoint(tmp_path / "b").training
    assert training is not None
    assert (training.step, training.tokens, training.optimizer) == (100, 25600, {"name": "adamw", "step": 98})


def convert(source: Path, name: str, path: Path, **options: Any) -> None:
    chosen = JobOptions(**{"layout": ParallelLayout(), **options})
    make_job(open_checkpoint(source), get_format(name), path, chosen, operation="export").run(verify="full")


@pytest.fixture(scope="module")
def trained() -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    """A model of transformers after two steps of AdamW."""
    return stepped(tiny_llama())


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config)


def stepped(model: LlamaForCausalLM) -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        tokens = torch.randint(0, 53, (2, 8))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("flat", [True, False], ids=["flattened", "nested"])
@pytest.mark.parametrize("outer", ["", "app"])
def test_what_pytorch_saves_is_read(
    tmp_path: Path, trained: tuple[LlamaForCausalLM, torch.optim.Optimizer], flat: bool, outer: str
) -> None:
    model, optimizer = trained
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    state: dict[str, Any] = {"model": weights, "optim": moments}
    dcp.save({outer: state} if outer else state, checkpoint_id=tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"has no config.json.*copy the config.json of the model there"):
        open_checkpoint(tmp_path / "a")
    model.config.save_pretrained(tmp_path / "a")
    opened = open_checkpoint(tmp_path / "a")
    assert (opened.format, opened.family, opened.info["names"]) == ("dcp", "llama", "transformers")
    assert opened.training is not None and opened.training.optimizer == {"name": "adamw", "step": 2}
    assert opened.info["not taken over"].endswith("optim.param_groups") or outer
    assert_equal(opened.source, "", {n: p.detach() for n, p in model.named_parameters()})
    states = {n: optimizer.state[p] for n, p in model.named_parameters()}
    for kind in ("exp_avg", "exp_avg_sq"):
        assert_equal(opened.source, f"optim.{kind}/", {name: state[kind] for name, state in states.items()})
    assert len(opened.source.schema) == 3 * len(states)


def assert_equal(source: TensorSource, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        found = source.read(prefix + name.removeprefix("model."), Box.whole(tuple(tensor.shape)))
        assert np.array_equal(found, tensor.numpy()), name


def test_pytorch_loads_what_is_written_into_model_and_optimizer(
    tmp_path: Path, trained: tuple[LlamaForCausalLM, torch.optim.Optimizer]
) -> None:
    model, optimizer = trained
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=tmp_path / "a")
    model.config.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", "native", tmp_path / "b", layout=ParallelLayout(tp=2))
    convert(tmp_path / "b", "dcp", tmp_path / "c")
    other, others = stepped(LlamaForCausalLM(LlamaConfig.from_pretrained(tmp_path / "c")))
    weights, moments = get_state_dict(other, others)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=tmp_path / "c", planner=DefaultLoadPlanner(allow_partial_load=True))
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter), name
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(moments["state"][name][kind], optimizer.state[parameter][kind]), (name, kind)
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight)
    dcp.load({"model": weights}, checkpoint_id=tmp_path / "c")  # lacks nothing of the model


def _fsdp(source: Path | None, target: Path) -> dict[str, np.ndarray]:
    """Saves a model and optimizer that two ranks share by rows, after loading `source`; its weights, whole."""
    mesh = init_device_mesh("cpu", (2,))
    model, optimizer = stepped(fully_shard(tiny_llama(), mesh=mesh))
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    if source is not None:
        dcp.load(state, checkpoint_id=source, planner=DefaultLoadPlanner(allow_partial_load=True))
    dcp.save(state, checkpoint_id=target)
    tensors = {**weights, **{f"{n}.exp_avg": values["exp_avg"] for n, values in moments["state"].items()}}
    return {name: tensor.full_tensor().detach().numpy() for name, tensor in tensors.items()}


def test_shards_of_two_ranks_are_read_and_loaded_by_them_again(tmp_path: Path) -> None:
    saved, _ = run_ranks(2, _fsdp, None, tmp_path / "a")
    tiny_llama().config.save_pretrained(tmp_path / "a")
    opened = open_checkpoint(tmp_path / "a")
    assert {len(opened.source.chunks(name)) for name in opened.source.schema} == {2}
    assert_equal(
        opened.source, "", {n: torch.from_numpy(saved[n]) for n in saved if "exp" not in n and "head" not in n}
    )
    convert(tmp_path / "a", "native", tmp_path / "b", layout=ParallelLayout(tp=2))
    convert(tmp_path / "b", "dcp", tmp_path / "c")
    loaded, _ = run_ranks(2, _fsdp, tmp_path / "c", tmp_path / "d")
    assert loaded.keys() == saved.keys() and all(np.array_equal(loaded[name], saved[name]) for name in saved)


def test_rotary_pairs_of_torchtitan_are_neighbours(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=False)
    source = random_native(tmp_path / "a", model, optimizer=False)
    convert(tmp_path / "a", "torchtitan", tmp_path / "b")
    ours = torch.from_numpy(source.read("layers.3.self_attn.k_proj.weight", Box.whole((8, 16)))).view(torch.bfloat16)
    state = {"layers.3.attention.wk.weight": torch.zeros(8, 16, dtype=torch.bfloat16), "output.weight": None}
    state["output.weight"] = torch.zeros(53, 16, dtype=torch.bfloat16)
    dcp.load(state, checkpoint_id=tmp_path / "b")
    # As convert_llama_weights_to_hf.py of transformers turns Meta's rows into its own: 2 heads of 4.
    turned = state["layers.3.attention.wk.weight"].view(2, 2, 2, 16).transpose(1, 2).reshape(8, 16)
    assert torch.equal(turned, ours)
    opened = open_checkpoint(tmp_path / "b")
    assert opened.info["names"] == "torchtitan" and opened.training is not None and opened.training.step == 100


def test_export_and_import_go_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_native(tmp_path / "a", layout=ParallelLayout(tp=2))
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "dcp", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verify"] == "full"
    assert main(["import", str(tmp_path / "b"), str(tmp_path / "c"), "--pp", "2", "--verify", "full", "-q"]) == 0
    assert main(["verify", str(tmp_path / "a"), str(tmp_path / "c"), "-q"]) == 0
    words = ["export", str(tmp_path / "a"), str(tmp_path / "d"), "--to", "torchtitan"]
    assert main([*words, "--verify", "logits", "--optimizer", "drop"]) == 0
    assert "logits equal those of the copy" in capsys.readouterr().out
    assert not any(name.startswith("optim.") for name in open_checkpoint(tmp_path / "d").source.schema)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, -1.0, 2.5])
def test_a_step_that_is_no_count_is_refused(tmp_path: Path, value: float) -> None:
    dcp.save({"step": torch.tensor(value)}, checkpoint_id=tmp_path / "a", no_dist=True)
    with pytest.raises(CheckpointError, match=rf"'step' is {value}, not a count"):
        _scalar(read_dcp(tmp_path / "a"), "step")


def test_what_is_not_understood_is_refused_by_name(tmp_path: Path) -> None:
    random_native(tmp_path / "a", optimizer=False)
    convert(tmp_path / "a", "dcp", tmp_path / "b")
    config = tmp_path / "b/config.json"

    def save(name: str, **state: Any) -> Path:
        dcp.save(state, checkpoint_id=tmp_path / name)
        shutil.copy(config, tmp_path / name)
        return tmp_path / name

    with pytest.raises(ConversionError, match=r"no table of names .* finds the token embedding.*'net.w'"):
        open_checkpoint(save("c", net={"w": torch.ones(2)}))
    embedding = {"model": {"model.embed_tokens.weight": torch.ones(53, 16)}}
    with pytest.raises(ConversionError, match=r"'ema' has no place beside the weights 'model.'"):
        open_checkpoint(save("d", **embedding, ema=torch.ones(3)))
    with pytest.raises(ConversionError, match="1 tensors cannot hold num_hidden_layers=4"):
        open_checkpoint(save("e", **embedding))
    random_native(tmp_path / "g")
    convert(tmp_path / "g", "torchtitan", tmp_path / "h")
    stated = tmp_path / "h/training.json"
    stated.write_text(stated.read_text().replace("98", "97"))
    with pytest.raises(CheckpointError, match=r"its weights are at different steps \(97 to 98\)"):
        open_checkpoint(tmp_path / "h")
    stated.write_text(stated.read_text().replace("97", "{}"))
    with pytest.raises(CheckpointError, match=r"training.json: .*\{\} is not a size"):
        open_checkpoint(tmp_path / "h")
    stated.write_text("{}")
    with pytest.raises(CheckpointError, match=r"training.json: is not a training state: KeyError 'step'"):
        open_checkpoint(tmp_path / "h")
    with pytest.raises(ConversionError, match="v_proj.bias' have no place in family 'qwen2 of torchtitan'"):
        request = WriteRequest(tmp_path / "f", {}, tiny_model(attention_bias=True))
        get_format("torchtitan").destination(request)
