"""The estimate of memory against what a step really keeps."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from pretrain.config import (
    BatchTable,
    EngineConfig,
    KernelsTable,
    OptimTable,
    ParallelTable,
    PrecisionTable,
    RecomputeTable,
    RunTable,
)
from pretrain.memory import BLOCKS, IN_BLOCKS, IN_ONE, UNDER_MASKS, estimate_memory
from pretrain.optimizer import Optimizer
from tests.helpers.allocations import Allocations
from tests.helpers.models import (
    answering_model,
    biased_model,
    gated_model,
    latent_model,
    masked_model,
    post_norm_model,
    sliding_model,
    sparse_model,
)
from tests.helpers.ranks import run_ranks
from workbench.models import attend, blockwise
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout

LARGER = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "max_position_embeddings": 128,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config(compute="fp32", **parallel) -> EngineConfig:
    return EngineConfig(
        run=RunTable(steps=1),
        batch=BatchTable(global_size=8, micro_size=2, seq_len=128),
        precision=PrecisionTable(compute=compute),
        parallel=ParallelTable(**parallel),
    )


@pytest.mark.parametrize(
    "make",
    [
        gated_model,
        biased_model,
        post_norm_model,
        sliding_model,
        sparse_model,
        latent_model,
        masked_model,
        answering_model,
    ],
)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_one_process_keeps_about_what_is_estimated(make, compute):
    model = make(**LARGER)
    built = build_stage(model, Mesh.single(), compute_dtype=DTYPES[compute])
    initialise(built.parameters, model, seed=1)
    own = {parameter.untyped_storage().data_ptr() for parameter in built.module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(2, 128, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answers = ids if model.num_encoder_layers else None
        built.module(None, Batch(input_ids=ids, labels=ids, decoder_ids=answers), "loss")
    real = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own)
    (found,) = estimate_memory(model, ParallelLayout(), config(compute))
    assert found.num_parameters == sum(parameter.numel() for parameter in built.module.parameters())
    estimated = found.activations + found.working
    assert real <= estimated <= 1.6 * real


@pytest.mark.parametrize("make", [gated_model, biased_model, post_norm_model, sliding_model, latent_model])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("chunk", [0, 32])
def test_the_peak_of_a_step_is_about_what_is_estimated_for_each_way_of_saving(make, compute, mode, chunk):
    """At least it and at most half more: temporary tensors of backward are only guessed."""
    model = make(**LARGER, num_hidden_layers=8)
    update = {"recompute": RecomputeTable(mode=mode), "kernels": KernelsTable(loss_chunk_tokens=chunk)}
    asked = config(compute).model_copy(update=update)
    built = build_stage(model, Mesh.single(), compute_dtype=DTYPES[compute], options=asked.stage_options("torch"))
    initialise(built.parameters, model, seed=1)
    for parameter in built.parameters:
        parameter.require_grad()
    ids = torch.zeros(2, 128, dtype=torch.int64)
    with Allocations() as seen:
        built.module(None, Batch(input_ids=ids, labels=ids)).backward()
    (found,) = estimate_memory(model, ParallelLayout(), asked)
    estimated = found.activations + found.working
    assert seen.peak_bytes <= estimated <= 1.5 * seen.peak_bytes


def test_recompute_and_offload_leave_one_layer_and_what_is_kept():
    model = gated_model(**LARGER, num_hidden_layers=32)
    (none,), (selective,), (full,), (offloaded,) = (
        estimate_memory(model, ParallelLayout(), config().model_copy(update={"recompute": RecomputeTable(**table)}))
        for table in ({}, {"mode": "selective"}, {"mode": "full"}, {"offload": True})
    )
    assert offloaded.activations < full.activations < selective.activations / 4 < none.activations / 4
    assert none.optimizer == offloaded.optimizer


def test_scores_count_at_the_lengths_at_which_a_cpu_keeps_them():
    model = gated_model(**LARGER)
    assert (IN_BLOCKS, IN_ONE, BLOCKS) == (blockwise.LONGEST, blockwise.WHOLE, blockwise.BLOCKS)
    assert UNDER_MASKS == attend.SCORED
    (on_cpu,) = estimate_memory(model, ParallelLayout(), config())
    (on_gpu,) = estimate_memory(model, ParallelLayout(), config(), on_cpu=False)
    assert on_cpu.activations > on_gpu.activations
    assert on_cpu.optimizer == on_gpu.optimizer


def test_tensor_parallelism_divides_what_it_cuts():
    model = gated_model(**LARGER)
    (whole,) = estimate_memory(model, ParallelLayout(), config())
    (half,) = estimate_memory(model, ParallelLayout(tp=2), config())
    assert 0.5 * whole.optimizer <= half.optimizer < 0.6 * whole.optimizer
    assert 0.5 * whole.activations < half.activations < 0.8 * whole.activations


def test_1f1b_keeps_fewer_microbatches_than_gpipe():
    model, layout = gated_model(**LARGER), ParallelLayout(pp=2)
    flushed = estimate_memory(model, layout, config(schedule="gpipe"))
    eager = estimate_memory(model, layout, config(schedule="1f1b"))
    assert eager[0].activations == flushed[0].activations / 2  # 2 of 4 microbatches
    assert eager[0].optimizer == flushed[0].optimizer


def test_sharding_divides_the_state_and_not_the_activations():
    model = gated_model(**LARGER)
    (whole,) = estimate_memory(model, ParallelLayout(dp=4), config())
    (cut,) = estimate_memory(model, ParallelLayout(dp=4, shard="zero3"), config())
    assert cut.optimizer == pytest.approx(whole.optimizer / 4, rel=0.01)
    assert cut.gradients == pytest.approx(whole.gradients / 4, rel=0.01)
    assert cut.activations == whole.activations


def test_chunks_count_as_parts_of_a_stage():
    model = gated_model(**LARGER, num_hidden_layers=8)
    one = estimate_memory(model, ParallelLayout(pp=2), config(schedule="1f1b"))
    vee = estimate_memory(model, ParallelLayout(pp=2, vpp=2, placement="vee"), config(schedule="zbv", vpp=2))
    looped = estimate_memory(model, ParallelLayout(pp=2, vpp=2), config(schedule="interleaved", vpp=2))
    assert vee[1].activations == one[0].activations  # 4 chunks are 2 stages of 4 layers
    assert looped[0].activations == one[0].activations * 5 / 4  # 5 chunks


def test_gpipe_keeps_the_softmax_of_every_microbatch():
    model, layout = gated_model(**LARGER), ParallelLayout(pp=2)
    flushed = estimate_memory(model, layout, config(schedule="gpipe"))[1].activations
    eager = estimate_memory(model, layout, config(schedule="1f1b"))[1].activations
    layers = estimate_memory(model, layout, config(schedule="gpipe"))[0].activations
    assert flushed - layers > eager - layers / 4


ADAMW, MUON = OptimTable(), OptimTable(name="muon")
BF16 = OptimTable(moments="bf16")


def held_bytes(layout, optim):
    """Bytes of parameters, of gradients between two microbatches and after the last, and of moments on this rank."""
    model, mesh = biased_model(), Mesh.create(ParallelLayout(**layout), torch.device("cpu"))
    built = build_stage(model, mesh)
    initialise(built.parameters, model, seed=1)
    optimizer = Optimizer(built.parameters, mesh, optim)
    at_rest = sum(parameter.data.nbytes for parameter in built.parameters)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    gradients = []
    for last in (False, True):
        built.data_parallel.before_backward(last=last)
        built.module(None, Batch(ids, ids), "loss").backward()
        whole = {id(parameter): parameter.grad for parameter in built.module.parameters()}
        shares = {id(parameter.parameter): parameter.parameter.grad for parameter in built.parameters}
        held = [grad for grad in (whole | shares).values() if grad is not None]
        gradients.append(sum((grad.to_local() if isinstance(grad, DTensor) else grad).nbytes for grad in held))
    moments = [moment for values in optimizer.moments().values() for moment in values.values()]
    return at_rest, *gradients, sum(moment.nbytes for moment in moments)


@pytest.mark.parametrize("shard", ["none", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("optim", [ADAMW, MUON, BF16], ids=["adamw", "muon", "bf16"])
def test_each_way_of_sharding_holds_what_is_estimated(shard, optim):
    layout = {"dp": 2, "shard": shard}
    settings = config().model_copy(update={"optim": optim})
    (found,) = estimate_memory(biased_model(), ParallelLayout(**layout), settings)
    parameters, accumulating, summed, moments = run_ranks(2, held_bytes, layout, optim)[0]
    assert (parameters, accumulating, moments) == (found.parameters, found.gradients, found.optimizer)
    assert summed == parameters  # in the end each rank holds the gradient of what it holds
    whole = 4 * found.num_parameters
    assert (parameters == whole, accumulating == whole) == (shard == "none", shard in ("none", "zero1"))


def test_offloaded_moments_are_counted_where_they_lie():
    settings = config().model_copy(update={"optim": OptimTable(offload=True)})
    (gpu,) = estimate_memory(biased_model(), ParallelLayout(), settings, on_cpu=False)
    (cpu,) = estimate_memory(biased_model(), ParallelLayout(), settings)
    assert (gpu.optimizer, cpu.host) == (0, 0)
    assert gpu.host == cpu.optimizer == 8 * cpu.num_parameters
    assert cpu.total - gpu.total >= cpu.optimizer
