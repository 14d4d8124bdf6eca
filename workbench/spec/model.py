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
    """The features of a decoder and their sizes."""

    vocab_size: int = Field(gt=0, description="Rows of the embedding, without padding.")
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0, description="Width of the MLP.")
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(default=0, ge=0, description="Key/value heads; 0 means one per attention head.")
    head_dim: int = Field(default=0, ge=0, description="Size of a head; 0 means hidden_size / num_attention_heads.")
    kv_lora_rank: int = Field(
        default=0,
        ge=0,
        description="Width of the latent that keys and values come from (multi-head latent attention, "
        "arXiv:2405.04434, sec. 2.1); 0: they come straight from the hidden states.",
    )
    q_lora_rank: int = Field(default=0, ge=0, description="Width of the latent that queries come from; 0: none.")
    qk_nope_head_dim: int = Field(default=0, ge=0, description="Part of a latent head's key without positions.")
    qk_rope_head_dim: int = Field(default=0, ge=0, description="The rotary part, whose key all latent heads share.")
    v_head_dim: int = Field(default=0, ge=0, description="Size of a latent head's value.")
    rope_interleave: bool = Field(
        default=False,
        description="Whether Hugging Face files hold rotary dimensions in pairs; logical tensors hold them in halves.",
    )
    max_position_embeddings: int = Field(default=2048, gt=0)
    hidden_act: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = Field(default=True, description="Whether the MLP multiplies act(gate) with up (SwiGLU).")
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = Field(default=1e-5, gt=0)
    position_embedding: Literal["rope", "learned"] = "rope"
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
        if values.get("kv_lora_rank") and not values.get("head_dim"):
            values["head_dim"] = values.get("qk_nope_head_dim", 0) + values.get("qk_rope_head_dim", 0)
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
        if self.position_embedding == "rope" and self.rotary_dim % 2:
            name = "qk_rope_head_dim" if self.kv_lora_rank else "head_dim"
            raise ValueError(f"rotary positions need an even {name}, not {self.rotary_dim}")
        if self.rope_scaling is not None and self.position_embedding != "rope":
            raise ValueError("rope_scaling is given, but position_embedding is not 'rope'")
        return self

    @model_validator(mode="after")
    def _check_latent_sizes(self) -> Self:
        sizes = ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        given = [f"{name}={value}" for name in sizes if (value := self.model_dump()[name])]
        if not self.kv_lora_rank:
            if given:
                raise ValueError(f"{', '.join(given)} without kv_lora_rank; give it or remove them")
            return self
        missing = [name for name in sizes[1:] if not self.model_dump()[name]]
        if missing:
            raise ValueError(f"kv_lora_rank={self.kv_lora_rank} needs {', '.join(missing)} as well")
        if self.head_dim != self.qk_nope_head_dim + self.qk_rope_head_dim:
            raise ValueError(
                f"head_dim={self.head_dim} is not qk_nope_head_dim={self.qk_nope_head_dim} + "
                f"qk_rope_head_dim={self.qk_rope_head_dim}; leave it out"
            )
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads}, but with kv_lora_rank every one of "
                f"num_attention_heads={self.num_attention_heads} has its own; make them equal"
            )
        if self.position_embedding != "rope":
            raise ValueError(f"kv_lora_rank={self.kv_lora_rank} needs position_embedding = 'rope'")
        return self

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that turn with the position."""
        return self.qk_rope_head_dim if self.kv_lora_rank else self.head_dim

    @property
    def value_head_dim(self) -> int:
        """Size of a head's value; queries and keys have head_dim."""
        return self.v_head_dim if self.kv_lora_rank else self.head_dim
