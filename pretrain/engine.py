"""The face of the training engine: what other packages may import. The rest of `pretrain` is its own business.

A run is a Trainer over a Subject (what is trained), an Objective (what it learns from) and an EngineConfig.
"""

from pretrain.config import EngineConfig, length_faults
from pretrain.criterion import Criterion
from pretrain.data.masking import Vocabulary, draws
from pretrain.data.permutation import Permutation
from pretrain.evaluation import evaluate
from pretrain.objective import Evaluation, NextToken, NextTokenLoss, Objective, Rows, Share, to_batch
from pretrain.pipeline import Pipeline
from pretrain.schedules import schedule_named
from pretrain.trainer import RunResult, Subject, Trainer, Watcher

__all__ = [
    "Criterion",
    "EngineConfig",
    "Evaluation",
    "NextToken",
    "NextTokenLoss",
    "Objective",
    "Permutation",
    "Pipeline",
    "Rows",
    "RunResult",
    "Share",
    "Subject",
    "Trainer",
    "Vocabulary",
    "Watcher",
    "draws",
    "evaluate",
    "length_faults",
    "schedule_named",
    "to_batch",
]
