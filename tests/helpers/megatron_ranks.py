"""What each rank of megatron-core holds and saves in legacy folders, written and loaded by its code in one process.

Each rank is built in turn under a fake process group. A tensor of the whole model has values that follow from its name;
which part a parameter holds is what megatron-core's own `sharded_state_dict` says. Run as a program, it serves a whole
test session: `python -m tests.helpers.megatron_ranks write FOLDER` writes every case of CASES, and
`... check FOLDER NAME ...` loads folders that were exported and compares every parameter bit for bit.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.helpers.megatron import ON_CPU, patch_for_cpu
from tests.helpers.megatron_cases import CASES, ITERATION, VOCAB, Case, probe, whole
from tests.helpers.megatron_trained import Trained


@contextlib.contextmanager
def rank_of(case: Case, rank: int, world_size: int) -> Iterator[None]:
    """megatron-core's groups as `rank` sees them, without other processes."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(
        case.tp,
        case.pp,
        case.vpp if case.vpp > 1 else None,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.etp or case.tp,
        create_gloo_process_groups=False,
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build_chunks(case: Case) -> list[torch.nn.Module]:
    """The model chunks of the current rank, unfilled."""
    import torch.nn.functional as F
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    args = case.arguments()
    experts = getattr(args, "num_experts", None)
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu,
        activation_func=F.silu if args.swiglu else F.gelu,
        add_bias_linear=args.add_bias_linear,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=case.dtype,
        pipeline_dtype=case.dtype,
        bf16=case.dtype == torch.bfloat16,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        num_layers_in_first_pipeline_stage=getattr(args, "decoder_first_pipeline_num_layers", None),
        num_moe_experts=experts,
        moe_ffn_hidden_size=getattr(args, "moe_ffn_hidden_size", None),
        moe_router_topk=getattr(args, "moe_router_topk", 2),
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
        **ON_CPU,
    )
    spec = get_gpt_layer_local_spec(num_experts=experts, normalization=args.normalization)
    return [
        GPTModel(
            config,
            spec,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
            position_embedding_type=args.position_embedding_type,
            rotary_base=args.rotary_base,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            vp_stage=chunk if case.vpp > 1 else None,
        ).to(case.dtype)
        for chunk in range(case.vpp)
    ]


def parts(chunk: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name in the whole model, view of a parameter, the values that belong there), by megatron-core's own account."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    def tensors(found: Any) -> Iterator[ShardedTensor]:
        if isinstance(found, ShardedTensorFactory):
            yield from tensors(found.build())
        elif isinstance(found, ShardedTensor):
            yield found
        elif isinstance(found, dict):
            for value in found.values():
                yield from tensors(value)
        elif isinstance(found, list | tuple):
            for value in found:
                yield from tensors(value)

    for part in tensors(chunk.sharded_state_dict(metadata={"dp_cp_group": None})):
        values = whole(part.key, part.global_shape, dtype)
        index = tuple(slice(o, o + n) for o, n in zip(part.global_offset, _sizes(part), strict=True))
        yield part.key, part.data, values[index].reshape(part.data.shape)


def _sizes(part: Any) -> tuple[int, ...]:
    return (1,) * part.prepend_axis_num + tuple(part.local_shape)


def world_size_of(case: Case) -> int:
    width = max(case.tp, (case.etp or case.tp) * case.ep)
    return width * case.pp


def folder_of(case: Case | Trained, iteration: Path) -> Path:
    """The folder of the current rank, by Megatron-LM's rule (get_checkpoint_name)."""
    from megatron.core import parallel_state

    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if case.pp > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if case.ep > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return iteration / name


def state_of(chunk: torch.nn.Module, case: Case) -> dict[str, Any]:
    """What a chunk saves, by the names and in the storage of the case."""
    state: dict[str, Any] = dict(chunk.state_dict_for_save_checkpoint())
    if case.te:
        state = {te_name(name): value for name, value in state.items()}
    if case.flat:
        names = [name for name, value in state.items() if isinstance(value, torch.Tensor)][::-1]
        buffer = torch.cat([state[name].flatten() for name in names])
        start = 0
        for name in names:
            shape = state[name].shape
            state[name] = buffer[start : start + shape.numel()].view(shape)
            start += shape.numel()
    return state


def te_name(name: str) -> str:
    """The name that Transformer Engine's layers have for a parameter of a dense local layer."""
    name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    return name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")


def local_state(state: dict[str, Any]) -> dict[str, Any]:
    """A state with Transformer Engine's names as Megatron's own layers have it; their norms keep no scales of fp8."""
    kept = {name: value for name, value in state.items() if not name.endswith("norm._extra_state")}
    return {
        name.replace(".self_attention.linear_qkv.layer_norm_", ".input_layernorm.").replace(
            ".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."
        ): value
        for name, value in kept.items()
    }


def write_case(case: Case, root: Path) -> None:
    """Every rank's file, then the tracker."""
    size = world_size_of(case)
    for rank in range(size):
        with rank_of(case, rank, size):
            chunks = build_chunks(case)
            with torch.no_grad():
                for chunk in chunks:
                    for _, parameter, values in parts(chunk, case.dtype):
                        parameter.copy_(values)
            states = [state_of(chunk, case) for chunk in chunks]
            saved: dict[str, Any] = {"args": case.arguments(), "checkpoint_version": 3.0, "iteration": ITERATION}
            saved |= {f"model{i}": s for i, s in enumerate(states)} if case.vpp > 1 else {"model": states[0]}
            path = folder_of(case, root / f"iter_{ITERATION:07d}") / "model_optim_rng.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(saved, path)
            if size == 1:
                torch.save(logits(chunks[0]), root / "logits.pt")
    (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def logits(model: torch.nn.Module) -> torch.Tensor:
    """megatron-core's logits of the true vocabulary."""
    tokens = probe()
    length = tokens.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        found: torch.Tensor = model(tokens, torch.arange(length).expand_as(tokens), mask)[..., :VOCAB]
    return found


def check_case(case: Case, root: Path) -> None:
    """Loads every rank's file of a release strictly and compares all parameters, padding included, bit for bit."""
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "release"
    size = world_size_of(case)
    for rank in range(size):
        with rank_of(case, rank, size):
            chunks = build_chunks(case)
            path = folder_of(case, root / "release") / "model_optim_rng.pt"
            saved = torch.load(path, weights_only=False)
            assert (saved["checkpoint_version"], saved["iteration"]) == (3.0, 0)
            check_arguments(saved["args"], case)
            for index, chunk in enumerate(chunks):
                state = saved[f"model{index}" if case.vpp > 1 else "model"]
                chunk.load_state_dict(local_state(state), strict=True)
                for key, parameter, values in parts(chunk, case.dtype):
                    assert torch.equal(parameter, values), f"{path}: {key} differs"


def check_arguments(saved: Namespace, case: Case) -> None:
    """Asserts that exported arguments say what the case's own do, as far as these are given."""
    unsaid = {"iteration", "consumed_train_samples", "sequence_parallel", "rotary_base", "rotary_percent"}
    mine = {k: v for k, v in vars(case.arguments()).items() if k not in unsaid and not k.startswith("decoder_")}
    other = {k: (v, getattr(saved, k, None)) for k, v in mine.items() if getattr(saved, k, None) != v}
    assert not other, other


def main() -> None:
    """See the top of this file."""
    warnings.simplefilter("ignore")
    patch_for_cpu()
    verb, root, *names = sys.argv[1:]
    for name in names or CASES:
        (write_case if verb == "write" else check_case)(CASES[name], Path(root, name))


if __name__ == "__main__":
    main()
