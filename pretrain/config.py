"""The configuration of a training run: one table a concern, checked before any process starts. No torch."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, PositiveFloat, field_validator, model_validator

from pretrain import capabilities
from pretrain.data.config import DataConfig
from pretrain.judging import EvalTable
from pretrain.lr import Curve, CurveName
from pretrain.schedules import schedule_named
from workbench.config import Config
from workbench.errors import LayoutError
from workbench.spec.execution import Backend, LinearPrecision, Recompute, StageOptions
from workbench.spec.layout import Degrees, ParallelLayout
from workbench.spec.model import ModelConfig


class ParallelTable(Degrees):
    """How the model and the batch are spread over ranks."""

    dp: int | Literal["auto"] = Field(
        default="auto", description="Copies of the model that split the batch; auto: as many as the ranks allow."
    )
    schedule: str = Field(
        default="1f1b",
        description="Pipeline schedule: gpipe, 1f1b, zb_h1 (vpp = 1); interleaved, interleaved_zb (any vpp); zbv, "
        "dualpipev (vpp = 2). `wb check` says how long it waits.",
    )

    @field_validator("dp")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"must be at least 1 or 'auto', not {value}")
        return value

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, value: str) -> str:
        schedule_named(value)
        return value

    def schedule_faults(self) -> list[str]:
        """Why the schedule cannot run with this many chunks a stage, if it cannot."""
        return schedule_named(self.schedule).faults(self.vpp)

    def num_ranks(self) -> int:
        """The ranks that this table asks for; dp = "auto" asks for one copy of the model, or as many as `ep` takes."""
        return self.tp * self.cp * self.pp * (math.ceil(self.ep / self.cp) if self.dp == "auto" else self.dp)

    def layout(self, num_ranks: int) -> ParallelLayout:
        """The layout over `num_ranks` ranks; LayoutError when they do not fit."""
        model_ranks = self.tp * self.cp * self.pp
        dp = num_ranks // model_ranks if self.dp == "auto" else self.dp
        if dp * model_ranks != num_ranks:
            asked = (
                f"tp={self.tp} x "
                + (f"cp={self.cp} x " if self.cp > 1 else "")
                + f"pp={self.pp}"
                + ("" if self.dp == "auto" else f" x dp={self.dp}")
            )
            raise LayoutError(
                f"{num_ranks} ranks were given, but {asked} needs "
                + (f"a multiple of {model_ranks}" if self.dp == "auto" else f"{model_ranks * dp}")
                + "; change --nproc or [parallel]"
            )
        return ParallelLayout(
            dp=dp,
            placement=schedule_named(self.schedule).placement,
            **self.model_dump(exclude={"dp", "schedule"}),
        )


class BatchTable(Config):
    """How many sequences make a step."""

    global_size: int = Field(default=32, gt=0, description="Sequences in a step, over all ranks.")
    micro_size: int = Field(default=4, gt=0, description="Sequences that a rank computes at once.")
    seq_len: int = Field(default=256, gt=0, description="Tokens in a sequence.")

    def num_microbatches(self, dp: int) -> int:
        """Microbatches that each of `dp` data-parallel ranks computes in a step."""
        return max(self.global_size // (self.micro_size * dp), 1)

    def faults(self, dp: int) -> list[str]:
        """Why the batch cannot be dealt out over `dp` data-parallel ranks, if it cannot."""
        if self.global_size % (dp * self.micro_size):
            nearest = max(1, round(self.global_size / (dp * self.micro_size))) * dp * self.micro_size
            return [
                f"batch.global_size={self.global_size} is not a multiple of dp={dp} x "
                f"batch.micro_size={self.micro_size}; use {nearest}, or another micro_size"
            ]
        return []


class OptimTable(Config):
    """The optimizer and its learning rate."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: orthogonalised momentum for matrices, AdamW for everything else."
    )
    lr: float = Field(default=3e-4, gt=0, description="Peak learning rate.")
    min_lr: float = Field(default=0.0, ge=0, description="Learning rate at the end of a falling curve.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's decay of its two moments.")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's least denominator.")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Muon's decay of its momentum.")
    weight_decay: float = Field(default=0.1, ge=0, description="Not applied to biases and norms.")
    clip: float = Field(default=1.0, ge=0, description="Limit of the global gradient norm; 0: no limit.")
    schedule: CurveName = Field(default="cosine", description="Curve of the learning rate after its warm-up.")
    warmup: int = Field(default=0, ge=0, description="Steps over which the learning rate rises to its peak.")
    decay_share: float = Field(default=0.2, gt=0, le=1, description="wsd: the share of the run that decays.")
    moments: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Format of moments between updates; bf16 halves them, rounded up or down at random."
    )
    offload: bool = Field(
        default=False,
        description="Keep moments in the memory of the host; an update moves them to the GPU and back. On a CPU they "
        "are there anyway.",
    )

    @model_validator(mode="after")
    def _floor_below_peak(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}; lower it")
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas={self.betas}: each must be at least 0 and below 1")
        return self

    def curve(self, steps: int | None) -> Curve:
        """The learning rate over a run of `steps` steps (None: not known)."""
        return Curve(self.schedule, self.lr, self.min_lr, self.warmup, steps, self.decay_share)


class PrecisionTable(Config):
    """Number formats. Parameters are fp32, and so are the sums of gradients over microbatches."""

    compute: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Format of activations and matrix products."
    )
    linear: LinearPrecision = Field(
        default="compute",
        description="Format of the products in the layers' linear layers: that of compute; fp8 with a scale a tensor "
        "or a row; or a recipe of Transformer Engine. The head stays in compute.",
    )
    grad_reduce: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Format in which replicas sum their gradients; bf16 halves what they send."
    )
    loss_scale: Literal["dynamic"] | PositiveFloat = Field(
        default="dynamic",
        description="fp16: what the loss is multiplied by so that small gradients are not lost; dynamic: as much as "
        "goes, and a step whose gradient overflows is skipped.",
    )
    growth_interval: int = Field(
        default=2000, gt=0, description="fp16: finite steps after which a dynamic loss_scale doubles."
    )


class KernelsTable(Config):
    """Who executes the layers."""

    backend: Literal["auto", "torch", "te"] = Field(
        default="torch", description="torch, Transformer Engine (te), or te where it can run and else torch (auto)."
    )
    compile: bool = Field(default=False, description="Compile each layer with torch.compile.")
    loss_chunk_tokens: int = Field(
        default=0,
        ge=0,
        description="Tokens whose logits exist at once in the loss of a microbatch; 0: all of them.",
    )


class RecomputeTable(Config):
    """Time for memory: what backward computes again instead of keeping it."""

    mode: Recompute = Field(
        default="none",
        description="selective: the cores of attention and MLP, without linear layers; full: whole layers.",
    )
    offload: bool = Field(
        default=False, description="What the layers keep for backward waits in the host's memory (on GPUs)."
    )


class CheckpointTable(Config):
    """When to save. A run saves at its end in any case."""

    every: int = Field(default=0, ge=0, description="Steps between checkpoints; 0: only at the end.")
    keep: int = Field(default=0, ge=0, description="Checkpoints to keep, newest first; 0: all.")
    keep_best: bool = Field(
        default=False, description="Save when an evaluation is the best so far (eval.metric), and keep that one too."
    )
    optimizer: bool = Field(default=True, description="Save the optimizer's moments, so that the run can go on.")


class LogTable(Config):
    """What is written while training."""

    every: int = Field(default=10, gt=0, description="Steps between rows of metrics.jsonl.")
    tensorboard: bool = Field(default=True, description="Write TensorBoard events as well, if it is installed.")
    wandb_project: str = Field(
        default="", description="Report to this project of Weights & Biases as well (needs the extra `track`)."
    )
    peak_tflops: float | Literal["auto", "measure"] = Field(
        default="auto",
        description="What MFU is measured against, per rank: auto knows some GPUs; measure times a matrix product.",
    )


class RunTable(Config):
    """Where a run lives and how long it takes: until the first of steps, tokens and seconds is reached."""

    dir: str = Field(default="runs/pretrain", min_length=1, description="Folder of this run.")
    steps: int | None = Field(default=None, ge=0, description="Updates to make; 0 saves the initial model.")
    tokens: int | None = Field(default=None, gt=0, description="Training tokens, rounded up to whole steps.")
    seconds: float | None = Field(default=None, gt=0, description="Time to train, without start and final save.")
    seed: int = Field(default=1234, ge=0, description="Seed of initial weights, dropout and rounding.")
    deterministic: bool = Field(
        default=False, description="The same bits from every run on the same machines; slower on a GPU."
    )
    resume: Literal["auto", "never", "must"] = Field(
        default="auto", description="Go on from the newest checkpoint in dir: if there is one, never, or fail without."
    )

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        if self.steps is None and self.tokens is None and self.seconds is None:
            raise ValueError("the run has no end; give steps, tokens or seconds")
        return self


class EngineConfig(Config):
    """What every training run has, whatever it trains."""

    parallel: ParallelTable = ParallelTable()
    batch: BatchTable = BatchTable()
    optim: OptimTable = OptimTable()
    precision: PrecisionTable = PrecisionTable()
    kernels: KernelsTable = KernelsTable()
    recompute: RecomputeTable = RecomputeTable()
    checkpoint: CheckpointTable = CheckpointTable()
    eval: EvalTable = EvalTable()
    log: LogTable = LogTable()
    run: RunTable

    @model_validator(mode="after")
    def _is_judged_while_it_runs(self) -> Self:
        if self.needs_best and not self.eval.every:
            asked = f"eval.patience={self.eval.patience}" if self.eval.patience else "checkpoint.keep_best=true"
            raise ValueError(f"{asked} needs evaluations while the run goes on, but eval.every=0; set eval.every")
        return self

    @property
    def needs_best(self) -> bool:
        """Whether the run must know which of its evaluations was the best."""
        return bool(self.eval.patience) or self.checkpoint.keep_best

    @property
    def step_tokens(self) -> int:
        """Tokens in a step."""
        return self.batch.global_size * self.batch.seq_len

    def planned_steps(self) -> int | None:
        """Steps that `run.steps` and `run.tokens` allow; None when only time bounds the run."""
        bounds = [] if self.run.steps is None else [self.run.steps]
        if self.run.tokens is not None:
            bounds.append(math.ceil(self.run.tokens / self.step_tokens))
        return min(bounds, default=None)

    def stage_options(self, backend: Backend) -> StageOptions:
        """How a stage is computed, by the backend that was chosen."""
        return StageOptions(
            compile_blocks=self.kernels.compile,
            split_backward=schedule_named(self.parallel.schedule).splits_backward,
            grad_reduce=self.precision.grad_reduce,
            backend=backend,
            linear=self.precision.linear,
            recompute=self.recompute.mode,
            offload=self.recompute.offload,
            loss_chunk_tokens=self.kernels.loss_chunk_tokens,
        )

    @property
    def asked_backend(self) -> Literal["auto", "torch", "te"]:
        """The backend that is asked for; a recipe of Transformer Engine leaves no choice."""
        is_open = self.kernels.backend == "auto"
        return "te" if is_open and self.precision.linear.startswith("te:") else self.kernels.backend

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether rows hold several documents that do not see each other."""
        return False

    @property
    def keeps_steps_whole(self) -> bool:
        """Whether the loss of a row depends on all the others of its step."""
        return False

    def resolve_layout(self, model: ModelConfig, num_ranks: int) -> ParallelLayout:
        """The layout over `num_ranks` ranks; one LayoutError with everything that does not fit model and batch."""
        layout = self.parallel.layout(num_ranks)
        if found := capabilities.faults(self, model, layout):
            raise LayoutError("; ".join(found))
        return layout


def length_faults(model: ModelConfig, seq_len: int) -> list[str]:
    """Why sequences of `seq_len` tokens are too long for the model, if they are."""
    if seq_len > model.max_length:
        scaled = "" if model.max_length == model.max_position_embeddings else f" x factor = {model.max_length}"
        return [
            f"batch.seq_len={seq_len} is longer than model.max_position_embeddings={model.max_position_embeddings}"
            f"{scaled}; lower the one or raise the other"
        ]
    return []


def objective_faults(model: ModelConfig, data: DataConfig) -> list[str]:
    """Why the model cannot learn what the data's rows ask for, if it cannot."""
    found = []
    if model.num_labels:
        found.append(f"model.num_labels={model.num_labels}, but pretraining needs the language-model head; remove it")
    elif not model.lm_head:
        found.append("model.lm_head=false, but pretraining predicts words; set lm_head = true")
    fits = "span" if model.num_encoder_layers else "causal" if model.causal else "masked"
    if data.objective != fits:
        why = {
            "span": f"num_encoder_layers={model.num_encoder_layers}, whose decoder spells out hidden spans",
            "causal": "causal=true, whose tokens see those before them alone",
            "masked": "causal=false, whose tokens would see the one that they are to tell",
        }
        found.append(f"data.objective={data.objective!r} for a model with {why[fits]}; use objective = {fits!r}")
    if model.next_sentence != data.next_sentence:
        found.append(
            f"data.next_sentence={str(data.next_sentence).lower()}, but model.next_sentence="
            f"{str(model.next_sentence).lower()}: rows and head must both be of pairs, or neither; make them equal"
        )
    return found


class PretrainConfig(EngineConfig):
    """A run that learns from token files, from initial weights."""

    model: ModelConfig
    data: DataConfig

    @property
    def keeps_documents_apart(self) -> bool:
        return self.data.mask_documents

    @model_validator(mode="after")
    def _fits(self) -> Self:
        found = length_faults(self.model, self.batch.seq_len)
        found += objective_faults(self.model, self.data)
        if self.parallel.dp != "auto":
            found += self.batch.faults(self.parallel.dp)
        steps = self.planned_steps()
        if steps and self.optim.warmup > steps:
            found.append(f"optim.warmup={self.optim.warmup} is longer than the run of {steps} steps; lower it")
        if found:
            raise ValueError("; ".join(found))
        return self
