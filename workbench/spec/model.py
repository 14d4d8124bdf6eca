"""What a model is: named features, with Hugging Face's field names where it has them. No torch, no family names."""

from __future__ import annotations

from collections.abc import Callable, Collection
from difflib import get_close_matches
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from workbench.config import Config
from workbench.registry import module_names
from workbench.spec.latent import LatentSizes
from workbench.spec.moe import MixtureOfExperts
from workbench.spec.norm_placement import PLACEMENTS, SUMS
from workbench.spec.rope import RopeScaling

LayerType = Literal["full_attention", "sliding_attention"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

WITHOUT_WORDS: Final = {"head_transform": False, "lm_head_bias": False, "next_sentence": False}
"""What belongs to heads over the vocabulary only."""


def _one_of(word: str, known: Collection[str]) -> str:
    if word not in known:
        near = "".join(f"; did you mean {name!r}?" for name in get_close_matches(word, known, n=1))
        raise ValueError(f"{word!r} is not one of {', '.join(known)}{near}")
    return word


def _file_of(package: str) -> Callable[[str], str]:
    """Whether a word names a file of `package`, without importing it: the file may need torch."""
    return lambda word: _one_of(word, module_names(package))


MAX_LAYERS: Final = 1 << 16
"""A configuration with more is damaged, or made to fill the memory."""


class ModelConfig(Config):
    """The features of a transformer and their sizes."""

    vocab_size: int = Field(gt=0, description="Rows of the embedding, without padding.")
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0, description="Width of the MLP.")
    num_hidden_layers: int = Field(gt=0, le=MAX_LAYERS)
    num_encoder_layers: int = Field(
        default=0, ge=0, description="The first so many layers are an encoder, to whose output all others attend."
    )
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(default=0, ge=0, description="Key/value heads; 0 means one per attention head.")
    head_dim: int = Field(default=0, ge=0, description="Size of a head; 0 means hidden_size / num_attention_heads.")
    latent: LatentSizes | None = Field(
        default=None, description="Keys and values from a latent (multi-head latent attention); head_dim follows."
    )
    max_position_embeddings: int = Field(default=2048, gt=0)
    hidden_act: Annotated[str, AfterValidator(_file_of("workbench.models.activations"))] = Field(
        default="silu", description="A file of workbench/models/activations: silu, gelu, gelu_tanh, relu, or your own."
    )
    gated_mlp: bool = Field(default=True, description="Whether the MLP multiplies act(gate) with up (SwiGLU).")
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_placement: Annotated[str, AfterValidator(lambda word: _one_of(word, PLACEMENTS))] = Field(
        default="pre",
        description="Norms of what enters attention and MLP (pre), of what leaves them (post), of both (sandwich), or "
        "of the sums x + f(x) (post_residual).",
    )
    norm_unit_offset: bool = Field(
        default=False, description="Norms multiply with 1 + weight, in fp32, and weights begin at 0."
    )
    norm_eps: float = Field(default=1e-5, gt=0)
    causal: bool = Field(default=True, description="Whether a token sees only itself and those before it, or all.")
    type_vocab_size: int = Field(default=0, ge=0, description="Kinds of segments that have an embedding; 0: none.")
    embed_norm: bool = Field(default=False, description="A norm on the sum of the embeddings.")
    position_embedding: Literal["rope", "learned", "relative"] = "rope"
    relative_attention_num_buckets: int = Field(
        default=32, gt=3, multiple_of=4, description="relative: kinds of distance that have a bias of their own."
    )
    relative_attention_max_distance: int = Field(default=128, gt=0, description="relative: farther ones are alike.")
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = Field(
        default=1.0, gt=0, le=1, description="The first share of each head that rotary positions turn."
    )
    parallel_residual: bool = Field(
        default=False, description="Both branches read the layer's input: x + attention(norm x) + mlp(norm x)."
    )
    shared_norm: bool = Field(default=False, description="One norm for both branches of a parallel residual.")
    rope_local_theta: float | None = Field(
        default=None, gt=0, description="The base of rotary positions in sliding layers, without rope_scaling."
    )
    scale_embeddings: bool = Field(default=False, description="Token embeddings are multiplied with sqrt(hidden_size).")
    qk_norm: Literal["none", "head", "full"] = Field(
        default="none", description="RMSNorm of queries and keys: of each head, or of all heads together (full)."
    )
    query_pre_attn_scalar: int | None = Field(
        default=None, gt=0, description="Attention scores are divided by its square root; without it by head_dim's."
    )
    attn_logit_softcapping: float | None = Field(
        default=None, gt=0, description="Attention scores s become c * tanh(s / c) for this c."
    )
    final_logit_softcapping: float | None = Field(
        default=None, gt=0, description="Logits of the vocabulary head x become c * tanh(x / c) for this c."
    )
    attention_mask: Annotated[str, AfterValidator(_file_of("workbench.models.masks"))] = Field(
        default="causal", description="A file of workbench/models/masks: causal, or your own."
    )
    sliding_window: int | None = Field(
        default=None, gt=0, description="Tokens that a query of a sliding layer sees: its own and those just before it."
    )
    layer_types: tuple[LayerType, ...] | None = Field(
        default=None, description="Which layers slide; without it all do if there is a sliding_window, else none."
    )
    attention_bias: bool = Field(default=False, description="Biases on the query, key and value projections.")
    attention_output_bias: bool = Field(default=False, description="A bias on the attention output projection.")
    mlp_bias: bool = False
    moe: MixtureOfExperts | None = Field(default=None, description="Experts in place of the MLP of some layers.")
    tie_word_embeddings: bool = False
    embed_dropout: float = Field(default=0.0, ge=0, lt=1)
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1, description="On the output of attention and of the MLP.")
    mlp_dropout: float = Field(default=0.0, ge=0, lt=1, description="Inside the MLP, after its activation.")
    final_dropout: float = Field(default=0.0, ge=0, lt=1, description="After the last norm, of an encoder's too.")
    classifier_dropout: float = Field(default=0.0, ge=0, lt=1, description="Before the head of num_labels.")
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
    num_labels: int = Field(
        default=0, ge=0, description="Outputs of a head of labels in place of the LM head; 0: none."
    )
    label_tokens: bool = Field(default=False, description="The head of labels reads every token, not one for the row.")
    problem_type: ProblemType | None = Field(default=None, description="What the outputs of num_labels mean.")
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def with_labels(
        self, num_labels: int, *, of_tokens: bool = False, problem_type: ProblemType | None = None
    ) -> ModelConfig:
        """The model with a head that judges rows, or every token, in place of those over the vocabulary.

        Where no token comes last by what it has seen, the first one speaks for the row, by way of the pooler.
        """
        return self.model_copy(
            update={
                **WITHOUT_WORDS,
                "lm_head": True,
                "num_labels": num_labels,
                "label_tokens": of_tokens,
                "problem_type": problem_type,
                "pooler": not (self.causal or of_tokens),
            }
        )

    def without_heads(self) -> ModelConfig:
        """The body alone, with the pooler that transformers expects of it where no token comes last."""
        no_labels = {"num_labels": 0, "label_tokens": False, "problem_type": None}
        return self.model_copy(update={**WITHOUT_WORDS, **no_labels, "lm_head": False, "pooler": not self.causal})

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that rotary positions turn."""
        if self.latent is not None:
            return self.latent.qk_rope_head_dim
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def value_head_dim(self) -> int:
        """Size of a head's value; that of its query and key is head_dim."""
        return self.head_dim if self.latent is None else self.latent.v_head_dim

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence; scaling by length begins where max_position_embeddings end."""
        if self.rope_scaling is not None and self.rope_scaling.kind == "by_length":
            return int(self.max_position_embeddings * self.rope_scaling.factor)
        return self.max_position_embeddings

    @model_validator(mode="before")
    @classmethod
    def _fill_derived_sizes(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
        if not values.get("num_key_value_heads") and isinstance(heads, int):
            values["num_key_value_heads"] = heads
        if not values.get("head_dim") and (latent := values.get("latent")):
            values["head_dim"] = LatentSizes.model_validate(latent).qk_head_dim
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
        faults = [*self._rope_faults(), *self._residual_faults(), *self._window_faults(), *self._norm_faults()]
        faults += [*self._head_faults(), *self._pair_faults()]
        if self.latent is not None:
            faults += self._latent_faults(self.latent)
        if faults:
            raise ValueError("; ".join(faults))
        if self.moe is not None and self.mlp_bias:
            raise ValueError("mlp_bias=true and moe: experts have no biases; remove one of them")
        if self.moe is not None and self.mlp_dropout:
            raise ValueError(f"mlp_dropout={self.mlp_dropout:g} and moe: experts drop nothing; remove one of them")
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
        if self.label_tokens and (self.pooler or not self.num_labels):
            found.append(
                f"label_tokens=true is for a head that reads tokens themselves, but num_labels={self.num_labels} and "
                f"pooler={self.pooler}; set num_labels and pooler = false, or label_tokens = false"
            )
        if self.pooler and self.causal:
            found.append("pooler=true reads the first token, which sees nothing if causal=true; set causal = false")
        return found

    def _pair_faults(self) -> list[str]:
        """Why the features of an encoder and a decoder do not go together."""
        if not self.num_encoder_layers:
            if self.position_embedding != "relative":
                return []
            return [
                "position_embedding='relative' goes with num_encoder_layers, which is 0; set it, or use 'rope' "
                "or 'learned'"
            ]
        found = []
        if self.num_encoder_layers >= self.num_hidden_layers:
            found.append(
                f"num_encoder_layers={self.num_encoder_layers} leaves no layer of num_hidden_layers="
                f"{self.num_hidden_layers} to the decoder; lower it"
            )
        only = {
            "position_embedding": "relative",
            "causal": True,
            "norm_placement": "pre",
            "parallel_residual": False,
            "qk_norm": "none",
            "sliding_window": None,
            "attn_logit_softcapping": None,
            "attention_mask": "causal",
            "latent": None,
            "moe": None,
            "num_key_value_heads": self.num_attention_heads,
            "num_labels": 0,
            "type_vocab_size": 0,
        }
        found += [
            f"{name}={'{...}' if isinstance(value, dict) else repr(value)} does not go with "
            f"num_encoder_layers={self.num_encoder_layers}, only {only[name]!r}; "
            "use that or num_encoder_layers = 0"
            for name, value in self.model_dump(include=set(only)).items()
            if value != only[name]
        ]
        return found

    def _rope_faults(self) -> list[str]:
        if self.position_embedding != "rope":
            given = {
                "rope_scaling": self.rope_scaling and self.rope_scaling.kind,
                "rope_local_theta": self.rope_local_theta,
                "partial_rotary_factor": self.partial_rotary_factor if self.partial_rotary_factor < 1 else None,
            }
            return [
                f"{name}={value} is for rotary positions, but position_embedding={self.position_embedding!r}; remove it"
                for name, value in given.items()
                if value is not None
            ]
        if self.rotary_dim % 2 or not self.rotary_dim:
            share = f" x partial_rotary_factor={self.partial_rotary_factor:g}" if self.partial_rotary_factor < 1 else ""
            return [
                f"rotary positions turn pairs of dimensions, but head_dim={self.head_dim}{share} is {self.rotary_dim}"
            ]
        return [] if self.rope_scaling is None else self.rope_scaling.size_faults(self.rotary_dim)

    def _residual_faults(self) -> list[str]:
        if self.parallel_residual and self.norm_placement == SUMS:
            return [
                f"norm_placement={SUMS!r} norms the sum with attention before the MLP reads it, but "
                "parallel_residual=true has no such sum; change one of them"
            ]
        if self.shared_norm and not (self.parallel_residual and self.norm_placement == "pre"):
            return [
                "shared_norm=true is for parallel_residual = true and norm_placement = 'pre', not "
                f"{str(self.parallel_residual).lower()} and {self.norm_placement!r}; set those, or shared_norm = false"
            ]
        return []

    def _norm_faults(self) -> list[str]:
        needs = {"qk_norm": self.qk_norm != "none", "norm_unit_offset": self.norm_unit_offset}
        return [
            f"{name} is for norm='rmsnorm', not {self.norm!r}; change one of them"
            for name, given in needs.items()
            if given and self.norm != "rmsnorm"
        ]

    def _window_faults(self) -> list[str]:
        found = []
        if self.attention_mask != "causal" and self.sliding_window is not None:
            found.append(
                f"attention_mask={self.attention_mask!r} and sliding_window={self.sliding_window} both say what tokens "
                "see; remove one of them"
            )
        if not self.causal and (self.attention_mask != "causal" or self.sliding_window is not None):
            found.append(
                f"causal=false lets tokens see all others, but attention_mask={self.attention_mask!r} and "
                f"sliding_window={self.sliding_window} say what they see; use 'causal' and none, or causal = true"
            )
        if self.layer_types is None:
            return found
        if len(self.layer_types) != self.num_hidden_layers:
            found.append(
                f"layer_types has {len(self.layer_types)} entries, but num_hidden_layers={self.num_hidden_layers}; "
                "give one a layer"
            )
        if ("sliding_attention" in self.layer_types) != (self.sliding_window is not None):
            slide = "layers that slide" if self.sliding_window is None else "no layer that slides"
            found.append(f"layer_types has {slide}, but sliding_window={self.sliding_window}; change one of them")
        return found

    def slides(self, layer: int) -> bool:
        """Whether attention of this layer sees `sliding_window` tokens and not all before."""
        kinds = self.layer_types
        return self.sliding_window is not None and (kinds is None or kinds[layer] == "sliding_attention")

    def window(self, layer: int) -> int | None:
        """Tokens that a query of this layer sees, its own the last; None: all before."""
        return self.sliding_window if self.slides(layer) else None

    def has_experts(self, layer: int) -> bool:
        """Whether this layer has experts in place of its one MLP."""
        return self.moe is not None and self.moe.has_experts(layer)

    def _latent_faults(self, latent: LatentSizes) -> list[str]:
        found = []
        if self.head_dim != latent.qk_head_dim:
            found.append(
                f"head_dim={self.head_dim} is not qk_nope_head_dim={latent.qk_nope_head_dim} + "
                f"qk_rope_head_dim={latent.qk_rope_head_dim}; leave it out"
            )
        if self.num_key_value_heads != self.num_attention_heads:
            found.append(
                f"num_key_value_heads={self.num_key_value_heads}, but each of num_attention_heads="
                f"{self.num_attention_heads} has its own key and value from the latent; make them equal"
            )
        only = {
            "position_embedding": "rope",
            "partial_rotary_factor": 1.0,
            "qk_norm": "none",
            "norm_unit_offset": False,
        }
        values = self.model_dump(include=set(only))
        found += [
            f"{name}={values[name]!r} does not go with latent, only {value!r}"
            for name, value in only.items()
            if values[name] != value
        ]
        return found
