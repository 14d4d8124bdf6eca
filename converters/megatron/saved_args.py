"""The `args` that Megatron-LM finds in a checkpoint of ours. No torch."""

from __future__ import annotations

from argparse import Namespace
from typing import Final

from converters.containers.torch_zip import torch_dtype
from converters.format import WriteRequest
from converters.megatron.arguments import dump_arguments
from converters.megatron.stages import dump_layout
from workbench.checkpoint.manifest import TrainingState
from workbench.errors import ConversionError

CHECKPOINT_VERSION: Final = 3.0


def saved_args(request: WriteRequest, training: TrainingState | None, *, ckpt_format: str) -> Namespace:
    """What says the model, its layout and its type of weights, and where a run stood if it is to go on.

    ConversionError when Megatron's GPT cannot have a feature of the model, or its pipeline this layout.
    """
    model, layout = request.model, request.layout
    if layout.placement != "loop" and layout.vpp > 1:
        raise ConversionError(
            f"placement={layout.placement!r}: Megatron's stages go round in a loop; give --vpp 1, or --pp anew"
        )
    if layout.vpp > 1 and layout.pp == 1:
        raise ConversionError(f"vpp={layout.vpp} with pp=1: Megatron has chunks in a pipeline only; use --vpp 1")
    where = {} if training is None else _run(training)
    dtype = request.schema["embed_tokens.weight"].dtype
    shared_out = ckpt_format == "torch_dist" or request.megatron.distributed_optimizer
    return Namespace(
        **dump_arguments(model),
        **dump_layout(model, layout),
        **{"seq_length": model.max_length, **where},
        params_dtype=torch_dtype(dtype),
        bf16=dtype == "BF16",
        fp16=dtype == "F16",
        transformer_impl="local" if request.megatron.own_layers else "transformer_engine",
        moe_grouped_gemm=False,
        use_distributed_optimizer=shared_out and training is not None,
        overlap_grad_reduce=False,
        data_parallel_random_init=False,
        tokenizer_type="HuggingFaceTokenizer",
        ckpt_format=ckpt_format,
    )


def _run(training: TrainingState) -> dict[str, int]:
    """Where a run stood. Sizes of a batch are those of its average step."""
    found = {"iteration": training.step, "consumed_train_samples": training.samples, "seed": training.seed}
    if training.step and training.samples:
        found |= {
            "global_batch_size": training.samples // training.step,
            "seq_length": training.tokens // training.samples,
        }
    return found
