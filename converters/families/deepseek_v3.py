"""DeepSeek-V3: keys, values and queries from latents, experts chosen by group (transformers, models/deepseek_v3)."""

from __future__ import annotations

from typing import Final

from converters.experts import Experts, stacked
from converters.families import _same_names as same_names
from converters.families._deepseek import HARMLESS, Latent, SparseLayers, rules
from converters.family import Family
from converters.fields import ACTIVATIONS, Field, Fixed, OptionalField, Switch, TokenId

EXPERTS: Final = Experts(
    words={
        "num_experts": "n_routed_experts",
        "num_experts_per_tok": "num_experts_per_tok",
        "moe_intermediate_size": "moe_intermediate_size",
        "norm_topk_prob": "norm_topk_prob",
        "routed_scaling_factor": "routed_scaling_factor",
        "n_group": "n_group",
        "topk_group": "topk_group",
    },
    defaults={
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
    },
    features={"scoring": "sigmoid", "e_score_correction_bias": True},
)


FAMILY = Family(
    name="deepseek_v3",
    model_type="deepseek_v3",
    causal_lm="DeepseekV3ForCausalLM",
    sequence_classification="DeepseekV3ForSequenceClassification",
    token_classification="DeepseekV3ForTokenClassification",
    body="DeepseekV3Model",
    prefix="model.",
    fields=(
        Field("vocab_size", default=129280),
        Field("hidden_size", default=7168),
        Field("intermediate_size", default=18432),
        Field("num_hidden_layers", default=61),
        Field("num_attention_heads", default=128),
        OptionalField("num_key_value_heads", lambda given: given.get("num_attention_heads", 128)),
        Latent(may_halve=True),
        SparseLayers(EXPERTS, dense=3, shared=1, layers=61),
        Field("max_position_embeddings", default=4096),
        Field("hidden_act", default="silu", words=ACTIVATIONS),
        Field("rms_norm_eps", "norm_eps", default=1e-6),
        Field("tie_word_embeddings", default=False),
        Switch("attention_bias", ("attention_bias", "attention_output_bias"), default=False),
        Field("attention_dropout", default=0.0),
        Field("initializer_range", default=0.02),
        Fixed("moe_layer_freq", (1,)),
        Fixed("scoring_func", ("sigmoid",)),
        Fixed("topk_method", ("noaux_tc",)),
        TokenId("bos_token_id", default=0),
        TokenId("eos_token_id", default=1),
        TokenId("pad_token_id"),
    ),
    features={"gated_mlp": True, "norm": "rmsnorm", "position_embedding": "rope", "mlp_bias": False},
    training_only={"embed_dropout": 0.0, "hidden_dropout": 0.0, "scale_residual_init": False},
    harmless=(*HARMLESS, "num_nextn_predict_layers"),
    rules=rules,
    also_read=stacked(rules),
    ignored=(same_names.INVERSE_FREQUENCIES,),
)
