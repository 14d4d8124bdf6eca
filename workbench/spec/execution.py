"""How a stage computes what its model says, and what of it does not go together. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig
from workbench.spec.schema import layer_specs

Backend = Literal["torch", "te"]
LinearPrecision = Literal[
    "compute", "fp8_tensorwise", "fp8_rowwise", "te:delayed", "te:current", "te:blockwise", "te:mxfp8"
]
Recompute = Literal["none", "selective", "full"]
FrozenFormat = Literal["plain", "nf4"]

_FP8_MULTIPLE = 16  # torch._scaled_mm, and Transformer Engine's assert_dim_for_fp8_exec
_MXFP8_MULTIPLE = 32  # a block shares a scale (Transformer Engine, get_align_size_for_quantization)
NF4_BLOCK = 64  # elements of a row that share a scale, as in transformers (bitsandbytes, Params4bit)


@dataclass(frozen=True)
class StageOptions:
    """How a stage computes what its model says.

    compile_blocks: compile each layer with torch.compile. split_backward: backward leaves the products for the weights'
    gradients in `BuiltStage.gemm.waiting`. backend: who executes linear layers, norms and attention. linear: the format
    of the products in the layers' linear layers. recompute: what backward computes again; offload: whether what it
    keeps waits in the host's memory. loss_chunk_tokens: tokens whose logits exist at once; 0: all. grad_reduce: in
    which replicas sum gradients. label_smoothing: the share of each label that is spread over all while training.
    embedding_noise: NEFTune's alpha, how much noise embeddings get while training. frozen_format: how frozen weights of
    the layers' linear layers are held.
    """

    compile_blocks: bool = False
    split_backward: bool = False
    backend: Backend = "torch"
    linear: LinearPrecision = "compute"
    recompute: Recompute = "none"
    offload: bool = False
    loss_chunk_tokens: int = 0
    grad_reduce: Literal["fp32", "bf16"] = "fp32"
    label_smoothing: float = 0.0
    embedding_noise: float = 0.0
    frozen_format: FrozenFormat = "plain"

    @property
    def te_recipe(self) -> str | None:
        """The name of Transformer Engine's fp8 recipe, if one is asked for."""
        return self.linear.removeprefix("te:") if self.linear.startswith("te:") else None


def execution_faults(options: StageOptions, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    """Every reason why a stage cannot be computed in this way."""
    return [
        *compile_faults(options, model, layout),
        *fp8_size_faults(options, model, layout),
        *te_faults(options, model, layout),
        *expert_faults(options, model),
        *nf4_faults(options, model, layout),
    ]


def compile_faults(options: StageOptions, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    """Why layers cannot be compiled in this way, if they cannot."""
    if not options.compile_blocks:
        return []
    found = []
    if options.split_backward:
        found.append(
            "kernels.compile=true and a schedule that splits the backward: each waiting product would break the graph "
            "of its layer; use another schedule (1f1b) or compile = false"
        )
    if options.backend == "te":
        found.append("kernels.compile=true and kernels.backend='te': its kernels are closed to torch.compile; drop one")
    if layout.sequence_parallel or layout.cp > 1:
        sharing = "sequence_parallel" if layout.sequence_parallel else f"cp={layout.cp}"
        found.append(
            f"kernels.compile=true and {sharing}: collectives that run beside products break the graph of each layer, "
            "and torch.compile gives up after a few; use compile = false"
        )
    if options.recompute == "full" and (model.attention_dropout or model.hidden_dropout or model.mlp_dropout):
        found.append(
            "kernels.compile=true and recompute.mode='full' with dropout in the layers: the seeds of dropout are made "
            "outside of graphs, so no layer would be compiled; use recompute.mode = 'selective', compile = false or no "
            "dropout"
        )
    return found


def fp8_size_faults(options: StageOptions, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    """The linear layers whose local sizes an fp8 product does not take."""
    if options.linear == "compute" or layout.faults(model):
        return []
    multiple = _MXFP8_MULTIPLE if options.te_recipe == "mxfp8" else _FP8_MULTIPLE
    found = _odd_matrices(model, layout, lambda outputs, inputs: bool(outputs % multiple or inputs % multiple))
    if not found:
        return []
    return [
        f"precision.linear={options.linear!r} multiplies matrices whose sizes are multiples of {multiple}, but on each "
        f"of tp={layout.tp} ranks {', '.join(found)} are not; use other sizes, a smaller tp or linear = 'compute'"
    ]


def _odd_matrices(model: ModelConfig, layout: ParallelLayout, is_odd: Callable[[int, int], bool]) -> list[str]:
    """The linear layers whose local outputs and inputs are such, by name and size."""
    found = []
    # The last layer has all kinds of matrices that there are.
    last = model.num_hidden_layers - 1
    for spec in layer_specs(model, layout, last):
        outputs, *inputs = spec.local_shape(layout.tp)
        if spec.role == "matrix" and is_odd(outputs, inputs[0]):
            name = spec.path.removesuffix(".weight").replace(f"layers.{last}", "layers.*")
            found.append(f"{name} {outputs} x {inputs[0]}")
    return found


def te_faults(options: StageOptions, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    """Why Transformer Engine cannot execute the stage, if it is asked to and cannot."""
    if options.te_recipe is not None and options.backend != "te":
        return [f"precision.linear={options.linear!r} needs kernels.backend = 'te', not {options.backend!r}"]
    if options.backend != "te":
        return []
    found = []
    if options.split_backward:
        found.append(
            "kernels.backend='te' computes both gradients of a layer at once; "
            "use a schedule that does not split the backward (1f1b) or backend = 'torch'"
        )
    if model.num_encoder_layers:
        found.append(
            f"kernels.backend='te' and num_encoder_layers={model.num_encoder_layers}: its attention knows no biases by "
            "distance; use backend = 'torch'"
        )
    if not model.causal:
        found.append(
            "kernels.backend='te' and model.causal=false: its attention is set up for tokens that see the past alone; "
            "use backend = 'torch'"
        )
    if model.attention_dropout:
        found.append(
            f"kernels.backend='te' and model.attention_dropout={model.attention_dropout:g}: its dropout depends on the "
            "layout; use attention_dropout = 0 or backend = 'torch'"
        )
    if model.latent is not None:
        found.append(
            "kernels.backend='te' and model.latent: keys and values from a latent do not reach its attention; "
            "use backend = 'torch'"
        )
    scoring = {"attention_mask", "sliding_window", "attn_logit_softcapping", "query_pre_attn_scalar"}
    for name, value in model.model_dump(include=scoring).items():
        if value not in (None, "causal"):
            found.append(
                f"kernels.backend='te' and model.{name}={value}: its attention knows plain causal scores alone; "
                "use backend = 'torch'"
            )
    if layout.cp > 1:
        found.append(
            f"kernels.backend='te' and cp={layout.cp}: its attention does not know how we deal out a sequence; "
            "use cp = 1 or backend = 'torch'"
        )
    if options.te_recipe == "delayed" and options.recompute == "full":
        found.append(
            "precision.linear='te:delayed' and recompute.mode='full': computing a layer again would count its largest "
            "values twice; use 'te:current' or recompute.mode = 'selective'"
        )
    return found


def expert_faults(options: StageOptions, model: ModelConfig) -> list[str]:
    """Why experts cannot be computed in this way, if they cannot."""
    if model.moe is None:
        return []
    found = []
    if options.compile_blocks:
        found.append(
            "kernels.compile=true and model.moe: how many tokens each expert gets changes with every batch, which "
            "breaks the graph of its layer; use compile = false"
        )
    if options.linear != "compute":
        found.append(
            f"precision.linear={options.linear!r} and model.moe: experts are multiplied in groups, for which there is "
            "no such product here; use linear = 'compute'"
        )
    if options.backend == "te":
        found.append("kernels.backend='te' and model.moe: it does not get the experts here; use backend = 'torch'")
    return found


def nf4_faults(options: StageOptions, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    """Why frozen weights cannot be held in 4 bits, if they are to be and cannot."""
    if options.frozen_format == "plain":
        return []
    this, found = f"method.frozen_format={options.frozen_format!r}", []
    if options.compile_blocks:
        found.append(f"{this} and kernels.compile=true: unpacking a weight breaks the graph of its layer; drop one")
    if options.backend == "te":
        found.append(f"{this} and kernels.backend='te': its products take whole weights; use backend = 'torch'")
    if options.linear != "compute":
        found.append(f"{this} and precision.linear={options.linear!r} are two formats of one product; drop one")
    if model.moe is not None:
        found.append(f"{this} and model.moe: experts are multiplied in groups, by whole weights; use 'plain'")
    if layout.shard != "none":
        found.append(
            f"{this} and parallel.shard={layout.shard!r}: each replica keeps its packed weights whole; use "
            "shard = 'none'"
        )
    if found or layout.faults(model):
        return found
    if odd := _odd_matrices(model, layout, lambda outputs, inputs: bool(inputs % NF4_BLOCK)):
        found.append(
            f"{this} packs blocks of {NF4_BLOCK} inputs, but on each of tp={layout.tp} ranks {', '.join(odd)} "
            "(outputs x inputs) would have part of one; use other sizes, a smaller tp or 'plain'"
        )
    return found
