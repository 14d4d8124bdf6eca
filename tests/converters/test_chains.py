"""Random models through random chains of formats and layouts: what comes out is what went in, bit for bit.

Formats are those that the program finds. What each carries of a run is said here once.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.format import MegatronRun, OpenedCheckpoint, WriteRequest
from converters.job import JobOptions, make_job
from converters.megatron.training import SCHEDULES
from converters.open import formats, open_checkpoint
from converters.verify import changes_outputs, model_differences
from tests.helpers.checkpoints import random_source, whole_arrays, write_native
from workbench.checkpoint.manifest import TrainingState
from workbench.errors import ConversionError
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

MEGATRON: Final = ("megatron", "megatron_dist")
MEGATRON_RUNS: Final = st.builds(MegatronRun, own_layers=st.booleans(), distributed_optimizer=st.booleans())
_GPT2: Final[dict[str, Any]] = {
    **{"norm": "layernorm", "gated_mlp": False, "hidden_act": "gelu_tanh", "position_embedding": "learned"},
    **{"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
}
_EXPERTS: Final[dict[str, Any]] = {"num_experts": 4, "num_experts_per_tok": 2}
_SHARED: Final[dict[str, Any]] = {"shared_expert_intermediate_size": 16, "shared_expert_gate": True}


@dataclass(frozen=True)
class Features:
    """What tells a family from others. grouped: several heads may share their keys. tied: what its head may be."""

    features: dict[str, Any]
    grouped: bool = True
    tied: tuple[bool, ...] = (False, True)


FAMILIES: Final = {
    "llama": Features({}),
    "qwen2": Features({"attention_bias": True}),
    "qwen3": Features({"qk_norm": "head"}),
    "stablelm": Features({"norm": "layernorm", "partial_rotary_factor": 0.5}),
    "gpt2": Features(_GPT2, grouped=False),
    "mixtral": Features({"moe": _EXPERTS}),
    "qwen2_moe": Features({"attention_bias": True, "moe": {**_EXPERTS, **_SHARED, "mlp_only_layers": (0,)}}),
    "gpt_neox": Features(
        {**_GPT2, "hidden_act": "gelu", "position_embedding": "rope", "parallel_residual": True}, grouped=False
    ),
    "olmo2": Features({"norm_placement": "post", "qk_norm": "full"}),
    "gemma2": Features(
        {
            **{"norm_placement": "sandwich", "norm_unit_offset": True, "scale_embeddings": True, "sliding_window": 7},
            **{"hidden_act": "gelu_tanh", "query_pre_attn_scalar": 20, "attn_logit_softcapping": 1.5},
            **{"final_logit_softcapping": 2.0},
        },
        tied=(True,),
    ),
}


@cache
def holders(family: str) -> tuple[str, ...]:
    """The formats that a model of a family can be written in."""
    model = make_model(family)
    schema = random_source(model, "F32", optimizer=False).schema
    found = []
    for name, format in formats().items():
        with suppress(ConversionError):
            format.destination(WriteRequest(Path("nowhere"), schema, model))
            found.append(name)
    return tuple(found)


def make_model(family: str, *, layers: int = 2, heads: int = 4, head_dim: int = 8, **sizes: Any) -> ModelConfig:
    """A model of a family."""
    features = {"vocab_size": 99, "intermediate_size": 24, **FAMILIES[family].features, **sizes}
    if "sliding_window" in features:
        features["layer_types"] = (("sliding_attention", "full_attention") * layers)[:layers]
    if "moe" in features:
        features["moe"] = {**features["moe"], "moe_intermediate_size": features["intermediate_size"]}
    return ModelConfig(
        hidden_size=heads * head_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=head_dim,
        scale_residual_init=False,
        **{"num_key_value_heads": heads, "max_position_embeddings": 16, **features},
    )


@st.composite
def models(draw: st.DrawFn, family: str) -> ModelConfig:
    """A model of a family, of any size."""
    given, heads = FAMILIES[family], draw(st.sampled_from([2, 4]))
    return make_model(
        family,
        layers=draw(st.integers(2, 4)),
        heads=heads,
        head_dim=draw(st.sampled_from([4, 8])),
        vocab_size=draw(st.integers(9, 150)),
        intermediate_size=draw(st.sampled_from([8, 24, 40])),
        num_key_value_heads=draw(st.sampled_from([1, 2, 4][: heads // 2 + 1])) if given.grouped else heads,
        tie_word_embeddings=draw(st.sampled_from(given.tied)),
    )


@st.composite
def layouts(draw: st.DrawFn, model: ModelConfig) -> ParallelLayout:
    """A layout that a model can have in all formats."""
    layers = model.num_hidden_layers
    pp = draw(st.integers(1, layers))
    vpp = draw(st.sampled_from([v for v in (1, 2) if pp > 1 and layers >= pp * v] or [1]))
    cuts = sorted(draw(st.permutations(range(1, layers)))[: pp * vpp - 1])
    counts = tuple(b - a for a, b in zip([0, *cuts], [*cuts, layers], strict=True))
    ep = draw(st.sampled_from([1, 2, 4])) if model.moe else 1
    tp = draw(st.sampled_from([t for t in (1, 2, 4) if model.num_attention_heads % t == 0]))
    apart = ep > 1 and tp > 1 and draw(st.booleans())
    return ParallelLayout(
        tp=tp,
        pp=pp,
        vpp=vpp,
        pp_layout=counts if len(set(counts)) > 1 else None,
        ep=ep,
        dp=ep,
        etp=1 if apart else None,
        sequence_parallel=apart,
        vocab_multiple=draw(st.sampled_from([1, 8, 128])),
    )


@st.composite
def runs(draw: st.DrawFn) -> TrainingState:
    """Where a run stood, as far as batches of one size take it."""
    step, batch, length = draw(st.integers(1, 10**6)), draw(st.integers(1, 4096)), draw(st.integers(1, 8192))
    rates = st.floats(0, 1, allow_subnormal=False)
    scheduler = {
        "schedule": draw(st.sampled_from(sorted(SCHEDULES.values()))),
        "horizon": draw(st.integers(1, 10**6)),
        "warmup": draw(st.integers(0, 10**4)),
        **{"lr": draw(rates), "min_lr": draw(rates)},
    }
    optimizer = {
        **{"name": "adamw", "step": draw(st.integers(1, step)), "betas": [draw(rates), draw(rates)]},
        **{"eps": draw(rates), "weight_decay": draw(rates)},
    }
    if draw(st.booleans()):  # in fp16
        scale = 2.0 ** draw(st.integers(0, 32))
        optimizer["loss_scale"] = {"value": scale, "finite_steps": draw(st.integers(0, 1999)), "skipped_steps": 0}
    return TrainingState(
        step=step,
        samples=step * batch,
        tokens=step * batch * length,
        seed=draw(st.integers(0, 2**31)),
        scheduler=scheduler,
        optimizer=optimizer,
        data={"position": draw(st.integers(0, 100))},
    )


@dataclass(frozen=True)
class Carried:
    """What should still be there: moments or not, and where the run stood."""

    moments: bool
    training: TrainingState | None

    def through(self, format: str, dtype: str) -> Carried:
        """What a format takes over. Megatron has no moments beside 16-bit weights, and without moments no run."""
        if format == "huggingface":
            return Carried(False, None)
        if format not in MEGATRON:
            return self
        if not self.moments or dtype != "F32" or self.training is None:
            return Carried(False, None)
        return Carried(True, replace(self.training, data={}))


def convert(
    opened: OpenedCheckpoint, to: str, path: Path, layout: ParallelLayout, optimizer: str, run: MegatronRun
) -> OpenedCheckpoint:
    layout = layout if to in (*MEGATRON, "native") else ParallelLayout()
    options = JobOptions(layout, optimizer=optimizer, megatron=run)  # type: ignore[arg-type]
    make_job(opened, formats()[to], path, options, operation="test").run(verify="none")
    return open_checkpoint(path)


def check_chain(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    model = data.draw(models(family))
    dtype, moments = data.draw(st.sampled_from(["F32", "F32", "BF16"])), data.draw(st.sampled_from([True, True, False]))
    carried = Carried(moments, data.draw(runs()))
    chain = data.draw(st.lists(st.sampled_from(holders(family)), min_size=2, max_size=4))
    held = random_source(model, dtype, optimizer=moments)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "begin")
        opened = open_checkpoint(write_native(path, held, model, data.draw(layouts(model)), training=carried.training))
        for number, name in enumerate(chain):
            carried = carried.through(name, dtype)
            keep = "keep" if carried.moments else "drop"
            layout, run = data.draw(layouts(model)), data.draw(MEGATRON_RUNS)
            opened = convert(opened, name, Path(scratch, f"{number}"), layout, keep, run)
        found = whole_arrays(opened.source)  # type: ignore[arg-type]
        expected = {n: a for n, a in held.arrays.items() if carried.moments or not n.startswith("optim.")}
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert {tensor.dtype for n, tensor in opened.source.schema.items() if "/" not in n} == {dtype}
        assert opened.training == carried.training
        differences = model_differences(model, opened.model)
        assert not [n for n in differences if changes_outputs(n) and not n.endswith("_token_id")], differences


def test_every_format_of_whole_models_that_is_written_is_part_of_chains() -> None:
    assert set(holders("llama")) == formats().keys() - {"deepspeed_universal", "peft"}
    assert all({"dcp", "huggingface", "native"} <= {*holders(family)} for family in FAMILIES)


@settings(max_examples=6)
@given(data=st.data())
def test_what_comes_out_of_a_chain_is_what_went_in(data: st.DataObject) -> None:
    check_chain(data)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@settings(max_examples=200)
@given(data=st.data())
def test_what_comes_out_of_each_of_two_hundred_chains_is_what_went_in(data: st.DataObject) -> None:
    check_chain(data)
