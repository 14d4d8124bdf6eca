"""Tensors of a PEFT folder by the safetensors library, turned by PyTorch as the weights that they adapt.

The family's table says where a weight lies. B and magnitudes have its rows; B is a weight of as many inputs as there
are ranks. The experts of a layer are one parameter; of the two adapters that the module of experts can have, one is a
parameter's by its sizes, which no two parameters share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors import safe_open

from converters.formats._peft_source import PeftSource
from converters.independent._turned import bits, turn
from converters.rules import TRANSPOSE, Rule
from workbench.checkpoint.source import TensorSource
from workbench.errors import VerificationError
from workbench.spec.geometry import LogicalTensor

_PREFIX: Final = "base_model.model."


class PeftFiles:
    """The tensors of a folder. Adapters are small: each is read again for every part of it that is asked for."""

    def __init__(self, folder: Path, source: TensorSource) -> None:
        assert isinstance(source, PeftSource)
        self._path, self._schema, self._rules = folder / "adapter_model.safetensors", source.schema, source.rules
        with safe_open(self._path, framework="pt") as file:
            self._keys = frozenset(file.keys())

    def read(self, tensor: LogicalTensor, rows: slice) -> np.ndarray:
        """These rows of a logical tensor in storage dtype."""
        return bits(self._turn(tensor.name)[rows])

    def _turn(self, name: str) -> torch.Tensor:
        module, found, factor = name.partition(".lora_")
        rule = self._rules[f"{module}.weight" if found else name]
        if not found:  # trained whole, beside the adapter
            return self._load(rule.foreign)
        if not rule.foreign.endswith(".weight"):
            return self._expert(module, factor, rule)
        key = f"{rule.foreign.removesuffix('.weight')}.lora_{factor}"
        stored, transposed = self._load(key), TRANSPOSE in rule.view
        if factor == "magnitude_vector":
            return turn(rule.view, stored[None] if transposed else stored[:, None])[:, 0]
        if factor.startswith("embedding_"):
            return stored
        if factor == "A.weight":
            return self._ranks(module, stored)
        return self._ranks(module, turn(rule.view, stored.T if transposed else stored).T).T

    def _expert(self, module: str, factor: str, rule: Rule) -> torch.Tensor:
        """A or B of one expert: in A the experts follow one another, in B those of each rank do."""
        a, b = (self._schema[f"{module}.lora_{one}.weight"].shape for one in "AB")
        experts, outputs, inputs = rule.foreign_shape((b[0], a[1]))
        holder = rule.foreign.rpartition(".")[0]
        for key in (holder, f"{holder}.base_layer"):
            if f"{_PREFIX}{key}.lora_A.weight" in self._keys:
                of_a, of_b = self._load(f"{key}.lora_A.weight"), self._load(f"{key}.lora_B.weight")
                if (len(of_b), of_a.shape[1]) == (outputs, inputs):
                    break
        else:
            raise VerificationError(f"{self._path}: nothing adapts {rule.foreign!r} of {experts} experts")
        if factor == "A.weight":
            number = int(module.split(".experts.")[1].partition(".")[0])
            return self._ranks(module, of_a.chunk(experts)[number])
        return self._ranks(module, turn(rule.view, of_b.unflatten(1, (-1, experts)).permute(2, 0, 1)).T).T

    def _ranks(self, module: str, stored: torch.Tensor) -> torch.Tensor:
        """The ranks of a projection, which are rows of `stored`: all of them, unless several projections share them."""
        sizes = {
            name.removesuffix(".lora_A.weight"): t.shape[0] for name, t in self._schema.items() if ".lora_A." in name
        }
        if len(stored) == sizes[module]:
            return stored
        owner, foreign = module.rpartition(".")[0], self._rules[f"{module}.weight"].foreign
        before = [other for other in list(sizes)[: list(sizes).index(module)] if other.rpartition(".")[0] == owner]
        first = sum(sizes[other] for other in before if self._rules[f"{other}.weight"].foreign == foreign)
        return stored[first : first + sizes[module]]

    def _load(self, key: str) -> torch.Tensor:
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(_PREFIX + key)


READER = PeftFiles
