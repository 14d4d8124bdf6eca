"""What a model is: named features, with Hugging Face's field names where it has them. No torch, no family names."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from workbench.config import Config


class RopeScaling(Config):
    """How rotary frequencies are stretched beyond the trained length.

    linear: positions divided by `factor`. by_parts: long wavelengths are divided by `factor`, short ones kept, and
    those between `low_freq_factor` and `high_freq_factor` blended (transformers, modeling_rope_utils.py,
    `_compute_llama3_parameters`).
    """

    kind: Literal["linear", "by_parts"]
    factor: float = Field(gt=0)
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class ModelConfig(Config):
    """The features of a transformer and their sizes."""

    vocab_size: int = Field(gt=0, description="Rows of the embedding, without padding.")
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0, description="Width of the MLP.")
    num_hidden_layers: int = Field(gt=0)
    num_encoder_layers: int = Field(
        default=0, ge=0, description="The first so many layers are an encoder, to whose output all others attend."
    )
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(default=0, ge=0, description="Key/value heads; 0 means one per attention head.")
    head_dim: int = Field(default=0, ge=0, description="Size of a head; 0 means hidden_size / num_attention_heads.")
    max_position_embeddings: int = Field(default=2048, gt=0)
    hidden_act: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated_mlp: bool = Field(default=True, description="Whether the MLP multiplies act(gate) with up (SwiGLU).")
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = Field(default=1e-5, gt=0)
    norm_placement: Literal["pre", "post_residual"] = Field(
        default="pre", description="Where a layer norms: pre, x + f(norm(x)); post_residual, norm(x + f(x))."
    )
    causal: bool = Field(default=True, description="Whether a token sees only itself and those before it, or all.")
    type_vocab_size: int = Field(default=0, ge=0, description="Kinds of segments that have an embedding; 0: none.")
    embed_norm: bool = Field(default=False, description="A norm on the sum of the embeddings.")
    position_embedding: Literal["rope", "learned", "relative"] = "rope"
    relative_attention_num_buckets: int = Field(
        default=32, gt=3, multiple_of=4, description="relative: kinds of distance that have a bias of their own."
    )
    relative_attention_max_distance: int = Field(default=128, gt=0, description="relative: farther ones are alike.")
    attention_scale: float | None = Field(
        default=None, gt=0, description="What scores are multiplied by; 1/sqrt(head_dim) when not set."
    )
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = Field(default=False, description="Biases on the query, key and value projections.")
    attention_output_bias: bool = Field(default=False, description="A bias on the attention output projection.")
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    embed_dropout: float = Field(default=0.0, ge=0, lt=1)
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1, description="On the output of attention and of the MLP.")
    initializer_range: float = Field(default=0.02, gt=0)
    scale_residual_init: bool = Field(
        default=True,
        description="Divide the initial range of output projections by sqrt(2 * layers) (GPT-2, sec. 2.3).",
    )
    lm_head: bool = Field(default=True, description="Whether the model predicts words, or ends with its last layer.")
    logit_scale: float = Field(default=1.0, gt=0, description="What goes into the LM head is multiplied by this.")
    head_transform: bool = Field(default=False, description="A linear layer, hidden_act and a norm before the LM head.")
    lm_head_bias: bool = Field(default=False, description="A bias for each word on the LM head.")
    pooler: bool = Field(
        default=False, description="tanh of a linear layer on the first token, which a sequence head then reads."
    )
    next_sentence: bool = Field(
        default=False, description="A second head, which tells whether the second segment follows the first."
    )
    num_labels: int = Field(default=0, ge=0, description="Outputs of a sequence head in place of the LM head; 0: none.")
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_derived_sizes(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
        if not values.get("num_key_value_heads") and isinstance(heads, int):
            values["num_key_value_heads"] = heads
        if not values.get("head_dim") and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            values["head_dim"] = hidden // heads if hidden % heads == 0 else 0
        return values

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.head_dim == 0:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}; "
                "give head_dim or change one of them"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.position_embedding == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")
        if self.rope_scaling is not None and self.position_embedding != "rope":
            raise ValueError("rope_scaling is given, but position_embedding is not 'rope'")
        if faults := [*self._head_faults(), *self._pair_faults()]:
            raise ValueError("; ".join(faults))
        return self

    def _head_faults(self) -> list[str]:
        """Why heads and what they read do not go together."""
        found = []
        if self.next_sentence and not (self.pooler and self.type_vocab_size > 1):
            found.append(
                f"next_sentence=true reads the pooler and tells two segments apart, but pooler={self.pooler} and "
                f"type_vocab_size={self.type_vocab_size}; set pooler = true and type_vocab_size = 2"
            )
        predicts = self.lm_head and not self.num_labels
        for name in ("head_transform", "lm_head_bias", "next_sentence"):
            if getattr(self, name) and not predicts:
                found.append(f"{name}=true belongs to an LM head, but this model has none; remove it")
        if self.pooler and self.causal:
            found.append("pooler=true reads the first token, which sees nothing if causal=true; set causal = false")
        return found

    def _pair_faults(self) -> list[str]:
        """Why the features of an encoder and a decoder do not go together."""
        relative = self.position_embedding == "relative"
        if not self.num_encoder_layers:
            words = "goes with num_encoder_layers, which is 0; set it, or use"
            found = [f"position_embedding='relative' {words} 'rope' or 'learned'"] if relative else []
            return found + ([] if self.attention_scale is None else [f"attention_scale {words} none"])
        found = []
        if self.num_encoder_layers >= self.num_hidden_layers:
            found.append(
                f"num_encoder_layers={self.num_encoder_layers} leaves no layer of num_hidden_layers="
                f"{self.num_hidden_layers} to the decoder; lower it"
            )
        if not relative or not self.causal or self.norm_placement != "pre" or self.num_labels or self.type_vocab_size:
            found.append(
                f"num_encoder_layers={self.num_encoder_layers} goes with position_embedding='relative', causal=true, "
                "norm_placement='pre', an LM head and no segments; change them or set num_encoder_layers = 0"
            )
        return found
