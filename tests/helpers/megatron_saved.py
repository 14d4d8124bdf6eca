"""Megatron's rank folders without megatron-core: what its own layers save, cut by hand from logical tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.helpers.megatron_cases import CASES, ITERATION, Case, logical

GPT, LLAMA, EXPERTS = (CASES[name].model for name in ("gpt", "llama", "experts"))
State = dict[str, Any]


def state_of(case: Case, tp_rank: int = 0, stage: int = 0, ep_rank: int = 0) -> State:
    """What a rank of Megatron-Core with its own layers saves of a case, from the logical tensors alone."""
    args = case.arguments()
    held, layers = logical(case), args.num_layers // case.pp
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    last = stage == case.pp - 1

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(case.tp)[tp_rank].clone()

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return rows(torch.cat([tensor, torch.zeros(case.padded - len(tensor), *tensor.shape[1:])]))

    found = {}
    if stage == 0:
        found["embedding.word_embeddings.weight"] = padded(held["embed_tokens.weight"])
        if "embed_positions.weight" in held:
            found["embedding.position_embeddings.weight"] = held["embed_positions.weight"]
    for index in range(layers):
        ours, theirs = f"layers.{stage * layers + index}", f"decoder.layers.{index}"
        for kind in ("weight", "bias"):
            if f"{ours}.input_layernorm.{kind}" in held:
                found[f"{theirs}.input_layernorm.{kind}"] = held[f"{ours}.input_layernorm.{kind}"]
                found[f"{theirs}.pre_mlp_layernorm.{kind}"] = held[f"{ours}.post_attention_layernorm.{kind}"]
            if f"{ours}.self_attn.q_proj.{kind}" not in held:
                continue
            parts = [held[f"{ours}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            grid = torch.cat([part.view(groups, -1, *part.shape[1:]) for part in parts], 1)
            found[f"{theirs}.self_attention.linear_qkv.{kind}"] = rows(grid.flatten(0, 1))
            o = held[f"{ours}.self_attn.o_proj.{kind}"]
            o = o.chunk(case.tp, 1)[tp_rank].clone() if kind == "weight" else o
            found[f"{theirs}.self_attention.linear_proj.{kind}"] = o
        found |= mlp_of(case, held, ours, theirs, tp_rank, ep_rank)
    if last:
        for kind in ("weight", "bias"):
            if f"norm.{kind}" in held:
                found[f"decoder.final_layernorm.{kind}"] = held[f"norm.{kind}"]
        head = held.get("lm_head.weight", held["embed_tokens.weight"] if case.pp > 1 else None)
        if head is not None:
            found["output_layer.weight"] = padded(head)
    return found


def mlp_of(case: Case, held: State, ours: str, theirs: str, tp_rank: int, ep_rank: int) -> State:
    found = {}
    experts = getattr(case.arguments(), "num_experts", 0)
    mine = range(experts // case.ep * ep_rank, experts // case.ep * (ep_rank + 1))
    paths = {f"{ours}.mlp.experts.{e}": f"{theirs}.mlp.experts.local_experts.{e - mine.start}" for e in mine}
    if experts:
        found[f"{theirs}.mlp.router.weight"] = held[f"{ours}.mlp.gate.weight"]
    for path, name in (paths or {f"{ours}.mlp": f"{theirs}.mlp"}).items():
        for kind in ("weight", "bias"):
            halves = [held[f"{path}.{x}_proj.{kind}"] for x in ("gate", "up") if f"{path}.{x}_proj.{kind}" in held]
            if not halves:
                continue
            found[f"{name}.linear_fc1.{kind}"] = torch.cat([half.chunk(case.tp)[tp_rank] for half in halves])
            down = held[f"{path}.down_proj.{kind}"]
            down = down.chunk(case.tp, 1)[tp_rank].clone() if kind == "weight" else down
            found[f"{name}.linear_fc2.{kind}"] = down
    return found


def save(
    case: Case, root: Path, change: Callable[[State], Any] = lambda state: state, version: float = 3.0, **args: Any
) -> Path:
    """Every rank's file, its state changed by `change`; args: changed arguments, None for those left out."""
    for stage in range(case.pp):
        for tp_rank in range(case.tp):
            for ep_rank in range(case.ep):
                said = case.arguments()
                for name, value in args.items():
                    setattr(said, name, value)
                name = f"mp_rank_{tp_rank:02d}" + (f"_{stage:03d}" if case.pp > 1 else "")
                path = root / f"iter_{ITERATION:07d}" / (name + (f"_{ep_rank:03d}" if case.ep > 1 else ""))
                path.mkdir(parents=True)
                model = change(state_of(case, tp_rank, stage, ep_rank))
                state = {"args": said, "checkpoint_version": version, "iteration": ITERATION, "model": model}
                torch.save(state, path / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text(f"{ITERATION}\n")
    return root
