"""GPT-NeoX and Pythia: LayerNorm, partly rotary heads, parallel residual, fused QKV (transformers, models/gpt_neox)."""

from __future__ import annotations

from converters.family import Family, IgnoredTensor
from converters.fields import ACTIVATIONS, Field, Switch, TokenId
from converters.rope_fields import Rope
from converters.rules import Merge, Rule, Slice, Split
from workbench.spec.model import ModelConfig

OURS, THEIRS = "layers.{i}", "gpt_neox.layers.{i}"

PLAIN = {
    "embed_tokens.weight": "gpt_neox.embed_in.weight",
    **{
        f"{OURS}.{ours}.{kind}": f"{THEIRS}.{theirs}.{kind}"
        for ours, theirs in (
            ("input_layernorm", "input_layernorm"),
            ("self_attn.o_proj", "attention.dense"),
            ("post_attention_layernorm", "post_attention_layernorm"),
            ("mlp.up_proj", "mlp.dense_h_to_4h"),
            ("mlp.down_proj", "mlp.dense_4h_to_h"),
        )
        for kind in ("weight", "bias")
    },
    "norm.weight": "gpt_neox.final_layer_norm.weight",
    "norm.bias": "gpt_neox.final_layer_norm.bias",
    "lm_head.weight": "embed_out.weight",
}


def rules(model: ModelConfig) -> tuple[Rule, ...]:
    """Where each logical tensor lies. query_key_value is head by head: rows of q, of k, of v (modeling_gpt_neox.py)."""
    heads, d = model.num_attention_heads, model.head_dim
    found = [Rule(ours, theirs) for ours, theirs in PLAIN.items()]
    head = "classifier" if model.label_tokens else "score"
    found += [Rule(f"score.{kind}", f"{head}.{kind}") for kind in ("weight", "bias")]
    for index, name in enumerate("qkv"):
        view = (Split(0, (heads, 3, d)), Slice(1, index, 1, 3), Merge(0, (heads, 1, d)))
        for kind in ("weight", "bias"):
            fused = f"{THEIRS}.attention.query_key_value.{kind}"
            found.append(Rule(f"{OURS}.self_attn.{name}_proj.{kind}", fused, view))
    return tuple(found)


def faults(model: ModelConfig) -> list[str]:
    """Why transformers has no words for the sizes of this model's heads."""
    heads, found = model.num_attention_heads, []
    if model.num_key_value_heads != heads:
        found.append(f"num_key_value_heads={model.num_key_value_heads} is not num_attention_heads={heads}")
    if model.head_dim * heads != model.hidden_size:
        found.append(f"head_dim={model.head_dim} is not hidden_size / num_attention_heads")
    return found


FAMILY = Family(
    name="gpt_neox",
    model_type="gpt_neox",
    causal_lm="GPTNeoXForCausalLM",
    sequence_classification="GPTNeoXForSequenceClassification",
    token_classification="GPTNeoXForTokenClassification",
    body="GPTNeoXModel",
    prefix="gpt_neox.",
    fields=(
        Field("vocab_size", default=50432),
        Field("hidden_size", default=6144),
        Field("intermediate_size", default=24576),
        Field("num_hidden_layers", default=44),
        Field("num_attention_heads", default=64),
        Field("max_position_embeddings", default=2048),
        Field("hidden_act", default="gelu", words=ACTIVATIONS),
        Field("layer_norm_eps", "norm_eps", default=1e-5),
        Field("tie_word_embeddings", default=False),
        Field("use_parallel_residual", "parallel_residual", default=True),
        Switch("attention_bias", ("attention_bias", "attention_output_bias"), default=True),
        Field("attention_dropout", default=0.0),
        Switch("hidden_dropout", ("embed_dropout", "hidden_dropout"), default=0.0),
        Field("initializer_range", default=0.02),
        Rope(
            default_partial=0.25,
            theta_keys=("rotary_emb_base", "rope_theta"),
            partial_keys=("rotary_pct", "partial_rotary_factor"),
        ),
        TokenId("bos_token_id", default=0),
        TokenId("eos_token_id", default=2),
        TokenId("pad_token_id"),
    ),
    features={"gated_mlp": False, "norm": "layernorm", "mlp_bias": True},
    unused=("num_key_value_heads", "head_dim"),
    training_only={"scale_residual_init": False},
    harmless=("classifier_dropout",),
    rules=rules,
    ignored=(
        IgnoredTensor("gpt_neox.layers.{i}.attention.bias", "the causal mask"),
        IgnoredTensor("gpt_neox.layers.{i}.attention.masked_bias", "a constant of the causal mask"),
        IgnoredTensor("gpt_neox.layers.{i}.attention.rotary_emb.inv_freq", "computed from rotary_emb_base"),
    ),
    faults=faults,
)
