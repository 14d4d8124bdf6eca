"""Rules for Megatron's training arguments that say one feature of a model together. No torch.

Each is a `converters.fields.FieldRule`. Meanings and defaults: Megatron-LM, training/arguments.py and
core_transformer_config_from_args.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from converters.fields import FieldFault, Foreign
from workbench.spec.model import ModelConfig

NORMS: Final = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}


@dataclass(frozen=True)
class Vocabulary:
    """The true size of the vocabulary; of a checkpoint whose arguments leave it out, the padded one."""

    keys: tuple[str, ...] = ("vocab_size", "padded_vocab_size", "make_vocab_size_divisible_by")
    fields: tuple[str, ...] = ("vocab_size",)

    def load(self, given: Foreign) -> dict[str, Any]:
        size, padded = given.get("vocab_size"), given.get("padded_vocab_size")
        if size is None and padded is None:
            raise FieldFault("vocab_size and padded_vocab_size are missing")
        if size is not None and padded is not None and size > padded:
            raise FieldFault(f"vocab_size={size} is more than padded_vocab_size={padded}")
        return {"vocab_size": padded if size is None else size}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        return {"vocab_size": model.vocab_size}


@dataclass(frozen=True)
class Heads:
    """Heads, and how many share a key and value; sizes of latent attention are `Latent`'s."""

    keys: tuple[str, ...] = ("num_attention_heads", "group_query_attention", "num_query_groups", "kv_channels")
    fields: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads", "head_dim")

    def load(self, given: Foreign) -> dict[str, Any]:
        heads = given["num_attention_heads"]
        groups = given.get("num_query_groups") if given.get("group_query_attention") else None
        size = None if given.get("multi_latent_attention") else given.get("kv_channels")
        return {"num_attention_heads": heads, "num_key_value_heads": groups or heads, "head_dim": size or 0}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        heads, groups = model.num_attention_heads, model.num_key_value_heads
        if model.query_pre_attn_scalar not in (None, model.head_dim):
            raise FieldFault(f"query_pre_attn_scalar={model.query_pre_attn_scalar} is not head_dim={model.head_dim}")
        return {
            "num_attention_heads": heads,
            "group_query_attention": groups != heads,
            "num_query_groups": groups if groups != heads else 1,
            "kv_channels": model.head_dim if model.latent is None else model.hidden_size // heads,
        }


@dataclass(frozen=True)
class Activation:
    """silu with a gate (swiglu), or gelu. The fused gelu with bias is the tanh approximation (fused_bias_gelu.py)."""

    keys: tuple[str, ...] = ("swiglu", "openai_gelu", "squared_relu", "quick_geglu", "bias_gelu_fusion")
    fields: tuple[str, ...] = ("hidden_act", "gated_mlp")

    def load(self, given: Foreign) -> dict[str, Any]:
        for key in ("squared_relu", "quick_geglu"):
            if given.get(key):
                raise FieldFault(f"{key}=True has no place here, only swiglu or gelu")
        if given.get("swiglu"):
            return {"hidden_act": "silu", "gated_mlp": True}
        fused = given.get("bias_gelu_fusion", True) and given.get("add_bias_linear", True)
        return {"hidden_act": "gelu_tanh" if given.get("openai_gelu") or fused else "gelu", "gated_mlp": False}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        act, gated = model.hidden_act, model.gated_mlp
        if (act, gated) not in (("silu", True), ("gelu", False), ("gelu_tanh", False)):
            raise FieldFault(f"hidden_act={act!r} with gated_mlp={gated} has no place, only silu with a gate or gelu")
        return {"swiglu": gated, "openai_gelu": act == "gelu_tanh", "bias_gelu_fusion": False}


@dataclass(frozen=True)
class Norms:
    """What norms are, and whether their weights are offsets from one."""

    keys: tuple[str, ...] = ("normalization", "apply_layernorm_1p")
    fields: tuple[str, ...] = ("norm", "norm_unit_offset")

    def load(self, given: Foreign) -> dict[str, Any]:
        word, offset = given.get("normalization", "LayerNorm"), bool(given.get("apply_layernorm_1p"))
        if word not in NORMS:
            raise FieldFault(f"normalization={word!r} is not one of {', '.join(NORMS)}")
        if offset and word != "RMSNorm":
            raise FieldFault(f"apply_layernorm_1p=True has no place with normalization={word!r}, only with 'RMSNorm'")
        return {"norm": NORMS[word], "norm_unit_offset": offset}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        word = next(word for word, ours in NORMS.items() if ours == model.norm)
        return {"normalization": word, "apply_layernorm_1p": model.norm_unit_offset}


@dataclass(frozen=True)
class HeadNorms:
    """qk_layernorm: of each head of queries and keys; of latents, where there are any, and then always."""

    keys: tuple[str, ...] = ("qk_layernorm",)
    fields: tuple[str, ...] = ("qk_norm",)

    def load(self, given: Foreign) -> dict[str, Any]:
        normed = bool(given.get("qk_layernorm"))
        if given.get("multi_latent_attention"):
            if not normed:
                raise FieldFault("qk_layernorm=False has no place with multi_latent_attention, only True")
            return {"qk_norm": "none"}
        return {"qk_norm": "head" if normed else "none"}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        if model.qk_norm == "full":
            raise FieldFault("qk_norm='full' has no place, only 'none' or 'head'")
        return {"qk_layernorm": model.qk_norm == "head" or model.latent is not None}


@dataclass(frozen=True)
class Biases:
    """One switch for all linear layers, and one for queries, keys and values alone."""

    keys: tuple[str, ...] = ("add_bias_linear", "add_qkv_bias")
    fields: tuple[str, ...] = ("attention_bias", "attention_output_bias", "mlp_bias")

    def load(self, given: Foreign) -> dict[str, Any]:
        everywhere = given.get("add_bias_linear", True)
        if everywhere and given.get("num_experts"):
            raise FieldFault(f"add_bias_linear={everywhere} has no place with experts, only False")
        qkv = everywhere or bool(given.get("add_qkv_bias"))
        return {"attention_bias": qkv, "attention_output_bias": everywhere, "mlp_bias": everywhere}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        said = {name: value for name, value in model.model_dump(include=set(self.fields)).items()}
        qkv, output, mlp = (said[name] for name in self.fields)
        if output != mlp or (output and not qkv) or (qkv and model.latent):
            words = ", ".join(f"{name}={value}" for name, value in said.items())
            raise FieldFault(f"{words}: biases are everywhere, nowhere, or on queries, keys and values alone")
        return {"add_bias_linear": output, "add_qkv_bias": qkv}


@dataclass(frozen=True)
class Window:
    """window_size: tokens before a query's own, and after; window_attn_skip_freq: which layers see all tokens."""

    keys: tuple[str, ...] = ("window_size", "window_attn_skip_freq")
    fields: tuple[str, ...] = ("sliding_window", "layer_types")

    def load(self, given: Foreign) -> dict[str, Any]:
        window, skip = given.get("window_size"), given.get("window_attn_skip_freq")
        if not window:
            return {"sliding_window": None, "layer_types": None}
        before, after = window
        if before < 0 or after != 0:
            raise FieldFault(f"window_size={tuple(window)} has no place here, only (tokens before, 0)")
        count = given["num_layers"]
        slides = [(layer % skip != 0) if isinstance(skip, int) else True for layer in range(1, count + 1)]
        if isinstance(skip, (list, tuple)):
            slides = [bool(one) for one in skip]
        if not any(slides):
            return {"sliding_window": None, "layer_types": None}
        kinds = None if all(slides) else tuple("sliding_attention" if one else "full_attention" for one in slides)
        return {"sliding_window": before + 1, "layer_types": kinds}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        if model.sliding_window is None:
            return {"window_size": None, "window_attn_skip_freq": None}
        slides = [int(model.slides(layer)) for layer in range(model.num_hidden_layers)]
        return {
            "window_size": (model.sliding_window - 1, 0),
            "window_attn_skip_freq": None if all(slides) else slides,
        }


@dataclass(frozen=True)
class Dropout:
    """One rate for embeddings and for what leaves attention and MLP."""

    keys: tuple[str, ...] = ("hidden_dropout",)
    fields: tuple[str, ...] = ("hidden_dropout", "embed_dropout")

    def load(self, given: Foreign) -> dict[str, Any]:
        return dict.fromkeys(self.fields, given.get("hidden_dropout", 0.1))

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        if model.embed_dropout != model.hidden_dropout:
            raise FieldFault(
                f"embed_dropout={model.embed_dropout}, hidden_dropout={model.hidden_dropout}: "
                "hidden_dropout is one rate for both"
            )
        return {"hidden_dropout": model.hidden_dropout}


@dataclass(frozen=True)
class Tie:
    """Whether the head has weights of its own."""

    keys: tuple[str, ...] = ("untie_embeddings_and_output_weights",)
    fields: tuple[str, ...] = ("tie_word_embeddings",)

    def load(self, given: Foreign) -> dict[str, Any]:
        return {"tie_word_embeddings": not given.get(self.keys[0], False)}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        return {self.keys[0]: not model.tie_word_embeddings}
