"""Tokens per second, MFU and peak memory of training steps on one GPU, against transformers with torch.compile.

python benchmarks/train_gpu.py [--quick] [--json] [--sizes 1b,3b,6b] [--lengths 4096,8192] [--contenders NAME,...]

Llama-shaped models of about 1, 3 and 6 billion parameters, batches of 8192 tokens, fused AdamW over fp32 masters. Each
contender runs in a process of its own, so that none inherits another's memory, and says what its first losses were.
MFU is given in two conventions against 989 TFLOP/s (H100 and H200, dense bf16, by the data sheet): attention in full
(6N + 12Lhs) and its causal half (6N + 6Lhs); N are the weights that are multiplied with, so the head and not the
embedding lookup; what is computed again counts for nothing. fp8 is measured against the same bf16 peak.

--quick runs a toy size, on the CPU where there is no GPU: whether the script works, not how fast anything is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from _common import Claim, claim, main, say
from pretrain.criterion import Criterion

PEAK_FLOPS = 989e12
TOKENS = 8192
MIN_MFU = 0.5
LLAMA = {"num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0}
SIZES: dict[str, dict[str, Any]] = {
    # Llama 3.2 1B and 3B, and Yi 6B, as published (config.json of each).
    "1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "tie_word_embeddings": True, **LLAMA},
    "3b": {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
           "num_attention_heads": 24, "tie_word_embeddings": True, **LLAMA},
    "6b": {"vocab_size": 64000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, **LLAMA, "num_key_value_heads": 4},
    "toy": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
            "num_attention_heads": 4, **LLAMA, "num_key_value_heads": 2},
}  # fmt: skip
CONTENDERS: dict[str, dict[str, dict[str, Any]]] = {
    "engine-bf16": {},
    "engine-bf16-compiled": {"kernels": {"compile": True}},
    "engine-fp8-tensorwise-compiled": {"kernels": {"compile": True}, "precision": {"linear": "fp8_tensorwise"}},
    "engine-fp8-rowwise-compiled": {"kernels": {"compile": True}, "precision": {"linear": "fp8_rowwise"}},
    "engine-te-bf16": {"kernels": {"backend": "te"}},
    "engine-te-fp8": {"kernels": {"backend": "te"}, "precision": {"linear": "te:current"}},
    "transformers-compiled": {},
}


@dataclass(frozen=True)
class Found:
    """One contender at one size and length; `failed` says why there are no numbers."""

    contender: str
    size: str
    length: int
    tokens_per_second: float = 0.0
    mfu: float = 0.0
    mfu_causal: float = 0.0
    peak_bytes: int = 0
    losses: tuple[float, ...] = ()
    recompute: str = "none"
    failed: str = ""


class NoData:
    """An objective without data: steps are made from rows that never change."""

    evaluations = ()
    criterion = Criterion()
    identity: Mapping[str, Any] = MappingProxyType({})

    def train_rows(self, *_: Any, **__: Any) -> list[Any]:
        return []


def engine_step(
    size: str, length: int, tables: dict[str, dict[str, Any]], recompute: str, folder: str
) -> Callable[[], float]:
    """A training step of the engine as `wb pretrain` runs it, on random tokens."""
    from pretrain.config import EngineConfig
    from pretrain.objective import Rows
    from pretrain.step import agree, train_step
    from pretrain.trainer import Subject, Trainer
    from workbench.parallel.launch import choose_device
    from workbench.parallel.mesh import Mesh
    from workbench.spec.model import ModelConfig

    model = ModelConfig.model_validate(SIZES[size])
    rows = step_rows(size, length)
    values: dict[str, dict[str, Any]] = {
        "batch": {"global_size": rows.shape[0], "micro_size": rows.shape[0], "seq_len": length},
        "run": {"dir": folder, "steps": 1},
        "precision": {"compute": "bf16"},
        "recompute": {"mode": recompute},
        "kernels": {"loss_chunk_tokens": 0 if tables.get("kernels", {}).get("compile") else 4096},
    }
    for table, keys in tables.items():
        values[table] = {**values.get(table, {}), **keys}
    config = EngineConfig.model_validate(values)
    mesh = Mesh.single(choose_device())
    config.resolve_layout(model, 1)

    trainer = Trainer(config, Subject(model, fill=_fill), NoData(), mesh)
    microbatch = Rows(rows[:, :-1].copy(), rows[:, 1:].copy(), np.arange(rows.shape[0]))

    def step() -> float:
        result = train_step(
            trainer.pipeline,
            trainer.optimizer,
            [microbatch],
            agreed=agree([microbatch], mesh, stop=False),
            lr=1e-4,
            seed=1,
            step=0,
        )
        return result.mean_loss(mesh)

    return step


def _fill(parameters: list[Any]) -> None:
    """Random weights, drawn on the device: as good for a measurement as those of `wb pretrain`, and there at once."""
    for parameter in parameters:
        if parameter.spec.role == "norm":
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, 0.02)


def transformers_step(size: str, length: int, *, recompute: bool) -> Callable[[], float]:
    """The same step of transformers: autocast over fp32 parameters, SDPA attention, fused AdamW, compiled."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(SIZES[size])
    theta = shape.pop("rope_theta")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        config = LlamaConfig(
            **shape, rope_parameters={"rope_type": "default", "rope_theta": theta}, attn_implementation="sdpa"
        )
        llama = LlamaForCausalLM(config)
    if recompute:
        llama.gradient_checkpointing_enable()
    llama.train()
    compiled: Callable[..., Any] = torch.compile(llama)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-4, fused=True)
    rows = torch.from_numpy(step_rows(size, length)).to(device)
    ids, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step() -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = compiled(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def step_rows(size: str, length: int) -> np.ndarray:
    """The tokens of a step, [sequences, length + 1]."""
    tokens = TOKENS if size != "toy" else 2 * length
    random = np.random.default_rng(1)
    return random.integers(0, SIZES[size]["vocab_size"], (max(tokens // length, 1), length + 1), dtype=np.int64)


def flops_a_token(size: str, length: int, *, causal: bool) -> float:
    """6N + 12Lhs, or with the causal half of attention 6N + 6Lhs."""
    from pretrain.flops import flops_per_token
    from workbench.spec.model import ModelConfig

    model = ModelConfig.model_validate(SIZES[size])
    whole = flops_per_token(model, length)
    scores = 12.0 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * length
    return whole - scores / 2 if causal else whole


def measure(contender: str, size: str, length: int, *, steps: int) -> Found:
    """One contender in this process; when memory is short, it computes activations again."""
    failed = ""
    torch.manual_seed(1)
    for recompute in ("none", "selective", "full"):
        if contender.startswith("transformers") and recompute == "selective":
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                if contender.startswith("transformers"):
                    step = transformers_step(size, length, recompute=recompute == "full")
                else:
                    step = engine_step(size, length, CONTENDERS[contender], recompute, folder)
                return _timed(contender, size, length, step, recompute, steps=steps)
        except torch.OutOfMemoryError as error:
            failed = str(error).splitlines()[0]
        torch.cuda.empty_cache()
    return Found(contender, size, length, failed=failed)


def _timed(contender: str, size: str, length: int, step: Callable[[], float], recompute: str, *, steps: int) -> Found:
    losses = [step() for _ in range(3)]
    started = time.perf_counter()
    for _ in range(steps):
        step()  # its loss is read on the host, which waits for the device
    seconds = (time.perf_counter() - started) / steps
    rows = step_rows(size, length)
    rate = rows.shape[0] * length / seconds
    return Found(
        contender,
        size,
        length,
        tokens_per_second=rate,
        mfu=rate * flops_a_token(size, length, causal=False) / PEAK_FLOPS,
        mfu_causal=rate * flops_a_token(size, length, causal=True) / PEAK_FLOPS,
        peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        losses=tuple(losses),
        recompute=recompute,
    )


def in_own_process(contender: str, size: str, length: int, steps: int) -> Found:
    """`measure` in a fresh process; what kills it is told in `failed`."""
    case = json.dumps([contender, size, length, steps])
    done = subprocess.run([sys.executable, __file__, "--case", case], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        told = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Found(contender, size, length, failed=told)
    return Found(**json.loads(lines[-1]))


def ceiling() -> float:
    """FLOP/s of the best of several large bf16 products here and now."""
    from pretrain.flops import measure_peak

    return measure_peak(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16).flops


def run(quick: bool) -> list[Claim]:
    sizes, lengths = (["toy"], [128]) if quick else (ASKED.sizes.split(","), [int(n) for n in ASKED.lengths.split(",")])
    if not quick and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --quick tries the script on the CPU")
    contenders = list(CONTENDERS) if not ASKED.contenders else ASKED.contenders.split(",")
    claims = [claim("ceiling: bf16 product", ceiling() / 1e12, unit="TFLOP/s")]
    found: dict[tuple[str, str, int], Found] = {}
    for size in sizes:
        for length in lengths:
            for contender in contenders:
                one = in_own_process(contender, size, length, 2 if quick else 10)
                found[contender, size, length] = one
                say(json.dumps(asdict(one)))
                claims += _claims(one)
            claims += _against_peer(found, size, length, judged=not quick)
    return claims


def _claims(one: Found) -> list[Claim]:
    name = f"{one.size} at {one.length}, {one.contender}"
    if one.failed:
        return [claim(name, 0.0, unit="tokens/s", note=f"did not run: {one.failed}")]
    judged = (one.size, one.length) == ("3b", 4096) and one.contender == "engine-bf16-compiled"
    note = f"recompute {one.recompute}, peak memory {one.peak_bytes / 2**30:.1f} GiB, loss {one.losses[0]:.3f}"
    return [
        claim(name, one.tokens_per_second, unit="tokens/s", note=note),
        claim(f"{name}: MFU, 6N + 12Lhs", one.mfu, at_least=MIN_MFU if judged else None),
        claim(f"{name}: MFU, 6N + 6Lhs", one.mfu_causal),
    ]


def _against_peer(found: dict[tuple[str, str, int], Found], size: str, length: int, *, judged: bool) -> list[Claim]:
    peer = found.get(("transformers-compiled", size, length))
    ours = [one for (name, s, n), one in found.items() if (s, n) == (size, length) and name.startswith("engine-bf16")]
    best = max((one.tokens_per_second for one in ours), default=0.0)
    if peer is None or peer.failed or not best:
        return []
    name = f"{size} at {length}: best engine bf16 / transformers compiled"
    return [claim(name, best / peer.tokens_per_second, at_least=1.0 if judged else None)]


if __name__ == "__main__":
    PARSER = argparse.ArgumentParser(add_help=False)
    PARSER.add_argument("--case")
    PARSER.add_argument("--sizes", default="1b,3b,6b")
    PARSER.add_argument("--lengths", default="4096,8192")
    PARSER.add_argument("--contenders", default="")
    ASKED, REST = PARSER.parse_known_args()
    if ASKED.case:
        CONTENDER, SIZE, LENGTH, STEPS = json.loads(ASKED.case)
        print(json.dumps(asdict(measure(CONTENDER, SIZE, LENGTH, steps=STEPS))))
    else:
        sys.argv[1:] = REST
        main(run, description=__doc__ or "")
