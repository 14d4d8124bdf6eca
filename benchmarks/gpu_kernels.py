"""What the engine chooses on a GPU, against the other way and against the device's own limits; in bf16.

python benchmarks/gpu_kernels.py [--quick] [--json]

Times are medians over events of the device; errors are |found - true| / |true| (norms), the truth from float64.
--quick runs small shapes, on the CPU where there is no GPU: whether the script works, not how fast anything is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from _common import Claim, claim, main, say
from pretrain.adamw import AdamW
from pretrain.config import OptimTable
from workbench.models.attend import attend
from workbench.models.batch import Batch
from workbench.models.build import BuiltStage, build_stage
from workbench.models.scoring import Scoring
from workbench.parallel.chunked_loss import Chunking, chunked_loss
from workbench.parallel.fp8 import Fp8Gemm, Scaling, quantise
from workbench.parallel.grouped import grouped_product
from workbench.parallel.mesh import Mesh
from workbench.spec.execution import StageOptions
from workbench.spec.model import ModelConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Work = Callable[[], Any]


def milliseconds(work: Work, repeat: int = 15) -> float:
    """The median time of a call on the device."""
    for _ in range(3):
        work()
    if DEVICE.type == "cpu":
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * 1e3
    found = []
    for _ in range(repeat):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop))
    return statistics.median(found)


def normal(*shape: int, grad: bool = True, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad)


def both_ways(function: Callable[..., torch.Tensor], *inputs: torch.Tensor, weight: torch.Tensor | None = None) -> Work:
    """Forward and backward of a function, to its inputs and to a weight of its own."""
    with torch.no_grad():
        grad = torch.randn_like(function(*inputs))
    wanted = [one for one in (*inputs, weight) if one is not None and one.requires_grad]
    return lambda: torch.autograd.grad(function(*inputs), wanted, grad)


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found.double() - true.double()).norm() / true.double().norm())


def peak_mib(work: Work) -> float:
    """The most memory that a call adds."""
    if DEVICE.type == "cpu":
        work()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def stage(layers: int, tokens: int, quick: bool, **options: Any) -> tuple[BuiltStage, Batch]:
    """Layers of the width of Llama 3.2 3B, and a row for them."""
    hidden = 128 if quick else 3072
    model = ModelConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64 if quick else 24,
        num_key_value_heads=1 if quick else 8,
        max_position_embeddings=tokens,
    )
    built = build_stage(model, Mesh.single(DEVICE), compute_dtype=torch.bfloat16, options=StageOptions(**options))
    for parameter in built.parameters:
        parameter.data.normal_(0.0, 0.02)
    ids = torch.randint(0, 1024, (1, tokens), device=DEVICE)
    return built, Batch(ids, ids)


def limits(quick: bool) -> Iterator[Claim]:
    size = 256 if quick else 8192
    a, b = normal(size, size, grad=False), normal(size, size, grad=False)
    yield claim("bf16 product", 2 * size**3 / milliseconds(lambda: a @ b) / 1e9, unit="TFLOP/s", note=f"{size}^3")
    block = torch.empty((1 << 20) if quick else (1 << 31), dtype=torch.uint8, device=DEVICE)
    other = torch.empty_like(block)
    seconds = milliseconds(lambda: other.copy_(block)) / 1e3
    yield claim("copy on the device", 2 * block.numel() / seconds / 1e12, unit="TB/s", note="read and written")
    host = torch.empty((1 << 20) if quick else (1 << 30), dtype=torch.uint8, pin_memory=DEVICE.type == "cuda")
    part = block[: host.numel()]
    seconds = milliseconds(lambda: part.copy_(host, non_blocking=True), repeat=3) / 1e3
    yield claim("copy from pinned memory of the host", host.numel() / seconds / 1e9, unit="GB/s")


def norms(quick: bool) -> Iterator[Claim]:
    built, _ = stage(1, 64, quick)
    norm: Any = built.module.norm
    x, weight = normal(256 if quick else 8192, norm.weight.numel()), norm.weight
    ours = milliseconds(both_ways(norm, x, weight=weight))
    torchs = milliseconds(both_ways(lambda x, w: F.rms_norm(x, w.shape, w.to(x.dtype), 1e-5), x, weight))
    yield claim("rms norm, eager: F.rms_norm / the plain formula", torchs / ours, note=f"{ours:.3f} ms")
    compiled = milliseconds(both_ways(torch.compile(norm), x, weight=weight))
    yield claim("rms norm: compiled / the plain formula eager", compiled / ours, note=f"{compiled:.3f} ms")


def attention(quick: bool) -> Iterator[Claim]:
    batch, tokens, heads, shared, size = (1, 128, 4, 2, 16) if quick else (2, 4096, 24, 8, 128)
    q = normal(batch, tokens, heads, size)
    k, v = normal(batch, tokens, shared, size), normal(batch, tokens, shared, size)
    causal_flops = 3.5 * 2 * batch * heads * tokens**2 * size  # backward makes 2.5 times as many, the half is masked

    def repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (part.transpose(1, 2).repeat_interleave(heads // shared, dim=1) for part in (k, v))
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)

    def by(backend: SDPBackend) -> Callable[..., torch.Tensor]:
        def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend) if DEVICE.type == "cuda" else nullcontext():
                return attend(q, k, v)

        return attended

    with torch.no_grad():
        true = attend(*(part[:1, :1024].double() for part in (q, k, v)))
        found = attend(*(part[:1, :1024] for part in (q, k, v)))
        yield claim("grouped heads: error", error(found, true), at_most=2**-7, note="bf16 keeps 8 bits")
    ours = milliseconds(both_ways(attend, q, k, v))
    rate = causal_flops / ours / 1e9
    yield claim("attention as the engine calls it", rate, unit="TFLOP/s", note=f"{ours:.2f} ms, causal half counted")
    yield claim(
        "grouped heads: read in place / repeated",
        ours / milliseconds(both_ways(repeated, q, k, v)),
        note="time; below 1: reading in place wins",
    )
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        taken = milliseconds(both_ways(by(backend), q, k, v))
        yield claim(f"attention by {backend.name}", causal_flops / taken / 1e9, unit="TFLOP/s", note=f"{taken:.2f} ms")
    numbers = (torch.arange(tokens, device=DEVICE) // (tokens // 4)).expand(batch, -1)
    taken = milliseconds(both_ways(lambda q, k, v: attend(q, k, v, numbers), q, k, v), repeat=5)
    yield claim("documents apart / whole rows", taken / ours, unit="x the time", note="four documents a row")
    window = Scoring(window=tokens // 8)
    taken = milliseconds(both_ways(lambda q, k, v: attend(q, k, v, scoring=window), q, k, v), repeat=5)
    yield claim("window of an eighth / all tokens", taken / ours, unit="x the time")
    capped = Scoring(softcap=50.0)
    taken = milliseconds(both_ways(lambda q, k, v: attend(q, k, v, scoring=capped), q, k, v), repeat=5)
    yield claim("capped scores / plain ones", taken / ours, unit="x the time")


def experts(quick: bool) -> Iterator[Claim]:
    rows, count, inputs, outputs = (128, 4, 64, 32) if quick else (32768, 64, 2048, 1408)
    x, weight = normal(rows, inputs), normal(count, outputs, inputs)
    share = torch.rand(count, device=DEVICE).softmax(0)
    sizes = (share * rows).long()
    sizes[0] += rows - sizes.sum()

    def loop(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        parts = x.split(sizes.tolist())
        return torch.cat([F.linear(part, one) for part, one in zip(parts, weight.unbind(), strict=True)])

    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return grouped_product(x, weight, sizes)

    with torch.no_grad():
        yield claim("experts: error", error(ours(x, weight), loop(x.double(), weight.double())), at_most=2**-7)
    taken = milliseconds(both_ways(ours, x, weight))
    yield claim(
        "experts: all at once", 6 * rows * inputs * outputs / taken / 1e9, unit="TFLOP/s", note=f"{taken:.2f} ms"
    )
    yield claim("experts: one after another / all at once", milliseconds(both_ways(loop, x, weight)) / taken)


def rounded(x: torch.Tensor, *, rowwise: bool) -> torch.Tensor:
    """What a product in fp8 sees of an operand."""
    values, scale = quantise(x, torch.float8_e4m3fn, rowwise=rowwise)
    return values.double() * scale.double()


def fp8(quick: bool) -> Iterator[Claim]:
    rows, inputs, outputs = (64, 64, 32) if quick else (8192, 4096, 4096)
    x, weight = normal(rows, inputs), normal(outputs, inputs)
    plain = milliseconds(both_ways(F.linear, x, weight))
    scalings: tuple[Scaling, ...] = ("tensorwise", "rowwise")
    for scaling in scalings:
        gemm = Fp8Gemm(scaling)

        def product(x: torch.Tensor, weight: torch.Tensor, gemm: Fp8Gemm = gemm) -> torch.Tensor:
            return gemm.product(x, weight, None)

        with torch.no_grad():
            a, b = (rounded(part, rowwise=gemm.rowwise) for part in (x, weight))
            # bf16 keeps 8 bits of the result; products of rounded operands are summed in less than fp32.
            yield claim(
                f"fp8 {scaling}: error beside that of rounding", error(product(x, weight), a @ b.t()), at_most=2**-7
            )
        for name, function in (("eager", product), ("compiled", torch.compile(product))):
            taken = milliseconds(both_ways(function, x, weight))
            yield claim(f"bf16 / fp8 {scaling}, {name}", plain / taken, unit="x the speed", note=f"{taken:.2f} ms")


def head(quick: bool) -> Iterator[Claim]:
    tokens, vocabulary, hidden = (256, 512, 64) if quick else (8192, 128256, 3072)
    x, weight = normal(tokens, hidden), normal(vocabulary, hidden, dtype=torch.float32)
    weight = (weight.detach() * 0.02).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device=DEVICE)
    axis = Mesh.single(DEVICE).tp
    for compiled in (False, True):
        for chunk in (tokens, tokens // 8):
            how = Chunking(axis, vocabulary, chunk, compiled=compiled)

            def work(how: Chunking = how) -> None:
                torch.autograd.grad(chunked_loss(x, weight, None, labels, how), (x, weight))

            taken, peak = milliseconds(work, repeat=5), peak_mib(work)
            name = f"head of {vocabulary}, {chunk} tokens at once" + (", compiled" if compiled else "")
            flops = 6 * tokens * vocabulary * hidden / taken / 1e9
            yield claim(name, flops, unit="TFLOP/s", note=f"{taken:.1f} ms, {peak:.0f} MiB more")


def update(quick: bool) -> Iterator[Claim]:
    layers = 1 if quick else 8
    for name, values in (
        ("fp32 moments", {}),
        ("bf16 moments", {"moments": "bf16"}),
        ("moments in the host's memory", {"offload": True}),
    ):
        built, _ = stage(layers, 64, quick)
        count = sum(parameter.data.numel() for parameter in built.parameters)
        config = OptimTable.model_validate(values)
        rule = AdamW(built.parameters, config, weight_decay=0.1, seed=1)
        for parameter in built.parameters:
            parameter.parameter.grad = torch.randn_like(parameter.data)
        steps = iter(range(1, 1000))
        taken = milliseconds(lambda rule=rule, steps=steps: rule.update(1e-4, next(steps)), repeat=3)
        told = f"{taken:.1f} ms; reads 4 and writes 3 numbers of fp32 where all are here"
        yield claim(f"AdamW, {name}", 28 * count / taken / 1e9, unit="TB/s", note=told)
        del built, rule


def saved(quick: bool) -> Iterator[Claim]:
    """Time and memory of layers that save what they need, compute it again, or send it to the host."""
    tokens = 64 if quick else 8192
    for name, options in (
        ("nothing", {}),
        ("selective", {"recompute": "selective"}),
        ("full", {"recompute": "full"}),
        ("offload", {"offload": True}),
        ("compiled", {"compile_blocks": True}),
        ("compiled, full", {"compile_blocks": True, "recompute": "full"}),
    ):
        built, batch = stage(2, tokens, quick, **options)

        def work(built: BuiltStage = built, batch: Batch = batch) -> None:
            built.module(None, batch).backward()

        try:
            taken, peak = milliseconds(work, repeat=5), peak_mib(work)
        except Exception as fault:
            yield claim(f"two layers, saving by: {name}", 0.0, note=f"did not run: {fault}"[:200])
            continue
        yield claim(f"two layers, saving by: {name}", taken, unit="ms", note=f"{peak:.0f} MiB more at the peak")


def run(quick: bool) -> list[Claim]:
    if not quick and DEVICE.type == "cpu":
        raise SystemExit("there is no GPU; --quick tries the script on the CPU")
    torch.manual_seed(1)
    found: list[Claim] = []
    for part in (limits, norms, attention, experts, fp8, head, update, saved):
        for one in part(quick):
            found.append(one)
            say(f"{one.name}: {one.value:.4g} {one.unit} {one.note}")
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    main(run, description=__doc__ or "")
