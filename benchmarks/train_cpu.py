"""Tokens per second of a whole training step on a CPU, against transformers and megatron-core.

One process, two threads; forward, backward and fused AdamW of a Llama-like model (8 x 512, sequence 512, batch 4)
that starts from the same weights everywhere. bf16 means bf16 compute over fp32 masters: the engine casts where it
computes; megatron-core and transformers hold bf16 parameters beside fp32 masters, and transformers runs under autocast
too, the faster of the two counting. The ceiling is the time of the step's matrix products alone, made as `wb pretrain`
lets torch make them (`quicken_products`); as torch makes them by itself, and for the peers, is told beside it.
Everything is measured in turn, A B C A B C, and compared by the medians of the ratios within a round. The C library
keeps freed memory, as the engine's trainer tells it to; as all run in one process, that serves the peers as well. The
engine then runs on two ranks of one thread each, cut by tensors and by stages, beside one process on both threads.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import nn

from _common import Claim, alternate, claim, main, median_ratio, say, seconds_of
from _train_ranks import measure as on_ranks
from _train_ranks import quickened
from tests.helpers import megatron
from tests.helpers.ranks import RankPool
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.models.state import stored_boxes
from workbench.parallel.host_memory import keep_freed_memory
from workbench.parallel.mesh import Mesh
from workbench.spec.execution import StageOptions
from workbench.spec.model import ModelConfig

THREADS = 2
MEGATRON = find_spec("megatron") is not None
CEILING_BARS = {torch.float32: 0.75, torch.bfloat16: 0.6}
SAME_LOSS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
Step = Callable[[], float]


@dataclass(frozen=True)
class Task:
    """What is trained on: a model's features, its first weights by logical name, and one batch of equally long rows."""

    model: ModelConfig
    weights: dict[str, torch.Tensor]
    input_ids: torch.Tensor
    labels: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()


class Masters:
    """Fused AdamW on fp32 copies of low-precision parameters, as mixed-precision training without autocast does it."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        self._low = list(parameters)
        self._masters = [nn.Parameter(low.detach().float()) for low in self._low]
        self._adamw = torch.optim.AdamW(self._masters, fused=True)

    def step(self) -> None:
        for low, master in zip(self._low, self._masters, strict=True):
            assert low.grad is not None
            master.grad = low.grad.float()
            low.grad = None
        self._adamw.step()
        with torch.no_grad():
            torch._foreach_copy_(self._low, self._masters)

    def zero_grad(self) -> None:
        """Gradients are freed by `step`."""


def main_task(quick: bool) -> Task:
    model = ModelConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=2 if quick else 8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    built = build_stage(model, Mesh.single())
    initialise(built.parameters, model, seed=1)
    weights = {box.tensor.name: box.view.clone() for box in stored_boxes(built.parameters)}
    ids = torch.randint(0, model.vocab_size, (2 if quick else 4, 513), generator=torch.Generator().manual_seed(1))
    return Task(model, weights, ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def engine_step(task: Task, dtype: torch.dtype, *, compiled: bool = False) -> Step:
    built = build_stage(task.model, Mesh.single(), compute_dtype=dtype, options=StageOptions(compile_blocks=compiled))
    initialise(built.parameters, task.model, seed=1)
    batch = Batch(task.input_ids, task.labels)
    optimizer = torch.optim.AdamW(built.module.parameters(), fused=True)
    return quickened(_step(lambda: built.module(None, batch) / task.tokens, optimizer))


def transformers_step(task: Task, dtype: torch.dtype, *, autocast: bool = False, compiled: bool = False) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    )
    features = {name: getattr(task.model, name) for name in names}
    llama = LlamaForCausalLM(LlamaConfig(**features, rms_norm_eps=task.model.norm_eps, attn_implementation="sdpa"))
    prefixed = {name if name.startswith("lm_head") else f"model.{name}": value for name, value in task.weights.items()}
    llama.load_state_dict(prefixed)
    masters = dtype != torch.float32 and not autocast
    if masters:
        llama.to(dtype)
    run: Callable[..., torch.Tensor] = torch.compile(llama) if compiled else llama

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            found = run(input_ids=task.input_ids, labels=task.labels, shift_labels=task.labels, use_cache=False)
        return found.loss

    return _step(loss, Masters(llama.parameters()) if masters else torch.optim.AdamW(llama.parameters(), fused=True))


def megatron_step(task: Task, dtype: torch.dtype) -> Step:
    gpt = megatron.gpt_model(task.model, dtype)
    megatron.fill(gpt, task.model, task.weights)
    optimizer = torch.optim.AdamW(gpt.parameters(), fused=True) if dtype == torch.float32 else Masters(gpt.parameters())
    return _step(lambda: megatron.token_losses(gpt, task.input_ids, task.labels).float().mean(), optimizer)


def _step(loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer | Masters) -> Step:
    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def matrix_products(task: Task, dtype: torch.dtype) -> Callable[[], None]:
    """The matrix products of the linear layers in a step and nothing else: forward, input gradient, weight gradient."""
    model = task.model
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    layer = [
        (heads * model.head_dim, model.hidden_size),
        (model.hidden_size, model.num_attention_heads * model.head_dim),
        (2 * model.intermediate_size, model.hidden_size),
        (model.hidden_size, model.intermediate_size),
    ]
    shapes = layer * model.num_hidden_layers + [(model.vocab_size, model.hidden_size)]
    made = {
        (outputs, inputs): tuple(
            torch.randn(shape).to(dtype) for shape in ((task.tokens, inputs), (outputs, inputs), (task.tokens, outputs))
        )
        for outputs, inputs in set(shapes)
    }

    def multiply() -> None:
        for shape in shapes:
            x, weight, grad = made[shape]
            F.linear(x, weight)
            grad @ weight
            grad.t() @ x

    return multiply


def measure(task: Task, dtype: torch.dtype, *, quick: bool) -> list[Claim]:
    """The claims at one precision."""
    short = "fp32" if dtype == torch.float32 else "bf16"
    steps: dict[str, Step] = {
        "engine": engine_step(task, dtype),
        "transformers": transformers_step(task, dtype),
    }
    if MEGATRON:
        steps["megatron-core"] = megatron_step(task, dtype)
    else:
        say("megatron-core is not installed: nothing is compared with it; pip install --no-deps megatron-core==0.16.1")
    if dtype != torch.float32:
        steps["transformers autocast"] = transformers_step(task, dtype, autocast=True)
    if not quick:
        steps["engine compiled"] = engine_step(task, dtype, compiled=True)
        steps["transformers compiled"] = transformers_step(task, dtype, compiled=True)
        if dtype == torch.float32:
            same = quickened(transformers_step(task, dtype, compiled=True))
            steps["transformers compiled, same products"] = same
    losses = {}
    for name, step in steps.items():
        say(f"{short}: first step of {name}")
        losses[name] = step()
    multiply = matrix_products(task, dtype)
    works = steps | {"ceiling": quickened(multiply), "torch's own products": multiply}
    seconds = dict(zip(works, alternate(list(works.values()), repeat=3, warmup=1), strict=True))
    rate = {name: task.tokens / statistics.median(values) for name, values in seconds.items()}
    eager = [name for name in ("transformers", "transformers autocast") if name in seconds]
    peer = max(eager, key=rate.__getitem__)
    ratio = partial(_speed_of, seconds)
    claims = [
        claim(f"{short}: engine / transformers eager", ratio("engine", peer), at_least=1.0, note=f"against {peer}"),
        claim(f"{short}: engine / ceiling of its matrix products", ratio("engine", "ceiling")),
        claim(
            f"{short}: largest difference of the first losses",
            max(abs(loss - losses["engine"]) for loss in losses.values()),
            at_most=SAME_LOSS[dtype],
        ),
    ]
    if MEGATRON:
        name = "megatron-core, 1 thread as torchrun sets it"
        rate[name] = _rate_on_one_thread(task, steps["megatron-core"])
        claims.append(
            claim(f"{short}: engine / megatron-core as torchrun starts it", rate["engine"] / rate[name], at_least=2.0)
        )
        claims.append(claim(f"{short}: engine / megatron-core on as many threads", ratio("engine", "megatron-core")))
        claims.append(claim(f"{short}: ceiling / megatron-core on as many threads", ratio("ceiling", "megatron-core")))
    if not quick:
        for name in ("transformers compiled", "transformers compiled, same products"):
            if name in steps:
                told = ratio("engine compiled", name)
                claims.append(claim(f"{short}: engine compiled / {name}", told, at_least=1.1))
        share = ratio("engine compiled", "ceiling")
        claims.append(claim(f"{short}: engine compiled / ceiling", share, at_least=CEILING_BARS[dtype]))
        of_torchs = ratio("engine compiled", "torch's own products")
        claims.append(claim(f"{short}: engine compiled / torch's own products", of_torchs))
    return claims + [claim(f"{short}: {name}", value, unit="tokens/s") for name, value in rate.items()]


def _rate_on_one_thread(task: Task, step: Step) -> float:
    torch.set_num_threads(1)
    seconds = seconds_of(step, repeat=2)
    torch.set_num_threads(THREADS)
    return task.tokens / min(seconds)


def _speed_of(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """How many times as fast `one` is as `other`."""
    return median_ratio(seconds[other], seconds[one])


def run(quick: bool) -> list[Claim]:
    # Ranks are forked, so before this process has threads.
    pool = RankPool(2)
    torch.set_num_threads(THREADS)
    keep_freed_memory()
    task = main_task(quick)
    claims: list[Claim] = []
    try:
        for dtype in (torch.float32, torch.bfloat16):
            with megatron.single_rank() if MEGATRON else nullcontext():
                claims += measure(task, dtype, quick=quick)
            short, rounds = "fp32" if dtype == torch.float32 else "bf16", 1 if quick else 3
            claims += on_ranks(pool, task.model, dtype, short=short, rounds=rounds, sequences=8)
    finally:
        pool.close()
    return claims + shares_of_ceiling(claims)


def shares_of_ceiling(claims: list[Claim]) -> list[Claim]:
    """What share of the speed of its matrix products each contender reaches, for context."""
    rates = {one.name: one.value for one in claims if one.unit == "tokens/s"}
    return [
        claim(f"{name} / ceiling", rate / rates[f"{name[:4]}: ceiling"])
        for name, rate in rates.items()
        if not name.endswith(": ceiling")
    ]


if __name__ == "__main__":
    main(run, description=__doc__ or "")
