"""DeepSeek-V2: keys, values and queries from latents, experts from the groups of the best one (transformers,
models/deepseek_v2; arXiv:2405.04434, sec. 2.2.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from converters.experts import Experts, stacked
from converters.families import _same_names as same_names
from converters.families._deepseek import HARMLESS, Latent, SparseLayers, rules
from converters.family import Family
from converters.fields import ACTIVATIONS, Field, FieldFault, Fixed, Foreign, OptionalField, Switch, TokenId
from workbench.spec.model import ModelConfig

METHOD: Final = "topk_method"
WORDS: Final = {
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "moe_intermediate_size": "moe_intermediate_size",
    "routed_scaling_factor": "routed_scaling_factor",
    "n_group": "n_group",
    "topk_group": "topk_group",
}
EXPERTS: Final = Experts(
    words=WORDS,
    defaults={**dict.fromkeys(WORDS, 1), "num_experts": 64, "num_experts_per_tok": None, "moe_intermediate_size": 1407},
    features={"norm_topk_prob": False, "group_score": "best"},
)
LAYERS: Final = SparseLayers(EXPERTS, dense=0, shared=2, layers=32)


@dataclass(frozen=True)
class Groups:
    """Experts, and topk_method: the best of all (greedy), or of the groups that have the best."""

    keys: tuple[str, ...] = (*LAYERS.keys, METHOD)
    fields: tuple[str, ...] = ("moe",)

    def load(self, given: Foreign) -> dict[str, Any]:
        method = given.get(METHOD, "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise FieldFault(f"{METHOD}={method!r} has no place here, only 'greedy' or 'group_limited_greedy'")
        return LAYERS.load(given if method != "greedy" else {**given, "n_group": 1, "topk_group": 1})

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        grouped = model.moe is not None and model.moe.n_group > 1
        return {**LAYERS.dump(model), METHOD: "group_limited_greedy" if grouped else "greedy"}


FAMILY = Family(
    name="deepseek_v2",
    model_type="deepseek_v2",
    causal_lm="DeepseekV2ForCausalLM",
    sequence_classification="DeepseekV2ForSequenceClassification",
    body="DeepseekV2Model",
    prefix="model.",
    fields=(
        Field("vocab_size", default=102400),
        Field("hidden_size", default=4096),
        Field("intermediate_size", default=11008),
        Field("num_hidden_layers", default=32),
        Field("num_attention_heads", default=32),
        OptionalField("num_key_value_heads", lambda given: given.get("num_attention_heads", 32)),
        Latent(may_halve=False),
        Groups(),
        Field("max_position_embeddings", default=2048),
        Field("hidden_act", default="silu", words=ACTIVATIONS),
        Field("rms_norm_eps", "norm_eps", default=1e-6),
        Field("tie_word_embeddings", default=False),
        Switch("attention_bias", ("attention_bias", "attention_output_bias"), default=False),
        Field("attention_dropout", default=0.0),
        Field("initializer_range", default=0.02),
        Fixed("mlp_bias", (False,)),
        Fixed("norm_topk_prob", (False, None)),
        Fixed("moe_layer_freq", (1,)),
        Fixed("scoring_func", ("softmax",)),
        TokenId("bos_token_id", default=1),
        TokenId("eos_token_id", default=2),
        TokenId("pad_token_id"),
    ),
    features={"gated_mlp": True, "norm": "rmsnorm", "position_embedding": "rope", "mlp_bias": False},
    training_only={"embed_dropout": 0.0, "hidden_dropout": 0.0, "scale_residual_init": False},
    harmless=HARMLESS,
    rules=rules,
    also_read=stacked(rules),
    ignored=(same_names.INVERSE_FREQUENCIES,),
)
