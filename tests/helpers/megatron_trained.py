"""Checkpoints of a few Adam steps of megatron-core on a CPU, in every mode that it has, and the moments they hold.

`train` starts the program `megatron_training`, whose ranks write what their optimizers hold, read from the live objects
and joined over replicas, to `OUT/truth/<stage>-<tp_rank>-<ep_rank>.pt`: {kind: {chunk/parameter: tensor}}; without a
distributed optimizer to `OUT/truth-plain/`. `expected` joins it over ranks.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

STEPS = 3
BATCH, TOKENS = 4, 8
VOCAB = 45
KINDS = ("param", "exp_avg", "exp_avg_sq")
ADAM: dict[str, Any] = {
    "optimizer": "adam",
    "lr": 0.01,
    "min_lr": 0.001,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "adam_eps": 1e-8,
}
SCHEDULER = {
    "max_lr": ADAM["lr"],
    "lr_warmup_steps": 4,
    "num_steps": STEPS * BATCH,
    "lr_decay_style": "cosine",
    "lr_decay_steps": 100 * BATCH,
    "min_lr": ADAM["min_lr"],
    "start_wd": ADAM["weight_decay"],
    "end_wd": ADAM["weight_decay"],
    "wd_incr_style": "constant",
    "wd_incr_steps": 0,
}


@dataclass(frozen=True)
class Trained:
    """What is trained at which layout. bucket_size: elements, None for one bucket; experts: 0 for a dense MLP.

    modes: `dp_reshardable`, `fully_reshardable`, `legacy`: with a distributed optimizer; `plain`, `plain_legacy`:
    without. Each becomes a checkpoint `OUT/<mode>`. load: the folder of an iteration, in mode `fully_reshardable`,
    `legacy` or `plain_legacy`, which is loaded instead of training and saving; again: one of the first two, in which it
    is then saved.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    vpp: int = 1
    dtype: str = "bfloat16"
    bucket_size: int | None = None
    experts: int = 0
    tied: bool = False
    modes: tuple[str, ...] = ("dp_reshardable", "fully_reshardable", "legacy")
    sizes: dict[str, Any] = field(default_factory=dict)
    load: str | None = None
    again: str | None = None
    biases: bool = False

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def arguments(self) -> Namespace:
        """What Megatron's training program would save as `args`."""
        chunk = None if self.vpp == 1 else self.sizes["num_layers"] // (self.pp * self.vpp)
        return Namespace(
            **self.sizes,
            group_query_attention=True,
            swiglu=True,
            normalization="RMSNorm",
            norm_epsilon=1e-5,
            add_bias_linear=self.biases,
            add_qkv_bias=False,
            qk_layernorm=False,
            position_embedding_type="rope",
            rotary_base=10000,
            rotary_percent=1.0,
            rotary_interleaved=False,
            untie_embeddings_and_output_weights=not self.tied,
            make_vocab_size_divisible_by=8,
            vocab_size=VOCAB,
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=None if self.vpp == 1 else self.vpp,
            num_layers_per_virtual_pipeline_stage=chunk,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.tp,
            data_parallel_size=self.dp,
            world_size=self.world,
            num_experts=self.experts or None,
            moe_router_topk=2,
            moe_router_load_balancing_type="none",
            moe_grouped_gemm=False,
            transformer_impl="local",
            use_distributed_optimizer="dp_reshardable" in self.modes,
            overlap_grad_reduce=self.bucket_size is not None,
            ddp_bucket_size=self.bucket_size,
            params_dtype=getattr(torch, self.dtype),
            bf16=self.dtype == "bfloat16",
            fp16=self.dtype == "float16",
            apply_layernorm_1p=False,
            **ADAM,
            clip_grad=1.0,
            seed=1234,
            iteration=STEPS,
            global_batch_size=BATCH,
            micro_batch_size=1,
            seq_length=TOKENS,
            max_position_embeddings=TOKENS,
            consumed_train_samples=STEPS * BATCH,
            train_iters=100,
        )


SIZES = {
    "num_layers": 4,
    "hidden_size": 24,
    "ffn_hidden_size": 20,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 6,
    "padded_vocab_size": 48,
}


def train(cases: dict[str, dict[str, Any]]) -> None:
    """Trains and saves every case in a process of its own that starts ranks; CalledProcessError when one fails."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.megatron_training", json.dumps(cases)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def expected(out: Path, what: Trained, *, distributed: bool = True) -> dict[str, dict[str, torch.Tensor]]:
    """By kind, then by logical name: what the optimizers of all ranks held. Joined here by hand, without our tables."""
    ranks: dict[str, dict[str, dict[int, torch.Tensor]]] = {kind: {} for kind in KINDS}
    for path in sorted((out / ("truth" if distributed else "truth-plain")).iterdir()):
        stage, tp_rank, ep_rank = map(int, path.stem.split("-"))
        for kind, held in torch.load(path).items():
            for key, tensor in held.items():
                chunk, name = key.split("/")
                first = (int(chunk) * what.pp + stage) * what.sizes["num_layers"] // (what.pp * what.vpp)
                name = re.sub(r"layers\.(\d+)", lambda m, first=first: f"layers.{first + int(m[1])}", name)
                share = ep_rank * what.experts // what.ep
                name = re.sub(r"experts\.(\d+)", lambda m, share=share: f"experts.{share + int(m[1])}", name)
                if not (what.tied and name == "output_layer.weight"):
                    ranks[kind].setdefault(name, {})[tp_rank] = tensor
    found: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in KINDS}
    for kind, tensors in ranks.items():
        for name, by_rank in tensors.items():
            found[kind] |= _logical(name, [by_rank[rank] for rank in sorted(by_rank)], what)
    return found


def _logical(name: str, parts: list[torch.Tensor], what: Trained) -> dict[str, torch.Tensor]:
    """The logical tensors that a tensor of Megatron's is, of which `parts` are the shares of tensor ranks."""
    ours = name.replace("decoder.layers.", "layers.").replace("decoder.final_layernorm", "norm")
    ours = ours.replace("pre_mlp_layernorm", "post_attention_layernorm").replace("local_experts.", "")
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        ours = "lm_head.weight" if name.startswith("output") else "embed_tokens.weight"
        return {ours: torch.cat(parts)[:VOCAB]}
    if "linear_qkv" in name:
        groups, d = what.sizes["num_query_groups"], what.sizes["kv_channels"]
        grid = torch.cat(parts).view(groups, -1, *parts[0].shape[1:])
        pieces = grid.split([grid.shape[1] - 2 * d, d, d], dim=1)
        base = ours.replace("self_attention.linear_qkv", "self_attn.{}_proj")
        return {base.format(x): piece.flatten(0, 1) for x, piece in zip("qkv", pieces, strict=True)}
    if "linear_fc1" in name:
        halves = [torch.cat([part.chunk(2)[half] for part in parts]) for half in (0, 1)]
        return {ours.replace("linear_fc1", x): half for x, half in zip(("gate_proj", "up_proj"), halves, strict=True)}
    if "linear_proj" in name or "linear_fc2" in name:
        ours = ours.replace("self_attention.linear_proj", "self_attn.o_proj").replace("linear_fc2", "down_proj")
        return {ours: torch.cat(parts, dim=1) if name.endswith("weight") else parts[0]}
    return {ours.replace("mlp.router", "mlp.gate"): parts[0]}
