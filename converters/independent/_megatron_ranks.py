"""What the ranks of Megatron saved, as PyTorch loads it: weights and Adam's state, by the names of a rank's modules.

Here the order of a rank's parameters is not deduced from a model, as the reader of these folders does: a state
dictionary has them in the order of the modules, and optimizers count them so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Final

import torch

from converters.independent._megatron_model import MASTER, MOMENTS, WEIGHT
from converters.independent._torch_files import load
from workbench.errors import VerificationError

Named = dict[str, torch.Tensor]
_ALIGNMENT: Final = 64
_UNTRAINED: Final = (".expert_bias",)
_IGNORED: Final = ("_extra_state", ".inv_freq")
_SINCE_CORE: Final = (
    (r"^language_model\.", ""),
    (r"^word_embeddings_for_head\.", "output_layer."),
    (r"^(encoder|transformer)\.", "decoder."),
    (r"\.final_norm\.", ".final_layernorm."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.post_attention_(layer)?norm\.", ".pre_mlp_layernorm."),
    (r"\.attention\.", ".self_attention."),
    (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.dense\.", ".linear_proj."),
    (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."),
)


def iteration(folder: Path) -> Path:
    """The folder of a checkpoint: the latest one of a run, or `folder` itself."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    if not tracker.exists():
        return folder
    word = tracker.read_text().strip()
    return folder / (word if word == "release" else f"iter_{int(word):07d}")


class RankTensors:
    """A rank's position, and its tensors: by kind, then by model chunk, then by name.

    optimizer: whether its state is wanted, which may be there in a form that is not read.
    """

    def __init__(self, path: Path, *, optimizer: bool) -> None:
        state, self._path = load(path), path
        self.args: dict[str, Any] = vars(state["args"])
        self.version = state.get("checkpoint_version", 0)
        numbers = [int(number) for number in path.parent.name.split("_")[2:]]
        self.tp_rank = numbers.pop(0)
        self.stage = numbers.pop(0) if self._degree("pipeline_model_parallel_size") > 1 else 0
        self.ep_rank = numbers.pop(0) if self._degree("expert_model_parallel_size") > 1 else 0
        keys = ["model"] if "model" in state else takewhile(state.__contains__, (f"model{i}" for i in count()))
        chunks = [dict(_flat(state[key])) for key in keys]
        self.kinds: dict[str, list[Named]] = {k: [{} for _ in chunks] for k in (MASTER, *MOMENTS)}
        self.kinds[WEIGHT] = chunks
        if not optimizer:
            return
        shared_out = path.with_name("distrib_optim.pt")
        take = self._take_buffers if shared_out.exists() else self._take_parameters
        saved = load(shared_out) if shared_out.exists() else state.get("optimizer")
        for one, here in zip(saved if isinstance(saved, list) else [saved], self._trained(), strict=False):
            if isinstance(one, Mapping):
                take(one, here)

    def _degree(self, name: str) -> int:
        return self.args.get(name) or 1

    def _trained(self) -> list[list[tuple[int, str]]]:
        """Chunk and name of what each optimizer trains: one, or the second for experts that are dealt over ranks."""
        everything = [
            (chunk, name)
            for chunk, tensors in enumerate(self.kinds[WEIGHT])
            for name in tensors
            if not name.endswith(_UNTRAINED)
        ]
        if self._degree("expert_model_parallel_size") == 1:
            return [everything]
        of_experts = [".experts." in name for _, name in everything]
        return [[at for at, is_one in zip(everything, of_experts, strict=True) if is_one == kind] for kind in (0, 1)]

    def _take_parameters(self, state: Mapping[str, Any], here: list[tuple[int, str]]) -> None:
        """Of an optimizer that counts parameters: first those whose weight decays, which are the matrices."""
        inner = state.get("optimizer", state)
        for index, group in enumerate(inner["param_groups"]) if inner.get("state") else ():
            decays = group.get("wd_mult", 1.0) != 0
            members = [at for at in here if (self._weight(at).dim() > 1) == decays]
            for at, number in zip(members, group["params"], strict=True):
                for kind in MOMENTS:
                    self._put(kind, at, inner["state"][number][kind])
            halves = [at for at in members if self._weight(at).dtype != torch.float32]
            if halves:
                for at, master in zip(halves, state["fp32_from_fp16_params"][index], strict=True):
                    self._put(MASTER, at, master)

    def _take_buffers(self, state: Mapping[Any, Any], here: list[tuple[int, str]]) -> None:
        """Of a distributed optimizer, which lines the parameters of a chunk and a type up, the last one first."""
        lines: dict[tuple[int, torch.dtype], list[tuple[int, str]]] = {}
        for at in here:
            lines.setdefault((at[0], self._weight(at).dtype), []).append(at)
        for index, ((chunk, _), members) in enumerate(lines.items()):
            flat, *others = state[index].values()  # one for each pair of types that a run may have
            if any(other[kind].data_ptr() != flat[kind].data_ptr() for other in others for kind in (MASTER, *MOMENTS)):
                raise VerificationError(f"{self._path}: buffer {index} of an optimizer is not the same for all types")
            end = bucket = 0
            limit = self._bucket_size() if self.stage == chunk == 0 else None
            for at in reversed(members):
                weight = self._weight(at)
                start = bucket + -(-(end - bucket) // _ALIGNMENT) * _ALIGNMENT
                bucket = start if self._is_alone(at[1]) else bucket
                end = start + weight.numel()
                for kind in (MASTER, *MOMENTS):
                    self._put(kind, at, flat[kind][start:end].view(weight.shape))
                if self._is_alone(at[1]) or (limit is not None and end - bucket >= limit):
                    bucket = end

    def _is_alone(self, name: str) -> bool:
        """Whether two stages have this parameter, which then has a bucket of its own."""
        tied = not self.args.get("untie_embeddings_and_output_weights")
        ends = ("embedding.word_embeddings.weight", "output_layer.weight")
        return tied and self._degree("pipeline_model_parallel_size") > 1 and name in ends

    def _bucket_size(self) -> int | None:
        args = self.args
        if not args.get("overlap_grad_reduce"):
            return None
        if args.get("ddp_bucket_size"):
            return int(args["ddp_bucket_size"])
        if args.get("ddp_num_buckets"):
            held = sum(self._weight(at).numel() for trained in self._trained() for at in trained)
            return held // int(args["ddp_num_buckets"])
        return max(40_000_000, 1_000_000 * self._degree("data_parallel_size") * self._degree("context_parallel_size"))

    def _weight(self, at: tuple[int, str]) -> torch.Tensor:
        return self.kinds[WEIGHT][at[0]][at[1]]

    def _put(self, kind: str, at: tuple[int, str], tensor: torch.Tensor) -> None:
        self.kinds[kind][at[0]][at[1]] = tensor


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a nested state dictionary, by the names that Megatron-Core gave them later."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, torch.Tensor) and not name.endswith(_IGNORED):
            for old, new in _SINCE_CORE:
                name = re.sub(old, new, name)
            yield name, value
