"""Mixtral: a Mistral with experts in every layer (transformers, models/mixtral)."""

from __future__ import annotations

from converters.experts import Experts, stacked
from converters.families import _same_names
from converters.families._same_names import INVERSE_FREQUENCIES, PREFIX, derived_head_dim
from converters.family import Family
from converters.fields import ACTIVATIONS, Field, Fixed, OptionalField, TokenId
from converters.rope_fields import Rope
from converters.rules import Rule
from workbench.spec.model import ModelConfig

WORDS = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def rules(model: ModelConfig) -> tuple[Rule, ...]:
    """Where each logical tensor lies."""
    found = []
    for rule in _same_names.rules(model):
        foreign = rule.foreign
        if ".mlp." in foreign:
            for ours, theirs in WORDS.items():
                foreign = foreign.replace(ours, theirs)
        found.append(Rule(rule.logical, foreign))
    return tuple(found)


def faults(model: ModelConfig) -> list[str]:
    """What one width for all MLPs cannot say."""
    if model.moe is not None and model.moe.moe_intermediate_size != model.intermediate_size:
        return [
            f"moe.moe_intermediate_size={model.moe.moe_intermediate_size} is not "
            f"intermediate_size={model.intermediate_size}"
        ]
    return []


FAMILY = Family(
    name="mixtral",
    model_type="mixtral",
    causal_lm="MixtralForCausalLM",
    sequence_classification="MixtralForSequenceClassification",
    token_classification="MixtralForTokenClassification",
    body="MixtralModel",
    prefix=PREFIX,
    fields=(
        Field("vocab_size", default=32000),
        Field("hidden_size", default=4096),
        Field("intermediate_size", default=14336),
        Field("num_hidden_layers", default=32),
        Field("num_attention_heads", default=32),
        Field("num_key_value_heads", default=8),
        OptionalField(
            "head_dim", lambda given: derived_head_dim({"hidden_size": 4096, "num_attention_heads": 32, **given})
        ),
        Field("max_position_embeddings", default=131072),
        Field("hidden_act", default="silu", words=ACTIVATIONS),
        Field("rms_norm_eps", "norm_eps", default=1e-5),
        Field("tie_word_embeddings", default=False),
        Field("sliding_window", default=None),
        Experts(
            words={
                "num_experts": "num_local_experts",
                "num_experts_per_tok": "num_experts_per_tok",
                "moe_intermediate_size": "intermediate_size",
                "router_aux_loss_coef": "router_aux_loss_coef",
            },
            defaults={
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 14336,
                "router_aux_loss_coef": 0.001,
            },
        ),
        Fixed("router_jitter_noise", (0.0, None)),
        Field("attention_dropout", default=0.0),
        Field("initializer_range", default=0.02),
        Rope(default_theta=1e6),
        TokenId("bos_token_id", default=1),
        TokenId("eos_token_id", default=2),
        TokenId("pad_token_id"),
    ),
    features={"gated_mlp": True, "norm": "rmsnorm", "position_embedding": "rope"},
    training_only={"embed_dropout": 0.0, "hidden_dropout": 0.0, "scale_residual_init": False},
    rules=rules,
    also_read=stacked(rules),
    ignored=(INVERSE_FREQUENCIES,),
    faults=faults,
)
