"""Checkpoints that megatron-core writes on this CPU, and what it makes of ours, for tests of both directions.

`write_all` starts one process with four gloo ranks that write every fixture and compute its logits; `load_all` one that
loads folders into a model of one rank. The value of each parameter is a function of its global name and place alone, so
a model of another layout can be given the same weights (`fill_by_name`). Run as a module, because megatron-core's own
writer starts processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.megatron import gpt_model, patch_for_cpu, shared_words
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

RANKS = 4
ITERATION = 7
PROBE = (3, 17, 88, 0, 41, 5, 60, 60, 12, 7)
"""The words that logits are computed of."""


@dataclass(frozen=True)
class Fixture:
    """A checkpoint to write. model, layout: fields of ModelConfig and ParallelLayout; dp is what ranks are left.

    format: torch (a file for each model-parallel rank) or torch_dist. optimizer: none. overrides: more fields of
    megatron-core's configuration; arguments: of the training arguments that are saved. apart: every layer, expert and
    half has a name of its own (singleton_local_shards).
    """

    name: str
    model: Mapping[str, Any]
    layout: Mapping[str, Any]
    format: str = "torch_dist"
    optimizer: str = "none"
    dtype: str = "float32"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    apart: bool = False

    @property
    def features(self) -> ModelConfig:
        return ModelConfig.model_validate(self.model)

    @property
    def degrees(self) -> ParallelLayout:
        given = ParallelLayout.model_validate(self.layout)
        return given.model_copy(update={"dp": RANKS // given.tp // given.pp})

    @property
    def padded_vocab(self) -> int:
        multiple = self.degrees.vocab_multiple * self.degrees.tp
        return -(-self.features.vocab_size // multiple) * multiple


def write_all(fixtures: Sequence[Fixture], folder: Path) -> dict[str, Path]:
    """Writes every fixture into a folder of its name, with its logits beside that; those folders."""
    _run("write", fixtures, folder)
    return {fixture.name: folder / fixture.name for fixture in fixtures}


def load_all(fixtures: Sequence[Fixture], folder: Path) -> None:
    """Loads each fixture's release in `folder` strictly into a model of one rank; AssertionError where a weight is not
    that of the fixture."""
    _run("load", fixtures, folder)


def logits_of(folder: Path) -> torch.Tensor:
    """megatron-core's logits of `PROBE`, padding included, by the weights of a fixture that was written to `folder`."""
    found: torch.Tensor = torch.load(folder.with_suffix(".pt"))
    return found


def _run(what: str, fixtures: Sequence[Fixture], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    order = folder / f"{what}.json"
    order.write_text(json.dumps([asdict(fixture) for fixture in fixtures]))
    log = folder / f"{what}.log"
    with log.open("w") as lines:  # not a pipe: workers of a rank that died would keep it open
        done = subprocess.run(
            [sys.executable, "-m", "tests.helpers.megatron_writer", what, str(order)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=lines,
            stderr=subprocess.STDOUT,
            timeout=240,
        )
    assert done.returncode == 0, log.read_text()[-8000:]


def value_of(name: str, shape: Sequence[int]) -> torch.Tensor:
    """The whole tensor of this global name: random, norms about one, biases and the rest about zero."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    noise = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    is_scale = "norm" in name and name.endswith("weight")
    return 1 + 0.2 * noise if is_scale else 0.05 * noise


def fill_by_name(chunks: Sequence[torch.nn.Module]) -> None:
    """Gives every parameter of a rank's chunks its share of `value_of` its global tensor."""
    for tensor in (t for chunk in chunks for t in sharded_tensors(chunk)):
        whole = value_of(tensor.key, tensor.global_shape)
        share = tuple(slice(o, o + s) for o, s in zip(tensor.global_offset, _with_ones(tensor), strict=True))
        with torch.no_grad():
            tensor.data.copy_(whole[share].reshape(tensor.data.shape))


def sharded_tensors(chunk: torch.nn.Module) -> Iterator[Any]:
    """megatron-core's ShardedTensors of a chunk, each a view of (a part of) a parameter."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = chunk.sharded_state_dict()
    apply_factories(state)
    yield from (value for value in _leaves(state) if isinstance(value, ShardedTensor))


def _with_ones(tensor: Any) -> tuple[int, ...]:
    """The size of a rank's share in the global tensor, which may have leading dimensions for layers and experts."""
    return (*(1 for _ in range(tensor.prepend_axis_num)), *tensor.local_shape)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _leaves(value)
    else:
        yield tree


def training_arguments(fixture: Fixture) -> argparse.Namespace:
    """The arguments as Megatron's training script would have saved them: those of the model, and others."""
    from megatron.core.transformer.enums import AttnBackend

    model, layout, moe = fixture.features, fixture.degrees, fixture.features.moe
    gelu = not model.gated_mlp
    said: dict[str, Any] = {
        **shared_words(model, layout),
        "encoder_num_layers": model.num_hidden_layers,
        "group_query_attention": model.num_key_value_heads != model.num_attention_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "seq_length": 32,
        "position_embedding_type": "rope" if model.position_embedding == "rope" else "learned_absolute",
        "add_position_embedding": True,
        "rotary_base": int(model.rope_theta),
        "rotary_percent": model.partial_rotary_factor,
        "rotary_interleaved": False,
        "use_rope_scaling": model.rope_scaling is not None,
        "rope_scaling_factor": model.rope_scaling.factor if model.rope_scaling else 8.0,
        "swiglu": model.gated_mlp,
        "openai_gelu": gelu and model.hidden_act == "gelu_tanh",
        "bias_gelu_fusion": False,
        "bias_swiglu_fusion": True,
        "norm_epsilon": model.norm_eps,
        "apply_layernorm_1p": False,
        "untie_embeddings_and_output_weights": not model.tie_word_embeddings,
        "init_method_std": 0.02,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": fixture.padded_vocab,
        "make_vocab_size_divisible_by": layout.vocab_multiple,
        "data_parallel_size": layout.dp,
        "world_size": RANKS,
        "sequence_parallel": False,
        "num_experts": None,
        "multi_latent_attention": False,
        "params_dtype": getattr(torch, fixture.dtype),
        "attention_backend": AttnBackend.auto,
        "consumed_train_samples": 112,
        "iteration": ITERATION,
        "global_batch_size": 16,
        "lr": 3e-4,
        "rank": 0,
        "seed": 1234,
        "tokenizer_type": "NullTokenizer",
        "transformer_impl": "local",
    }
    if moe is not None:
        said |= {
            "num_experts": moe.num_experts,
            "moe_router_bias_update_rate": moe.bias_update_rate,
            "moe_aux_loss_coeff": 0.0,
            "moe_grouped_gemm": False,
        }
    return argparse.Namespace(**{**said, **fixture.arguments})


def save(fixture: Fixture, root: Path) -> None:
    """Writes one fixture from every rank, as Megatron's save_checkpoint lays it out."""
    from megatron.core import dist_checkpointing, parallel_state

    layout, model = fixture.degrees, fixture.features
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
    )
    indices = [None] if layout.vpp == 1 else list(range(layout.vpp))
    chunks = [
        gpt_model(
            model,
            getattr(torch, fixture.dtype),
            layout=layout,
            padded_vocab=fixture.padded_vocab,
            chunk=index,
            overrides=fixture.overrides,
        )
        for index in indices
    ]
    fill_by_name(chunks)
    common = {"args": training_arguments(fixture), "checkpoint_version": 3.0, "iteration": ITERATION}
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    folder = root / f"iter_{ITERATION:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    if fixture.format == "torch_dist":
        told = {"singleton_local_shards": fixture.apart}
        states = {n: chunk.sharded_state_dict(metadata=dict(told)) for n, chunk in zip(names, chunks, strict=True)}
        dist_checkpointing.save({**common, **states}, str(folder), content_metadata=told)
    elif parallel_state.get_expert_data_parallel_rank() == 0:
        at = [parallel_state.get_tensor_model_parallel_rank()]
        tag = f"mp_rank_{at[0]:02d}"
        if layout.pp > 1:
            tag += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
        if layout.ep > 1:
            tag += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
        (folder / tag).mkdir()
        states = {n: chunk.state_dict_for_save_checkpoint() for n, chunk in zip(names, chunks, strict=True)}
        torch.save({**common, **states}, folder / tag / "model_optim_rng.pt")
    if dist.get_rank() == 0:
        (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    dist.barrier()
    parallel_state.destroy_model_parallel()


def _logits(fixture: Fixture, folder: Path) -> None:
    """Saves what a model of one rank with the fixture's weights says to `PROBE`."""
    gpt = _whole(fixture)
    fill_by_name([gpt])
    tokens = torch.tensor([PROBE])
    positions = torch.arange(tokens.shape[1])[None]
    masked = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        torch.save(gpt.eval()(tokens, positions, masked)[0], folder.with_suffix(".pt"))


def _whole(fixture: Fixture) -> torch.nn.Module:
    """The fixture's model on one rank."""
    return gpt_model(fixture.features, padded_vocab=fixture.padded_vocab, overrides=fixture.overrides)


def _load(fixture: Fixture, folder: Path) -> None:
    """Loads a release as Megatron does, into a model whose weights were others."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    gpt = _whole(fixture)
    fill_by_name([gpt])
    expected = {name: value.clone() for name, value in gpt.named_parameters()}
    for parameter in gpt.parameters():
        parameter.data.zero_()
    state = gpt.sharded_state_dict()
    for name, tensor in state.items():
        if ".pre_mlp_layernorm." in name and f"{name.split('.pre_mlp')[0]}.mlp.router.weight" in state:
            # Transformer Engine's name: that of Megatron's own layers is another (PR 6270 of Megatron-LM).
            tensor.key = tensor.key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    found, missing, unexpected = dist_checkpointing.load(
        {"model": state}, str(folder / "release"), strict=StrictHandling.RETURN_ALL
    )
    others = {name for name in missing if "_extra_state" not in name}  # of modules of Transformer Engine alone
    assert not others and not unexpected, (fixture.name, others, unexpected)
    assert found["args"].num_layers == fixture.features.num_hidden_layers
    gpt.load_state_dict(found["model"])
    for name, value in gpt.named_parameters():
        rows = fixture.features.vocab_size if value.shape[0] == fixture.padded_vocab else None
        assert torch.equal(value[:rows], expected[name][:rows]), (fixture.name, name)


def _rank(rank: int, what: str, order: Path, world_size: int) -> None:
    from megatron.core import parallel_state

    patch_for_cpu()
    store = dist.FileStore(str(order.with_name(f"{what}.store")), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    fixtures = [Fixture(**given) for given in json.loads(order.read_text())]
    for fixture in fixtures if what == "write" else ():
        save(fixture, order.parent / fixture.name)
    parallel_state.initialize_model_parallel()
    for fixture in fixtures[rank::world_size]:
        (_logits if what == "write" else _load)(fixture, order.parent / fixture.name)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Forks the ranks, with everything imported, and waits for them."""
    patch_for_cpu()

    what, order = sys.argv[1], Path(sys.argv[2])
    world_size = RANKS if what == "write" else 1
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            try:
                _rank(rank, what, order, world_size)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:  # the others would wait for it
            for other in children:
                os.kill(other, signal.SIGKILL)
            raise SystemExit(1)


if __name__ == "__main__":
    main()
