"""The configuration files of the demo, written out so that its commands can be run again by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SEQ_LEN = 256
TASK_TOKENS = 64


@dataclass(frozen=True)
class Scale:
    """How much of everything: the full demo, or the quick one."""

    pretrain_seconds: float
    finetune_steps: int
    num_pairs: int
    num_train: int
    num_test: int


FULL = Scale(pretrain_seconds=100, finetune_steps=100, num_pairs=1000, num_train=12000, num_test=2000)
QUICK = Scale(pretrain_seconds=8, finetune_steps=12, num_pairs=100, num_train=600, num_test=200)


def pretrain_toml(folder: Path, scale: Scale) -> str:
    """A decoder of one million parameters over the embedded corpus, at TP=2."""
    return f"""# Written by `wb demo`: a decoder of 1 M parameters, two tensor-parallel ranks.
[model]                    # every hazard of a conversion: padding, shared KV heads, a gated MLP, a tied head
vocab_size = 2050          # not a multiple of what two ranks want: padded at run time, never in a file
hidden_size = 128
intermediate_size = 352
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 512
tie_word_embeddings = true

[parallel]
tp = 2

[batch]
global_size = 16
micro_size = 16
seq_len = {SEQ_LEN}

[data]
train = "{folder}/data/train"
valid = "{folder}/data/valid"
tokenizer = "{folder}/tokenizer"

[optim]
lr = 4e-3
min_lr = 2e-4
weight_decay = 0.1
schedule = "cosine"
warmup = 20

[eval]
batches = 8

[run]
dir = "{folder}/pretrain"
seconds = {scale.pretrain_seconds:g}
"""


def finetune_toml(folder: Path, scale: Scale, *, name: str, base: str, lora: bool) -> str:
    """Is this statement valid Python? Full fine-tuning, or LoRA, from `base`, at TP=2."""
    method = 'kind = "lora"\nr = 16\nalpha = 32' if lora else 'kind = "full"'
    return f"""# Written by `wb demo`: a classifier of Python statements.
base = "{base}"

[task]
kind = "classification"
train = "{folder}/pycola/train.jsonl"
test = "{folder}/pycola/test.jsonl"

[method]
{method}

[parallel]
tp = 2

[batch]
global_size = 64
micro_size = 16            # rows are padded to the longest of these
seq_len = {TASK_TOKENS}

[optim]
lr = 2e-3
warmup = {min(20, scale.finetune_steps // 4)}
schedule = "cosine"

[run]
dir = "{folder}/{name}"
steps = {scale.finetune_steps}
"""
