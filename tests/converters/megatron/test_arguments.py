"""Megatron's training arguments and models say the same, or one refuses the other by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.family import families
from converters.megatron.arguments import FIXED, dump_arguments, load_arguments, with_vocabulary
from converters.megatron.stages import dump_layout, load_layout, padded_vocab, stage_layers
from tests.converters.families.published import PUBLISHED
from workbench.errors import ConversionError
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PLAIN = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 90,
    "padded_vocab_size": 128,
}
YARN = {"kind": "ramp", "factor": 4.0, "original_max_position_embeddings": 64}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "rope_interleave": True}


def load(**said: Any) -> ModelConfig:
    return load_arguments({**PLAIN, **said}, "there").model


def refusal(**said: Any) -> str:
    with pytest.raises(ConversionError) as caught:
        load(**said)
    return str(caught.value)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Models that Megatron's GPT can say."""
    gated, rms, rope, bias = (draw(st.booleans()) for _ in range(4))
    said: dict[str, Any] = {
        **SIZES,
        "hidden_act": "silu" if gated else draw(st.sampled_from(["gelu", "gelu_tanh"])),
        "gated_mlp": gated,
        "norm": "rmsnorm" if rms else "layernorm",
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "attention_bias": bias or draw(st.booleans()),
        "attention_output_bias": bias,
        "mlp_bias": bias,
        "position_embedding": "rope" if rope else "learned",
        "tie_word_embeddings": draw(st.booleans()),
        "head_dim": draw(st.sampled_from([8, 16])),
    }
    if rms:
        said |= {"qk_norm": draw(st.sampled_from(["none", "head"])), "norm_unit_offset": draw(st.booleans())}
    if rope:
        by_parts = {"kind": "by_parts", "factor": 8.0}
        scaling = draw(st.sampled_from([None, {"kind": "linear", "factor": 2.0}, by_parts]))
        said |= {"rope_theta": draw(st.sampled_from([1e4, 5e5])), "rope_scaling": scaling}
        said["partial_rotary_factor"] = draw(st.sampled_from([1.0, 0.5]))
    if draw(st.booleans()):
        kinds = draw(st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=4, max_size=4))
        all_slide = "full_attention" not in kinds
        if "sliding_attention" in kinds:
            said |= {"sliding_window": 8, "layer_types": None if all_slide else kinds}
    if gated and not bias and draw(st.booleans()):
        scoring, top = draw(st.sampled_from(["softmax", "sigmoid"])), draw(st.sampled_from([1, 2]))
        said["moe"] = {
            "num_experts": 4,
            "num_experts_per_tok": top,
            "moe_intermediate_size": 24,
            "mlp_only_layers": draw(st.sampled_from([(), (0,), (1, 3)])),
            "scoring": scoring,
            "norm_topk_prob": top > 1 and (scoring == "sigmoid" or draw(st.booleans())),
            "e_score_correction_bias": scoring == "sigmoid" and draw(st.booleans()),
            "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
            "shared_expert_intermediate_size": draw(st.sampled_from([0, 16])),
            "router_aux_loss_coef": draw(st.sampled_from([0.0, 0.01])),
        }
    return ModelConfig.model_validate(said)


@given(models())
@settings(max_examples=80)
def test_arguments_that_were_made_of_a_model_say_that_model(model: ModelConfig) -> None:
    assert load_arguments(dump_arguments(model), "there").model == model


@pytest.mark.parametrize("scaling", [None, YARN, {**YARN, "attention_factor": 1.0}])
@pytest.mark.parametrize("rank", [None, 12])
def test_latent_attention_comes_back_with_its_stretch(scaling: dict[str, Any] | None, rank: int | None) -> None:
    latent = {**LATENT, "q_lora_rank": rank, "mscale_all_dim": 1.0 if scaling else 0.0}
    model = ModelConfig.model_validate(
        {**SIZES, "num_key_value_heads": 4, "norm_eps": 1e-6, "latent": latent, "rope_scaling": scaling}
    )
    found = load_arguments(dump_arguments(model), "there").model
    assert found.model_copy(update={"rope_scaling": None}) == model.model_copy(update={"rope_scaling": None})
    if model.rope_scaling is not None and found.rope_scaling is not None:
        assert found.rope_scaling.attention_scale == pytest.approx(model.rope_scaling.attention_scale, rel=1e-12)


CAN = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gpt2", "deepseek_v3")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_models_have_arguments_or_are_refused_with_the_feature(name: str) -> None:
    config = PUBLISHED[name]
    family = next(f for f in families() if f.model_type == config["model_type"])
    model = family.load_config(config)
    try:
        said = dump_arguments(model)
    except ConversionError as error:
        assert family.name not in CAN, error
        assert "=" in str(error)
    else:
        again = load_arguments(said, "there").model
        told = {"pad_token_id", "bos_token_id", "eos_token_id", "scale_residual_init", "moe", "query_pre_attn_scalar"}
        assert again.model_dump(exclude=told) == model.model_dump(exclude=told)
        layers = range(model.num_hidden_layers)
        assert [again.has_experts(i) for i in layers] == [model.has_experts(i) for i in layers]


@pytest.mark.parametrize("key", [rule.key for rule in FIXED])
def test_an_argument_with_one_value_here_is_refused_with_any_other(key: str) -> None:
    assert f"{key}='other'" in refusal(**{key: "other"})


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p=True"),
        ({"squared_relu": True}, "squared_relu=True"),
        ({"window_size": (7, 3)}, "window_size=(7, 3)"),
        ({"position_embedding_type": "mrope"}, "position_embedding_type='mrope'"),
        ({"normalization": "Other"}, "normalization='Other'"),
        ({"num_experts": 4, "add_bias_linear": True}, "add_bias_linear=True"),
        ({"num_experts": 4, "add_bias_linear": False, "moe_router_load_balancing_type": "sinkhorn"}, "'sinkhorn'"),
        ({"multi_latent_attention": True, "norm_epsilon": 1e-5, "qk_layernorm": True}, "norm_epsilon=1e-05"),
        ({"num_layers": 10**9}, "num_layers=1000000000"),
        ({"my_flag": 3}, "my_flag=3 is unknown"),
    ],
)
def test_what_has_no_place_is_named_with_its_value(said: dict[str, Any], words: str) -> None:
    assert words in refusal(**said)


def test_arguments_of_the_run_alone_and_switches_that_are_off_are_left_out() -> None:
    said = {"lr": 3e-4, "rl_profile": True, "tensorboard_dir": "x", "inference_max_requests": 8, "my_flag": False}
    assert load(**said) == load()


@pytest.mark.parametrize(
    ("said", "act"),
    [
        ({"bias_gelu_fusion": True}, "gelu_tanh"),
        ({"bias_gelu_fusion": False}, "gelu"),
        ({"bias_gelu_fusion": True, "add_bias_linear": False}, "gelu"),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, "gelu_tanh"),
        ({"swiglu": True}, "silu"),
    ],
)
def test_the_fused_gelu_is_the_tanh_approximation(said: dict[str, Any], act: str) -> None:
    assert load(**said).hidden_act == act


def test_a_frequency_of_experts_counts_from_the_first_layer() -> None:
    said = {"num_experts": 4, "add_bias_linear": False, "swiglu": True, "moe_layer_freq": 2}
    assert [load(**said).has_experts(layer) for layer in range(4)] == [True, False, True, False]


def test_a_window_has_one_token_more_than_megatron_counts_before_it() -> None:
    model = load(window_size=(7, 0), window_attn_skip_freq=4)
    assert model.sliding_window == 8
    assert [model.slides(layer) for layer in range(4)] == [True, True, True, False]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parallel_residual": True}, "parallel_residual=True"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"norm_placement": "sandwich"}, "norm_placement='sandwich'"),
        ({"qk_norm": "full"}, "qk_norm='full'"),
        ({"query_pre_attn_scalar": 24}, "query_pre_attn_scalar=24"),
        ({"attention_output_bias": True}, "attention_output_bias=True"),
        ({"embed_dropout": 0.1}, "embed_dropout=0.1"),
        ({"num_labels": 3}, "num_labels=3"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"rope_scaling": {"kind": "by_parts", "factor": 8.0, "low_freq_factor": 2.0}}, "low_freq_factor=2.0"),
    ],
)
def test_a_feature_that_megatron_does_not_have_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        dump_arguments(ModelConfig.model_validate({**SIZES, **change}))


def test_a_vocabulary_is_never_taken_for_its_padded_size() -> None:
    with pytest.raises(ConversionError, match=r"padded_vocab_size=128.*--vocab-size"):
        with_vocabulary({"padded_vocab_size": 128}, None, "there")
    assert with_vocabulary({"padded_vocab_size": 128}, 90, "there")["vocab_size"] == 90


@pytest.mark.parametrize(
    ("said", "counts"),
    [
        ({}, (8,)),
        ({"pipeline_model_parallel_size": 2}, (4, 4)),
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, (2, 2, 2, 2)),
        ({"pipeline_model_parallel_size": 3, "decoder_first_pipeline_num_layers": 2}, (2, 3, 3)),
        ({"pipeline_model_parallel_size": 3, "decoder_last_pipeline_num_layers": 4}, (2, 2, 4)),
        (
            {
                "pipeline_model_parallel_size": 5,
                "account_for_embedding_in_pipeline_split": True,
                "account_for_loss_in_pipeline_split": True,
            },
            (1, 2, 2, 2, 1),
        ),
        ({"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et*3|(tt|)*2,t|L"}, (3, 2, 2, 1, 0)),
    ],
)
def test_layers_are_dealt_to_stages_as_megatron_does(said: dict[str, Any], counts: tuple[int, ...]) -> None:
    if len(counts) == 5 and "pipeline_model_parallel_layout" in said:
        said = {**said, "pipeline_model_parallel_size": 5}
    assert stage_layers({"num_layers": 8, **said}, "there") == counts


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(tp=2, pp=2, vpp=2, vocab_multiple=128),
        ParallelLayout(pp=3, pp_layout=(2, 1, 1)),
        ParallelLayout(pp=2, vpp=2, pp_layout=(1, 1, 1, 1)),
        ParallelLayout(tp=2, dp=2, ep=2, etp=1, sequence_parallel=True),
    ],
)
def test_a_layout_comes_back_from_its_arguments(layout: ParallelLayout) -> None:
    model = ModelConfig.model_validate(SIZES)
    said = {**dump_arguments(model), **dump_layout(model, layout)}
    found = load_layout(said, "there")
    assert found.chunks(4) == layout.chunks(4)
    axes = {"tp", "pp", "vpp", "ep", "expert_tp", "vocab_multiple", "sequence_parallel"}
    assert {axis: getattr(found, axis) for axis in axes} == {axis: getattr(layout, axis) for axis in axes}
    assert said["padded_vocab_size"] == padded_vocab(model, layout)
    assert load_arguments(said, "there").model == model
