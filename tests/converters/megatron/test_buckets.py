"""The flat buffers of the distributed optimizer: an independent simulation, and megatron-core's own buffers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converters.megatron.buckets import Bucket, FlatParameter, default_bucket_size, fill_buckets, fit_buckets, joined
from tests.helpers.megatron import patch_for_cpu
from workbench.errors import CheckpointError

PARAMETERS = st.lists(st.tuples(st.integers(1, 700), st.booleans()), min_size=1, max_size=12).map(
    lambda found: [FlatParameter(f"p{i}", numel, alone) for i, (numel, alone) in enumerate(found)]
)


def simulate(parameters: Sequence[FlatParameter], bucket_size: int | None) -> list[tuple[int, dict[str, int]]]:
    """Owner of every element of every bucket, written down one element after the other; then what lies where."""
    lines: list[list[str]] = [[]]
    for parameter in parameters[::-1]:
        while len(lines[-1]) % 64:
            lines[-1].append("room")
        if parameter.alone and any(owner != "room" for owner in lines[-1]):
            lines.append([])
        lines[-1] += [parameter.name] * parameter.numel
        if parameter.alone or (bucket_size is not None and len(lines[-1]) >= bucket_size):
            lines.append([])
    return [
        (len(line), {name: line.index(name) for name in dict.fromkeys(line) if name != "room"})
        for line in lines
        if line
    ]


@given(PARAMETERS, st.none() | st.integers(1, 2000))
def test_buckets_are_those_of_a_simulation_element_by_element(
    parameters: list[FlatParameter], bucket_size: int | None
) -> None:
    found = fill_buckets(parameters, bucket_size)
    assert [(bucket.numel, dict(bucket.starts)) for bucket in found] == simulate(parameters, bucket_size)


@given(PARAMETERS, st.none() | st.integers(1, 2000))
def test_buckets_are_found_again_from_their_sizes(parameters: list[FlatParameter], bucket_size: int | None) -> None:
    filled = fill_buckets(parameters, bucket_size)
    assert fit_buckets(parameters, [bucket.numel for bucket in filled], "here") == filled


@given(PARAMETERS, st.integers(1, 2000), st.data())
def test_a_wrong_size_of_a_bucket_is_refused_with_its_number_and_both_sizes(
    parameters: list[FlatParameter], bucket_size: int, data: st.DataObject
) -> None:
    sizes = [bucket.numel for bucket in fill_buckets(parameters, bucket_size)]
    wrong = data.draw(st.integers(0, len(sizes) - 1))
    sizes[wrong] += 64 * 1000
    with pytest.raises(CheckpointError, match=rf"rank 3: bucket {wrong} holds {sizes[wrong]} elements, but .*\d"):
        fit_buckets(parameters, sizes, "rank 3")


@given(PARAMETERS, st.integers(1, 2000))
def test_other_buckets_move_parameters_of_odd_sizes_only_and_then_the_buffer_has_another_size(
    parameters: list[FlatParameter], bucket_size: int
) -> None:
    one, several = (joined(fill_buckets(parameters, size)) for size in (None, bucket_size))
    assert (one.starts == several.starts) == (one.numel == several.numel)
    even = [replace(parameter, numel=64 * parameter.numel) for parameter in parameters]
    assert joined(fill_buckets(even, 64 * bucket_size)) == joined(fill_buckets(even, None))


@pytest.mark.parametrize("sizes", [[64], [448], [384, 64], [256, 100], [], [256, 128, 1]])
def test_sizes_that_leave_parameters_or_buckets_over_are_refused(sizes: list[int]) -> None:
    parameters = [FlatParameter("first", 128), FlatParameter("last", 256)]
    assert fit_buckets(parameters, [384], "rank 0") == (Bucket(384, {"last": 0, "first": 256}),)
    with pytest.raises(CheckpointError, match="rank 0: bucket"):
        fit_buckets(parameters, sizes, "rank 0")


def test_the_default_bucket_grows_with_the_replicas() -> None:
    assert [default_bucket_size(n) for n in (1, 40, 41, 512)] == [40_000_000, 40_000_000, 41_000_000, 512_000_000]


@given(PARAMETERS, st.none() | st.integers(1, 2000), st.sampled_from([1, 2, 3, 8]), st.booleans())
def test_buckets_are_those_of_megatron_core(
    parameters: list[FlatParameter], bucket_size: int | None, replicas: int, high_bandwidth: bool
) -> None:
    pytest.importorskip("megatron.core")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.distributed import DistributedDataParallelConfig, param_and_grad_buffer
    patch_for_cpu()
    group = SimpleNamespace(size=lambda: replicas, rank=lambda: 0)
    tensors = [torch.nn.Parameter(torch.zeros(p.numel, dtype=torch.bfloat16)) for p in parameters]
    names = {tensor: p.name for tensor, p in zip(tensors, parameters, strict=True)}
    for tensor, p in zip(tensors, parameters, strict=True):
        tensor.shared_embedding = p.alone
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, pad_buckets_for_high_nccl_busbw=high_bandwidth
    )
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1, rank=lambda: 0), dp_cp=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(param_and_grad_buffer, "log_on_each_pipeline_stage", lambda *_, **__: None)
        buffer = param_and_grad_buffer._ParamAndGradBuffer(
            config,
            torch.bfloat16,
            torch.float32,
            tensors,
            group,
            bucket_size,
            names,
            1.0,
            list(range(len(names))),
            False,
            groups,
        )
    found = fill_buckets(parameters, bucket_size)
    assert [bucket.numel for bucket in found] == [bucket.numel_unpadded for bucket in buffer.buckets]
    theirs: list[dict[str, int]] = [{} for _ in buffer.buckets]
    for tensor, (start, _, index) in buffer.param_index_map.items():
        theirs[index][names[tensor]] = start - buffer.buckets[index].offset
    assert [dict(bucket.starts) for bucket in found] == theirs
