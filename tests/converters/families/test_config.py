"""The configuration of a family reads the same in both directions, and nothing in it is skipped."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BertConfig, GPT2Config, LlamaConfig, T5Config

from converters.family import detect_family, families, family_for, family_named
from workbench.errors import ConversionError
from workbench.spec.model import ModelConfig, RopeScaling

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama defaults": LlamaConfig(architectures=["LlamaForCausalLM"]).to_dict(),
    "llama grouped, tied, biased": LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=99,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters={**LLAMA3_ROPE, "rope_theta": 500000.0},
        eos_token_id=[7, 8],
        pad_token_id=0,
    ).to_dict(),
    "llama linear rope": LlamaConfig(
        architectures=["LlamaForCausalLM"],
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    ).to_dict(),
    "llama classifier": LlamaConfig(architectures=["LlamaForSequenceClassification"], num_labels=3).to_dict(),
    "llama classifier of two": LlamaConfig(architectures=["LlamaForSequenceClassification"]).to_dict(),
    "gpt2 defaults": GPT2Config(architectures=["GPT2LMHeadModel"]).to_dict(),
    "gpt2 untied, own width": GPT2Config(
        architectures=["GPT2LMHeadModel"], n_embd=32, n_head=4, n_inner=100, tie_word_embeddings=False, resid_pdrop=0.0
    ).to_dict(),
    "bert defaults": BertConfig(architectures=["BertForMaskedLM"]).to_dict(),
    "bert, both heads": BertConfig(
        architectures=["BertForPreTraining"], hidden_size=32, num_attention_heads=2, type_vocab_size=3
    ).to_dict(),
    "bert classifier": BertConfig(architectures=["BertForSequenceClassification"], num_labels=3).to_dict(),
    "bert body": BertConfig(architectures=["BertModel"], hidden_act="gelu_new").to_dict(),
    "bert of 2019": {
        "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "transformers_version": "4.6.0.dev0",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": 30522,
    },
    "t5 defaults": T5Config(architectures=["T5ForConditionalGeneration"]).to_dict(),
    "t5, gated, not scaled": T5Config(
        architectures=["T5ForConditionalGeneration"],
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        num_decoder_layers=3,
    ).to_dict(),
    "t5 of 2021": {
        "architectures": ["T5ForConditionalGeneration"],
        "d_ff": 1024,
        "d_kv": 64,
        "d_model": 512,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_decoder_layers": 8,
        "num_heads": 6,
        "num_layers": 8,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 32128,
    },
    "gpt2 of 2019": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "llama of 2024": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3_ROPE,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "llama of 2023": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "torch_dtype": "float16",
        "vocab_size": 32000,
    },
}


def dtype_of(config: dict[str, Any]) -> str:
    return config.get("dtype") or config.get("torch_dtype") or "float32"


@pytest.mark.parametrize("case", sorted(CONFIGS))
def test_a_configuration_that_went_in_comes_out_equal(case: str) -> None:
    given = {key: value for key, value in CONFIGS[case].items() if key not in ("model_type", "dtype")}
    given |= {"model_type": CONFIGS[case]["model_type"]}
    if "torch_dtype" not in given:
        given["dtype"] = "float32"
    family = detect_family(given, "config.json")
    model = family.load_config(given)
    assert family.dump_config(model, dtype_of(given), given) == dict(sorted(given.items()))


@pytest.mark.parametrize("case", sorted(CONFIGS))
def test_a_configuration_written_without_its_original_describes_the_same_model(case: str) -> None:
    family = detect_family(CONFIGS[case], "config.json")
    model = family.load_config(CONFIGS[case])
    written = family.dump_config(model, "float32")
    assert family.load_config(written) == model
    reader = {"llama": LlamaConfig, "gpt2": GPT2Config, "bert": BertConfig, "t5": T5Config}[family.name]
    theirs, ours = reader(**CONFIGS[case]).to_dict(), reader(**written).to_dict()
    theirs["rope_parameters"] = {k: v for k, v in (theirs.get("rope_parameters") or {}).items() if k != "type"}
    ours["rope_parameters"] = ours.get("rope_parameters") or {}
    behaviour = {key for rule in family.fields for key in rule.keys} - {
        "eos_token_id",
        "rope_scaling",
        "position_embedding_type",
    }
    assert {key: ours.get(key) for key in behaviour} == {key: theirs.get(key) for key in behaviour}


@pytest.mark.parametrize("name", sorted(families()))
def test_every_feature_of_a_model_has_one_place_in_the_family(name: str) -> None:
    family = family_named(name)
    claimed = [field for rule in family.fields for field in rule.fields]
    claimed += {name for features in family.other_classes.values() for name in features}
    claimed += [*family.features, *family.training_only, *family.unused, "num_labels"]
    assert sorted(claimed) == sorted(ModelConfig.model_fields)


def test_scaled_rotary_positions_become_the_named_feature() -> None:
    model = family_named("llama").load_config(CONFIGS["llama of 2024"])
    assert model.rope_theta == 500000.0
    assert model.rope_scaling == RopeScaling(
        kind="by_parts", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    )
    old = family_named("llama").load_config(CONFIGS["llama of 2023"])
    assert old.rope_scaling == RopeScaling(kind="linear", factor=4.0)
    assert (old.rope_theta, old.bos_token_id, old.eos_token_id) == (10000.0, 1, 2)


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("llama defaults", {"sliding_window": 4096}, ["sliding_window=4096 is unknown", "'llama'"]),
        ("llama defaults", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["rope_type='yarn'", "linear"]),
        ("llama defaults", {"hidden_act": "mish"}, ["hidden_act='mish'", "silu"]),
        ("llama defaults", {"rope_theta": 5.0}, ["rope_theta is given as 5.0 and as 10000.0"]),
        ("llama defaults", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ("llama defaults", {"quantization_config": {"bits": 4}}, ["quantization_config={'bits': 4}"]),
        ("llama defaults", {"architectures": ["LlamaForTokenClassification"]}, ["LlamaForTokenClassification"]),
        ("llama defaults", {"hidden_size": "wide"}, ["hidden_size"]),
        ("llama defaults", {"rms_norm_eps": -1.0}, ["norm_eps"]),
        ("bert defaults", {"is_decoder": True}, ["is_decoder=True", "only False"]),
        ("bert defaults", {"tie_word_embeddings": False}, ["tie_word_embeddings=False", "only True"]),
        ("bert defaults", {"architectures": ["BertForTokenClassification"]}, ["BertForTokenClassification"]),
        ("t5 defaults", {"is_gated_act": True}, ["is_gated_act=True, but feed_forward_proj='relu' means False"]),
        ("t5 defaults", {"is_encoder_decoder": False}, ["is_encoder_decoder=False", "only True"]),
        ("gpt2 defaults", {"scale_attn_weights": False}, ["scale_attn_weights=False", "only True"]),
        ("gpt2 defaults", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx=True"]),
        ("gpt2 defaults", {"activation_function": "mish", "odd": 1}, ["activation_function='mish'", "odd=1"]),
    ],
)
def test_what_has_no_place_is_refused_by_name(case: str, change: dict[str, Any], words: list[str]) -> None:
    given = CONFIGS[case] | change
    with pytest.raises(ConversionError) as error:
        detect_family(given, "config.json").load_config(given)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llama", {"gated_mlp": False}, ["gated_mlp=False", "only True"]),
        ("llama", {"attention_bias": True}, ["attention_bias=True, attention_output_bias=False", "one switch"]),
        ("llama", {"norm": "layernorm"}, ["norm='layernorm'", "'rmsnorm'"]),
        ("llama", {"head_dim": 6, "num_attention_heads": 3, "num_key_value_heads": 3}, ["hidden_size=32", "=3"]),
        ("bert", {"pooler": True}, ["none of BertFor", "pooler=True", "next_sentence=False"]),
        ("gpt2", {"num_key_value_heads": 2}, ["num_key_value_heads=2 is not num_attention_heads=4"]),
        ("gpt2", {"position_embedding": "rope"}, ["position_embedding='rope'"]),
    ],
)
def test_a_model_that_the_family_cannot_say_is_refused_by_field(
    family: str, change: dict[str, Any], words: list[str]
) -> None:
    small = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1}
    plain = ModelConfig(num_attention_heads=4, **small)
    if family == "gpt2":
        plain = family_named("gpt2").load_config({"n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 9})
    if family == "bert":
        plain = family_named("bert").load_config({**small, "num_attention_heads": 4})
    model = ModelConfig.model_validate(plain.model_dump() | change)
    with pytest.raises(ConversionError) as error:
        family_named(family).dump_config(model, "float32")
    for word in words:
        assert word in str(error.value)


def test_a_model_finds_its_family_by_what_it_is() -> None:
    for case in ("llama classifier", "gpt2 defaults", "bert, both heads", "bert classifier", "bert body"):
        family = detect_family(CONFIGS[case], "config.json")
        assert family_for(family.load_config(CONFIGS[case])) is family
    odd = ModelConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, norm="layernorm"
    )
    with pytest.raises(ConversionError, match=r"(?s)gpt2.*gated_mlp=True.*llama.*norm='layernorm'"):
        family_for(odd)


def test_an_unknown_model_type_names_the_known_families() -> None:
    with pytest.raises(ConversionError, match=r"model_type='mamba'.*gpt2, llama.*--family"):
        detect_family({"model_type": "mamba"}, "config.json")
    with pytest.raises(ConversionError, match=r"'mamba' is not known; use one of: .*gpt2, llama"):
        family_named("mamba")


def test_a_model_that_became_a_classifier_gets_labels_and_its_class() -> None:
    family = family_named("llama")
    given = CONFIGS["llama defaults"]
    model = ModelConfig.model_validate(family.load_config(given).model_dump() | {"num_labels": 3})
    written = family.dump_config(model, "float32", given)
    assert written["architectures"] == ["LlamaForSequenceClassification"]
    assert written["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert family.load_config(written) == model
