"""Every run-time parameter of a model and every logical tensor in it: the one table that all of the house reads.

Layers are built from these specs, so a layer's `shards()` and the offline planner cannot disagree. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from workbench.spec.attention_schema import latent_specs
from workbench.spec.expert_specs import expert_specs, router_specs
from workbench.spec.geometry import EMBED, FINAL, Initial, LogicalTensor, ParameterSpec, Part, Place
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig
from workbench.spec.norm_placement import PLACEMENTS, SUMS, BlockNorms

OPTIMIZER_PREFIX: Final = "optim."


def embedding_specs(model: ModelConfig, layout: ParallelLayout) -> tuple[ParameterSpec, ...]:
    """Token and position embeddings; when tied, the token embedding also lives where the head does.

    Biases by distance, which the layers of encoder or decoder share, are on every stage, whichever layers it has.
    """
    places: tuple[Place, ...] = (EMBED, FINAL) if tied_head(model) else (EMBED,)
    shape = (model.vocab_size, model.hidden_size)
    tokens = Part("embed_tokens.weight", shape, dim=0, pad_to=layout.vocab_multiple)
    specs = [ParameterSpec("embed_tokens.weight", (tokens,), places, "embedding")]
    if model.position_embedding == "learned":
        shape = (model.max_position_embeddings, model.hidden_size)
        positions = Part("embed_positions.weight", shape, partial_grad=layout.sequence_parallel)
        specs.append(ParameterSpec("embed_positions.weight", (positions,), (EMBED,), "embedding"))
    if model.type_vocab_size:
        shape = (model.type_vocab_size, model.hidden_size)
        types = Part("embed_types.weight", shape, partial_grad=layout.sequence_parallel)
        specs.append(ParameterSpec("embed_types.weight", (types,), (EMBED,), "embedding"))
    if model.embed_norm:
        specs += norm_specs(model, layout, "embed_norm", EMBED)
    if model.position_embedding == "relative":
        shape, everywhere = (model.relative_attention_num_buckets, model.num_attention_heads), model.num_hidden_layers
        for path in ("encoder_bias.weight", "decoder_bias.weight"):
            bias = Part(path, shape, dim=1, units=model.num_attention_heads)
            specs.append(ParameterSpec(path, (bias,), tuple(range(everywhere)), "embedding"))
    return tuple(specs)


def layer_specs(model: ModelConfig, layout: ParallelLayout, layer: int) -> tuple[ParameterSpec, ...]:
    """The parameters of one transformer layer."""
    base = f"layers.{layer}"
    hidden, d = model.hidden_size, model.head_dim
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads

    def qkv(suffix: str, *columns: int) -> tuple[Part, ...]:
        return (
            Part(f"{base}.self_attn.q_proj.{suffix}", (heads * d, *columns), dim=0, units=heads),
            Part(f"{base}.self_attn.k_proj.{suffix}", (kv_heads * d, *columns), dim=0, units=kv_heads, replicate=True),
            Part(f"{base}.self_attn.v_proj.{suffix}", (kv_heads * d, *columns), dim=0, units=kv_heads, replicate=True),
        )

    o_proj = Part(f"{base}.self_attn.o_proj.weight", (hidden, heads * model.value_head_dim), dim=1, units=heads)
    residual: Initial = "residual" if model.scale_residual_init else "normal"
    at = (layer,)
    before_attention, after_attention, before_mlp, after_mlp = (
        () if name is None else norm_specs(model, layout, f"{base}.{name}", layer) for name in block_norms(model)
    )
    specs = [
        *before_attention,
        *(
            latent_specs(model, model.latent, layout, layer)
            if model.latent is not None
            else (ParameterSpec(f"{base}.self_attn.qkv_proj.weight", qkv("weight", hidden), at, "matrix"),)
        ),
        ParameterSpec(f"{base}.self_attn.o_proj.weight", (o_proj,), at, "matrix", residual),
        *qk_norm_specs(model, f"{base}.self_attn", layer),
        *after_attention,
        *before_mlp,
        *feed_forward_specs(model, layout, layer),
        *after_mlp,
    ]
    if model.num_encoder_layers and layer >= model.num_encoder_layers:
        specs += cross_specs(model, layout, layer)
    if layer == model.num_encoder_layers - 1:
        specs += norm_specs(model, layout, "encoder_norm", layer)
    if model.attention_bias and model.latent is None:
        specs.append(ParameterSpec(f"{base}.self_attn.qkv_proj.bias", qkv("bias"), at, "bias", "zeros"))
    if model.attention_output_bias:
        o_bias = Part(f"{base}.self_attn.o_proj.bias", (hidden,), partial_grad=layout.sequence_parallel)
        specs.append(ParameterSpec(f"{base}.self_attn.o_proj.bias", (o_bias,), at, "bias", "zeros"))
    return tuple(specs)


def cross_specs(model: ModelConfig, layout: ParallelLayout, layer: int) -> tuple[ParameterSpec, ...]:
    """The attention of a decoder's layer to the encoder's output: queries of the one, keys and values of the other."""
    base, at = f"layers.{layer}.cross_attn", (layer,)
    hidden, heads, d = model.hidden_size, model.num_attention_heads, model.head_dim
    q, k, v = (Part(f"{base}.{name}_proj.weight", (heads * d, hidden), dim=0, units=heads) for name in "qkv")
    o = Part(f"{base}.o_proj.weight", (hidden, heads * d), dim=1, units=heads)
    residual: Initial = "residual" if model.scale_residual_init else "normal"
    return (
        *norm_specs(model, layout, f"layers.{layer}.cross_attention_layernorm", layer),
        ParameterSpec(f"{base}.q_proj.weight", (q,), at, "matrix"),
        ParameterSpec(f"{base}.kv_proj.weight", (k, v), at, "matrix"),
        ParameterSpec(f"{base}.o_proj.weight", (o,), at, "matrix", residual),
    )


def feed_forward_specs(model: ModelConfig, layout: ParallelLayout, layer: int) -> list[ParameterSpec]:
    """The MLP of a layer, or its router, its experts and the one that they share."""
    path, moe = f"layers.{layer}.mlp", model.moe
    if moe is None or not moe.has_experts(layer):
        return mlp_specs(model, layout, path, model.intermediate_size, layer)
    specs = [*router_specs(model, moe, layout, layer), *expert_specs(model, moe, layout, layer)]
    if width := moe.shared_expert_intermediate_size:
        specs += mlp_specs(model, layout, f"{path}.shared_expert", width, layer)
    return specs


def mlp_specs(model: ModelConfig, layout: ParallelLayout, path: str, width: int, layer: int) -> list[ParameterSpec]:
    """An MLP of this width."""
    hidden, at = model.hidden_size, (layer,)
    residual: Initial = "residual" if model.scale_residual_init else "normal"

    def up(suffix: str, *columns: int) -> tuple[Part, ...]:
        names = ("gate_proj", "up_proj") if model.gated_mlp else ("up_proj",)
        return tuple(Part(f"{path}.{name}.{suffix}", (width, *columns), dim=0) for name in names)

    down = Part(f"{path}.down_proj.weight", (hidden, width), dim=1)
    specs = [
        ParameterSpec(f"{path}.up_proj.weight", up("weight", hidden), at, "matrix"),
        ParameterSpec(f"{path}.down_proj.weight", (down,), at, "matrix", residual),
    ]
    if model.mlp_bias:
        specs.append(ParameterSpec(f"{path}.up_proj.bias", up("bias"), at, "bias", "zeros"))
        down_bias = Part(f"{path}.down_proj.bias", (hidden,), partial_grad=layout.sequence_parallel)
        specs.append(ParameterSpec(f"{path}.down_proj.bias", (down_bias,), at, "bias", "zeros"))
    return specs


def head_specs(model: ModelConfig, layout: ParallelLayout) -> tuple[ParameterSpec, ...]:
    """The last norm, if layers do not end with one, and the heads. A tied head has no weight of its own."""
    specs = list(norm_specs(model, layout, "norm", FINAL)) if has_final_norm(model) else []
    hidden, vocabulary = model.hidden_size, model.vocab_size
    if model.pooler:
        specs += dense_specs("pooler", (hidden, hidden), bias=True)
    if model.num_labels:
        specs += dense_specs("score", (model.num_labels, hidden), bias=model.pooler or model.label_tokens)
    if model.next_sentence:
        specs += dense_specs("next_sentence", (2, hidden), bias=True)
    if not predicts_words(model):
        return tuple(specs)
    if model.head_transform:
        partial = layout.sequence_parallel
        specs += dense_specs("head_transform", (hidden, hidden), bias=True, role="matrix", partial_grad=partial)
        specs += norm_specs(model, layout, "head_norm", FINAL)
    if not model.tie_word_embeddings:
        head = Part("lm_head.weight", (vocabulary, hidden), dim=0, pad_to=layout.vocab_multiple)
        specs.append(ParameterSpec("lm_head.weight", (head,), (FINAL,), "head"))
    if model.lm_head_bias:
        bias = Part("lm_head.bias", (vocabulary,), dim=0, pad_to=layout.vocab_multiple)
        specs.append(ParameterSpec("lm_head.bias", (bias,), (FINAL,), "bias", "zeros"))
    return tuple(specs)


def dense_specs(
    path: str,
    shape: tuple[int, int],
    *,
    bias: bool,
    role: Literal["matrix", "head"] = "head",
    partial_grad: bool = False,
) -> tuple[ParameterSpec, ...]:
    """A linear layer where the network ends, which every tensor rank holds whole."""
    weight = Part(f"{path}.weight", shape, partial_grad=partial_grad)
    specs = [ParameterSpec(f"{path}.weight", (weight,), (FINAL,), role)]
    if bias:
        part = Part(f"{path}.bias", shape[:1], partial_grad=partial_grad)
        specs.append(ParameterSpec(f"{path}.bias", (part,), (FINAL,), "bias", "zeros"))
    return tuple(specs)


def norm_specs(model: ModelConfig, layout: ParallelLayout, path: str, place: Place) -> tuple[ParameterSpec, ...]:
    """Scale, and shift if the norm has one. Under sequence parallelism each tensor rank norms other tokens, so it sees
    part of the gradient; so it is with all that acts between the cut layers."""
    weight = Part(f"{path}.weight", (model.hidden_size,), partial_grad=layout.sequence_parallel)
    specs = [ParameterSpec(f"{path}.weight", (weight,), (place,), "norm", _norm_init(model))]
    if model.norm == "layernorm":
        bias = Part(f"{path}.bias", (model.hidden_size,), partial_grad=layout.sequence_parallel)
        specs.append(ParameterSpec(f"{path}.bias", (bias,), (place,), "norm", "zeros"))
    return tuple(specs)


def block_norms(model: ModelConfig) -> BlockNorms:
    """A layer's norms. One that both branches of a parallel residual share is the one before attention."""
    before_attention, after_attention, before_mlp, after_mlp = PLACEMENTS[model.norm_placement]
    return before_attention, after_attention, None if model.shared_norm else before_mlp, after_mlp


def has_final_norm(model: ModelConfig) -> bool:
    """Whether a norm follows the last layer, which does not end with one of the residual stream."""
    return model.norm_placement != SUMS


def qk_norm_specs(model: ModelConfig, base: str, layer: int) -> Iterator[ParameterSpec]:
    """Scales of queries and keys: one for all heads, of whose gradient each tensor rank sees the part of its heads; or
    of the whole width, cut like the heads."""
    if model.qk_norm == "none":
        return
    d = model.head_dim
    for kind, count in (("q", model.num_attention_heads), ("k", model.num_key_value_heads)):
        name = f"{base}.{kind}_norm.weight"
        if model.qk_norm == "head":
            part = Part(name, (d,), partial_grad=True)
        else:
            part = Part(name, (count * d,), dim=0, units=count, replicate=kind == "k")
        yield ParameterSpec(name, (part,), (layer,), "norm", _norm_init(model))


def _norm_init(model: ModelConfig) -> Initial:
    return "zeros" if model.norm_unit_offset else "ones"


def weight_of(name: str) -> str:
    """The weight that a logical tensor is, or for a moment `optim.<kind>/<weight>` the one that it belongs to.

    A moment has its weight's shape and is cut by the same boxes.
    """
    return name.partition("/")[2] if name.startswith(OPTIMIZER_PREFIX) else name


def tied_head(model: ModelConfig) -> bool:
    """Whether the head on the last stage reuses the token embedding."""
    return model.tie_word_embeddings and predicts_words(model)


def predicts_words(model: ModelConfig) -> bool:
    """Whether the network ends with a head over the vocabulary."""
    return model.lm_head and not model.num_labels


def parameter_specs(model: ModelConfig, layout: ParallelLayout) -> tuple[ParameterSpec, ...]:
    """Every run-time parameter of the whole model, in network order."""
    layers = (spec for layer in range(model.num_hidden_layers) for spec in layer_specs(model, layout, layer))
    return (*embedding_specs(model, layout), *layers, *head_specs(model, layout))


def logical_tensors(model: ModelConfig, dtype: str) -> dict[str, LogicalTensor]:
    """Every logical tensor of the model by name, in network order."""
    return {
        part.name: LogicalTensor(part.name, part.shape, dtype)
        for spec in parameter_specs(model, ParallelLayout())
        for part in spec.parts
    }


def num_parameters(model: ModelConfig) -> int:
    """Elements of all logical tensors; a tied embedding counts once, padding never."""
    return sum(tensor.numel for tensor in logical_tensors(model, "F32").values())


def num_active_parameters(model: ModelConfig) -> int:
    """Those of `num_parameters` that compute a token: of the experts of a layer only the ones that it takes."""
    if model.moe is None:
        return num_parameters(model)
    layers, idle = (
        model.moe.sparse_layers(model.num_hidden_layers),
        model.moe.num_experts - model.moe.num_experts_per_tok,
    )
    return num_parameters(model) - len(layers) * idle * expert_size(model)


def expert_size(model: ModelConfig) -> int:
    """Elements of one expert."""
    assert model.moe is not None
    return model.hidden_size * model.moe.moe_intermediate_size * (3 if model.gated_mlp else 2)


def stage_specs(model: ModelConfig, layout: ParallelLayout, stage: int) -> Iterator[ParameterSpec]:
    """The parameters that live on `stage` of the pipeline."""
    here = stage_places(model, layout, stage)
    return (spec for spec in parameter_specs(model, layout) if here.intersection(spec.places))


def stage_places(model: ModelConfig, layout: ParallelLayout, stage: int) -> set[Place]:
    """The positions of the network that lie on `stage` of the pipeline."""
    here: set[Place] = set(layout.layers(model.num_hidden_layers, stage))
    if stage == 0:
        here.add(EMBED)
    if stage == layout.last_stage:
        here.add(FINAL)
    return here
