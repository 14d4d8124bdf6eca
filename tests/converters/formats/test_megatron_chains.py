"""Random models through random layouts of Megatron's rank folders."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.job import JobOptions, make_job
from converters.open import get_format, open_checkpoint
from tests.helpers.checkpoints import random_native, tiny_model, whole_arrays
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MODELS = {
    "tied, grouped queries": tiny_model(),
    "untied, biases on queries, keys and values": tiny_model(tie_word_embeddings=False, attention_bias=True),
    "layer norms, learned positions, biases": tiny_model(
        norm="layernorm",
        position_embedding="learned",
        gated_mlp=False,
        hidden_act="gelu",
        num_key_value_heads=4,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    ),
    "norms of heads": tiny_model(qk_norm="head", tie_word_embeddings=False),
    "experts in each layer": tiny_model(moe=EXPERTS),
    "experts in some layers, one for all": tiny_model(
        moe={**EXPERTS, "mlp_only_layers": (0,), "shared_expert_intermediate_size": 8}, tie_word_embeddings=False
    ),
}
PIPELINES = st.sampled_from([(1, 1, None), (2, 1, None), (4, 1, None), (2, 2, None), (3, 1, (1, 2, 1)), (2, 1, (3, 1))])


@st.composite
def layouts(draw: st.DrawFn, model: ModelConfig) -> ParallelLayout:
    pp, vpp, stages = draw(PIPELINES)
    ep = draw(st.sampled_from([1, 2, 4])) if model.moe else 1
    return ParallelLayout(
        tp=draw(st.sampled_from([1, 2, 4])),
        pp=pp,
        vpp=vpp,
        pp_layout=stages,
        ep=ep,
        dp=ep,
        vocab_multiple=draw(st.sampled_from([1, 8, 128])),
    )


def convert(source: Path, path: Path, layout: ParallelLayout, to: str) -> Path:
    job = make_job(
        open_checkpoint(source), get_format(to), path, JobOptions(layout, optimizer="drop"), operation="export"
    )
    job.run(verify="full")
    return path


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_chains_of_layouts_keep_every_bit(tmp_path: Path, name: str, data: st.DataObject) -> None:
    model = MODELS[name]
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    before = random_native(root / "native", model, ParallelLayout(tp=2), dtype="BF16", optimizer=False)
    path = root / "native"
    for number in range(2):
        path = convert(path, root / f"megatron-{number}", data.draw(layouts(model)), "megatron")
    opened = open_checkpoint(path)
    after = whole_arrays(opened.source)
    assert opened.model == model and before.arrays.keys() == after.keys()
    for key, array in before.arrays.items():
        np.testing.assert_array_equal(array, after[key], err_msg=key)
    shutil.rmtree(root)
