"""Plans: every element once, every name accounted for, memory within the budget; decided before any I/O."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.cast import CastSource
from converters.copy import run_plan
from converters.formats.native import FORMAT as NATIVE
from converters.plan import make_plan
from tests.helpers.boxes import partitions, shapes
from tests.helpers.checkpoints import MemorySource, random_arrays
from tests.helpers.geometry import GeometrySource, geometry_request, large_model
from workbench.checkpoint.fingerprint import box_fingerprint, fingerprint
from workbench.errors import ConversionError, ResourceError
from workbench.spec.dtypes import NUMPY_NAMES
from workbench.spec.geometry import Box, LogicalTensor, coverage_fault
from workbench.spec.layout import ParallelLayout


class Cut(MemorySource):
    """A source in memory that says it lies in given boxes, and counts how often each element is read."""

    def __init__(self, tensor: LogicalTensor, array: np.ndarray, boxes: tuple[Box, ...]) -> None:
        super().__init__({tensor.name: tensor}, {tensor.name: array})
        self.boxes, self.reads = boxes, np.zeros(tensor.shape, int)

    def chunks(self, name: str) -> tuple[Box, ...]:
        return self.boxes

    def read(self, name: str, box: Box) -> np.ndarray:
        self.reads[box.slices] += 1
        return super().read(name, box)


class Sink:
    """A destination in memory that checks the order in which its boxes are filled."""

    def __init__(self, tensor: LogicalTensor, boxes: tuple[Box, ...], dim: int = 0) -> None:
        self.schema = {tensor.name: tensor}
        self.files = {"x": 1}
        self.pieces, self.dim = boxes, dim
        self.filled = {box: box.offset[dim] if box.offset else 0 for box in boxes}
        self.array = np.zeros(tensor.shape, NUMPY_NAMES[tensor.dtype])
        self.writes = np.zeros(tensor.shape, int)

    def boxes(self, name: str) -> tuple[tuple[str, Box], ...]:
        return tuple(("x", box) for box in self.pieces)

    def sweep(self, name: str) -> int:
        return self.dim

    def write(self, name: str, box: Box, array: np.ndarray) -> None:
        piece = next(piece for piece in self.pieces if piece.contains(box))
        if box.size:
            assert box.offset[self.dim] == self.filled[piece], "slabs of a piece come in order"
            self.filled[piece] = box.end[self.dim]
            others = [d for d in range(len(box.size)) if d != self.dim]
            assert all(box.size[d] == piece.size[d] for d in others), "slabs span the other dimensions"
        self.array[box.slices] = array
        self.writes[box.slices] += 1


@settings(max_examples=120, deadline=None)
@given(st.data(), st.integers(1, 40))
def test_a_plan_copies_each_element_once_between_any_two_partitions(data, slab_bytes):
    shape = data.draw(shapes())
    tensor = LogicalTensor("x", shape, "F32")
    array = random_arrays({"x": tensor})["x"]
    source = Cut(tensor, array, data.draw(partitions(shape)))
    sink = Sink(tensor, data.draw(partitions(shape)), data.draw(st.integers(0, max(0, len(shape) - 1))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("converters.plan._SLAB_BYTES", slab_bytes)
        patch.setattr("converters.plan._SPLIT_BYTES", 0)
        plan = make_plan(source, sink)
        assert plan.num_pieces == len(sink.pieces)
        assert coverage_fault(shape, [slab for sweep in plan.sweeps for slab in sweep.slabs(shape)]) is None
        found = run_plan(plan, source, sink, fingerprint=["x"])
    assert (source.reads == 1).all() and (sink.writes == 1).all()
    assert np.array_equal(sink.array, array)
    assert found == {"x": fingerprint(tensor, [box_fingerprint(tensor, Box.whole(shape), array)])}


def pair(shape: tuple[int, ...] = (8, 4), dtype: str = "F32") -> tuple[Cut, Sink]:
    tensor = LogicalTensor("x", shape, dtype)
    whole = (Box.whole(shape),)
    return Cut(tensor, random_arrays({"x": tensor})["x"], whole), Sink(tensor, whole)


def test_a_tensor_without_a_place_is_never_dropped_in_silence():
    source, sink = pair()
    extra = LogicalTensor("layers.9.extra", (2,), "F32")
    source._tensors = {**source.schema, extra.name: extra}
    with pytest.raises(ConversionError, match=r"1 tensors of the source have no place .*: layers\.9\.extra"):
        make_plan(source, sink)
    assert make_plan(source, sink, drops=[extra.name]).drops == (extra.name,)


def test_a_tensor_that_the_source_lacks_is_named():
    source, sink = pair()
    sink.schema["norm.weight"] = LogicalTensor("norm.weight", (2,), "F32")
    with pytest.raises(ConversionError, match=r"1 tensors are not in the source: norm\.weight"):
        make_plan(source, sink)


def test_another_shape_or_dtype_is_named_with_both():
    source, _ = pair()
    _, sink = pair((8, 5), "BF16")
    with pytest.raises(ConversionError, match=r"x is F32 \[8, 4\] in the source, BF16 \[8, 5\] in the destination"):
        make_plan(source, sink)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_boxes_that_do_not_cover_a_tensor_are_refused_with_the_count(side):
    source, sink = pair()
    half = (Box((0, 0), (4, 4)),)
    if side == "source":
        source.boxes = half
    else:
        sink.pieces = half
    with pytest.raises(ConversionError, match=rf"x: in the {side}, boxes hold 16 of 32 elements"):
        make_plan(source, sink)


def test_the_plan_keeps_to_its_memory_budget_or_says_what_it_needs():
    source, sink = pair((4096, 4096))
    roomy = make_plan(source, sink, budget_bytes=512 << 20)
    tight = make_plan(source, sink, budget_bytes=98 << 20)
    assert tight.peak_bytes <= 98 << 20 < roomy.peak_bytes <= 512 << 20
    with pytest.raises(ResourceError, match=r"budget of 1048576 bytes is too small for 2 workers; give at least \d+"):
        make_plan(source, sink, budget_bytes=1 << 20)


def test_a_large_tensor_is_shared_out_only_where_no_piece_is_cut():
    source, sink = pair((4096, 4096))
    sink.pieces = tuple(Box((at, 0), (1024, 4096)) for at in range(0, 4096, 1024))
    source.boxes = tuple(Box((at, 0), (2048, 4096)) for at in (0, 2048))
    plan = make_plan(source, sink)
    assert sorted((sweep.start, sweep.stop) for sweep in plan.sweeps) == [(0, 2048), (2048, 4096)]


def test_the_cost_of_a_plan_grows_with_its_pieces_and_no_faster():
    seconds, pieces, peaks = [], [], []
    for shrink in (64, 16):
        model = large_model(shrink)
        source = GeometrySource(model, ParallelLayout(tp=8, pp=2, dp=8, ep=8))
        request = geometry_request(source, model, ParallelLayout(tp=8, pp=1, dp=16, ep=16), Path("/nowhere/x"))
        tracemalloc.start()
        started = time.process_time()
        plan = make_plan(source, NATIVE.destination(request))
        seconds.append(time.process_time() - started)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        pieces.append(plan.num_pieces)
    assert pieces[0] > 15_000 and pieces[1] > 3.5 * pieces[0]
    assert seconds[1] / seconds[0] < 2 * pieces[1] / pieces[0]
    assert peaks[1] / pieces[1] < 400, "bytes a piece: 10^6 pieces fit into 500 MB"


def test_every_cost_of_a_plan_is_told():
    source, sink = pair((4096, 4096))
    told = make_plan(source, sink).describe()
    assert told["bytes"] == 4096 * 4096 * 4 and told["pieces"] == 1 and told["files"] == {"x": 1}
    assert told["peak_memory_bytes"] > 96 << 20 and told["estimated_seconds"] > 0


def test_a_failing_write_stops_the_copy_and_is_raised_as_it_is():
    source, sink = pair()
    plan = make_plan(source, sink)
    sink.write = lambda name, box, array: (_ for _ in ()).throw(ResourceError("disk full at x"))
    with pytest.raises(ResourceError, match="disk full at x"):
        run_plan(plan, source, sink)
    assert replace(plan, drops=("y",)).drops == ("y",)


def all_bf16() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def test_casting_bf16_up_and_down_again_changes_no_bit_but_quietens_nans():
    import torch

    from converters.cast import cast_array

    bits = all_bf16()
    wide = cast_array(bits, "BF16", "F32")
    assert np.array_equal(
        wide.view(np.uint32), torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy().view(np.uint32)
    )
    back = cast_array(wide, "F32", "BF16")
    finite = ~np.isnan(wide)
    assert np.array_equal(back[finite], bits[finite])
    assert np.isnan(cast_array(back, "BF16", "F32")[~finite]).all()


@pytest.mark.parametrize(("dtype", "name"), [("BF16", "bfloat16"), ("F16", "float16")])
def test_casting_rounds_to_nearest_even_as_torch_does(dtype, name):
    import torch

    from converters.cast import cast_array

    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, np.uint64).astype(np.uint32)
    ties = (rng.integers(0, 1 << 16, 1000).astype(np.uint32) << 16) | 0x8000
    array = np.concatenate([bits, ties]).view(np.float32)
    array = array[~np.isnan(array)]
    expected = torch.from_numpy(array.copy()).to(getattr(torch, name)).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(cast_array(array, "F32", dtype).view(np.uint16), expected)


def test_a_cast_that_overflows_names_the_tensor():
    tensor = LogicalTensor("w", (2,), "F32")
    source = MemorySource({"w": tensor}, {"w": np.array([1e30, 1.0], np.float32)})
    with pytest.raises(ConversionError, match="w: has values that are too large for F16; keep F32"):
        CastSource(source, "F16").read("w", Box.whole((2,)))
