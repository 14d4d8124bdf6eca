"""The program behind `megatron_trained`: trains with megatron-core on a CPU and saves, or loads, and tells the state.

    python -m tests.helpers.megatron_training '{"OUT": {"tp": 2, "pp": 2}}'

starts tp x pp x dp ranks for each folder OUT.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.helpers.megatron import ON_CPU, patch_for_cpu
from tests.helpers.megatron_ranks import folder_of, local_state
from tests.helpers.megatron_trained import ADAM, KINDS, SCHEDULER, SIZES, STEPS, TOKENS, Trained


def _start(out: str, what: Trained) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (what, out, f"file://{folder}/store"), nprocs=what.world, start_method="fork")


def _rank(rank: int, what: Trained, out: str, store: str) -> None:
    from megatron.core import parallel_state

    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=what.world)
    parallel_state.initialize_model_parallel(
        what.tp,
        what.pp,
        None if what.vpp == 1 else what.vpp,
        expert_model_parallel_size=what.ep,
        create_gloo_process_groups=True,
    )
    if what.load:
        _load(Path(out), what, Path(what.load))
    for distributed in (True, False) if not what.load else ():
        modes = [mode for mode in what.modes if mode.startswith("plain") != distributed]
        if modes:
            _train_and_save(Path(out), what, modes, distributed=distributed)
    dist.barrier()
    dist.destroy_process_group()


def _train_and_save(out: Path, what: Trained, modes: list[str], *, distributed: bool) -> None:
    chunks, optimizer = build(what, distributed=distributed)
    for _ in range(STEPS):
        _step(chunks, optimizer)
    for mode in modes:
        _save(out, what, chunks, optimizer, mode)
    _save_truth(out / ("truth" if distributed else "truth-plain"), chunks, optimizer, distributed=distributed)


def _save(out: Path, what: Trained, chunks: list[Any], optimizer: Any, mode: str) -> None:
    from megatron.core import dist_checkpointing

    folder = out / mode / f"iter_{STEPS:07d}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        (out / mode / "latest_checkpointed_iteration.txt").write_text(str(STEPS))
    dist.barrier()
    if mode.endswith("legacy"):
        _save_legacy(folder, what, chunks, optimizer, distributed=mode == "legacy")
    else:
        metadata = content_metadata(mode)
        state = sharded_state(what, chunks, optimizer, metadata)
        dist_checkpointing.save(state, str(folder), ("torch_dist", 1), content_metadata=metadata)


def _load(out: Path, what: Trained, folder: Path) -> None:
    sharded = (folder / "metadata.json").is_file()
    distributed = sharded or any(folder.glob("*/distrib_optim.pt"))
    chunks, optimizer = build(what, distributed=distributed)
    _step(chunks, optimizer)  # torch's AdamW has no state to be loaded into before
    found = _read_dist(what, chunks, optimizer, folder) if sharded else _read_legacy(what, folder, distributed)
    for index, chunk in enumerate(chunks):
        chunk.module.load_state_dict(found["model" if len(chunks) == 1 else f"model{index}"])
    optimizer.load_state_dict(found["optimizer"])
    if distributed and not sharded:
        with torch.no_grad():  # without which it cannot fill 32-bit weights, of which its masters are views
            optimizer.load_parameter_state(str(folder_of(what, folder) / "distrib_optim.pt"))
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        halves = optimizer.chained_optimizers if what.dtype == "float16" else ()
        scalers = [one.grad_scaler.state_dict() for one in halves]
        torch.save({"groups": groups, "scalers": scalers}, out / "plain.pt")
    dist.barrier()
    if what.again:
        _save(out, what, chunks, optimizer, what.again)
    _save_truth(out / ("truth" if distributed else "truth-plain"), chunks, optimizer, distributed=distributed)


def _read_dist(what: Trained, chunks: list[Any], optimizer: Any, folder: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    metadata = content_metadata("fully_reshardable")
    wanted = sharded_state(what, chunks, optimizer, metadata, is_loading=True)
    found: dict[str, Any] = dist_checkpointing.load(wanted, str(folder))
    return found


def _read_legacy(what: Trained, folder: Path, distributed: bool) -> dict[str, Any]:
    """What a rank finds in its folder, by the names of Megatron's own layers."""
    found: dict[str, Any] = torch.load(folder_of(what, folder) / "model_optim_rng.pt", weights_only=False)
    optimizers = found["optimizer"] if isinstance(found["optimizer"], list) else [found["optimizer"]]
    for state in (
        () if distributed else (state for optimizer in optimizers for state in (optimizer, optimizer["optimizer"]))
    ):
        # torch's AdamW counts the steps of each parameter, Transformer Engine's those of a group.
        state["state"]["common_step"] = torch.tensor(float(state["param_groups"][0]["step"]))
    if found["args"].transformer_impl == "local":
        return found
    models = {name: local_state(state) for name, state in found.items() if name.startswith("model")}
    return {**found, **models}


def content_metadata(mode: str) -> dict[str, Any]:
    """What Megatron's training program asks of `sharded_state_dict` for this mode."""
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    return metadata if mode == "plain" else {**metadata, "distrib_optim_sharding_type": mode}


def sharded_state(
    what: Trained, chunks: list[Any], optimizer: Any, metadata: dict[str, Any], *, is_loading: bool = False
) -> dict[str, Any]:
    """The state dict of a torch_dist checkpoint, as Megatron's training program makes it."""
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    model = {
        name: chunk.module.sharded_state_dict(metadata=metadata) for name, chunk in zip(names, chunks, strict=True)
    }
    return {
        "args": what.arguments,
        "checkpoint_version": 3.0,
        "iteration": STEPS,
        **model,
        "optimizer": optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
        "opt_param_scheduler": dict(SCHEDULER),
        "num_floating_point_operations_so_far": 0,
    }


def build(what: Trained, *, distributed: bool) -> tuple[list[Any], Any]:
    """Model chunks in megatron-core's data parallelism, and the optimizer. Each norm has its own values."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = _config(what)
    options = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=what.bucket_size is not None,
        bucket_size=what.bucket_size,
        grad_reduce_in_fp32=True,
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage * 100)
    chunks = [
        DistributedDataParallel(config, options, _gpt(what, config, chunk), disable_bucketing=chunk > 0)
        for chunk in range(what.vpp)
    ]
    dtype = getattr(torch, what.dtype)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            **ADAM,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
        ),
        chunks,
    )
    return chunks, optimizer


def _config(what: Trained) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = getattr(torch, what.dtype)
    sizes = {name: size for name, size in what.sizes.items() if name != "padded_vocab_size"}
    return TransformerConfig(
        **sizes,
        tensor_model_parallel_size=what.tp,
        pipeline_model_parallel_size=what.pp,
        virtual_pipeline_model_parallel_size=None if what.vpp == 1 else what.vpp,
        expert_model_parallel_size=what.ep,
        num_moe_experts=what.experts or None,
        moe_router_topk=2,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=what.biases,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        **ON_CPU,
    )


def _gpt(what: Trained, config: Any, chunk: int) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    vp = {} if what.vpp == 1 else {"vp_stage": chunk}
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm", num_experts=what.experts or None),
        vocab_size=what.sizes["padded_vocab_size"],
        max_sequence_length=TOKENS,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **vp),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **vp),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=what.tied,
        **vp,
    ).to(getattr(torch, what.dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def _step(chunks: list[Any], optimizer: Any) -> None:
    """An update by gradients that no two elements share; replicas have equal ones, as after the reduction."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
        for name, parameter in chunk.module.named_parameters():
            name = "embedding.word_embeddings.weight" if getattr(parameter, "shared_embedding", False) else name
            _, tp_rank, ep_rank = _at()
            seed = sum(map(ord, name))
            seed += 1009 * tp_rank if getattr(parameter, "tensor_model_parallel", False) else 0
            seed += 9973 * ep_rank if "local_experts" in name else 0
            generator = torch.Generator().manual_seed(seed)
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator) * 1e-3)
    optimizer.step()


def _at() -> tuple[int, int, int]:
    """Stage, tensor rank and expert rank of this process."""
    from megatron.core import parallel_state

    return (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
    )


def _is_saver() -> bool:
    """Whether this process saves what all of its replicas hold."""
    from megatron.core import parallel_state

    return bool(parallel_state.get_expert_data_parallel_rank() == 0)


def _save_legacy(folder: Path, what: Trained, chunks: list[Any], optimizer: Any, *, distributed: bool) -> None:
    rank = folder_of(what, folder)
    rank.mkdir(exist_ok=True)
    if distributed:
        optimizer.save_parameter_state(str(rank / "distrib_optim.pt"))
    if not _is_saver():
        return
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    state = {
        "args": what.arguments,
        "checkpoint_version": 3.0,
        "iteration": STEPS,
        **{name: chunk.module.state_dict_for_save_checkpoint() for name, chunk in zip(names, chunks, strict=True)},
        "optimizer": optimizer.state_dict(),
        "opt_param_scheduler": dict(SCHEDULER),
    }
    torch.save(state, rank / "model_optim_rng.pt")


def _save_truth(out: Path, chunks: list[Any], optimizer: Any, *, distributed: bool) -> None:
    out.mkdir(exist_ok=True)
    truth: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in KINDS}
    for index, chunk in enumerate(chunks):
        for name, parameter in chunk.module.named_parameters():
            found = _gathered(optimizer, parameter) if distributed else _whole(optimizer, parameter)
            for kind in KINDS:
                truth[kind][f"{index}/{name}"] = found[kind].reshape(parameter.shape)
    if _is_saver():
        torch.save(truth, out / "{}-{}-{}.pt".format(*_at()))


def _gathered(optimizer: Any, parameter: Any) -> dict[str, torch.Tensor]:
    """Master weight and moments of a parameter, joined over the replicas that share them out. Collective."""
    one = next(o for o in optimizer.chained_optimizers if any(parameter in b.param_index_map for b in o.buffers))
    mine = None
    if parameter in one.model_param_gbuf_map:
        part = one._get_model_param_range_map(parameter)["param"]
        mine = (part.start, {k: v.detach() for k, v in one._get_main_param_and_optimizer_states(parameter).items()})
    parts: list[Any] = [None] * one.data_parallel_group.size()
    dist.all_gather_object(parts, mine, group=one.data_parallel_group)
    parts = sorted((part for part in parts if part is not None), key=lambda part: part[0])
    return {kind: torch.cat([part[1][kind] for part in parts]) for kind in KINDS}


def _whole(optimizer: Any, parameter: Any) -> dict[str, torch.Tensor]:
    """Master weight and moments of a parameter where each replica has all of them."""
    main = getattr(parameter, "main_param", parameter)
    one = next(o for o in optimizer.chained_optimizers if main in o.optimizer.state)
    return {"param": main.detach(), **{kind: one.optimizer.state[main][kind] for kind in KINDS[1:]}}


def patch_optimizers_for_cpu() -> None:
    """What megatron-core's optimizers need besides `patch_for_cpu`, in a process that does nothing else."""
    plain_type = torch.Tensor.type

    def type_(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        found = plain_type(self, *arguments, **options)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    def on_cpu(make: Any) -> Any:
        def made(*arguments: Any, **options: Any) -> Any:
            if str(options.get("device", "")).startswith("cuda"):
                options["device"] = "cpu"
            return make(*arguments, **options)

        return made

    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    plain_set = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        # `fully_reshardable` does not restore the step, which torch's AdamW has and Transformer Engine's has not.
        held = self._get_main_param_and_optimizer_states(parameter)
        plain_set(self, parameter, {"step": held["step"], **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    torch.Tensor.type = type_  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    for name in ("tensor", "zeros", "empty", "ones", "full"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    patch_for_cpu()
    # Before ranks are forked, so that each need not import them again.
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer  # noqa: F401

    patch_optimizers_for_cpu()
    for out, what in json.loads(sys.argv[1]).items():
        _start(out, Trained(**{"sizes": SIZES, **what}))


if __name__ == "__main__":
    _main()
