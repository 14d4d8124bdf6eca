"""Every collective is needed: with any one call of one taken out, some layout no longer trains like one process."""

from __future__ import annotations

import ast
import tempfile
from pathlib import Path

import pytest

from tests.helpers.mutation import ROOT, Site, sites, without
from tests.helpers.pairwise import Case
from tests.helpers.ranks import RankFailed, run_ranks
from tests.parity.case import PLAIN
from tests.parity.matrix import TOLERANCE, distance_of, ranks_of
from tests.parity.run import Seen, train

COLLECTIVES = frozenset(
    {
        "all_reduce",
        "all_gather",
        "start_all_gather",
        "reduce_scatter",
        "start_reduce_scatter",
        "pass_on",
        "exchange",
        "copy_to",
        "reduce_from",
        "gather_from",
        "gather_copies",
        "scatter_to",
        "complete_gradients",
        "_all_reduce_together",
    }
)
"""Not among them: messages between stages, without which the other side waits for ever, and what the ranks tell each
other of stopping and saving."""

TP: Case = {"tp": 2, "model": "biased"}
COPIES: Case = {"tp": 4}
SP: Case = {**TP, "sp": True}
CP: Case = {"cp": 2, "documents": True}
RING: Case = {**CP, "context": "ring"}
TIED: Case = {"pp": 2, "schedule": "1f1b"}
ANSWERS: Case = {"pp": 2, "schedule": "1f1b", "model": "answering", "tied": False}
MUON: Case = {"tp": 2, "optimizer": "muon"}
CHUNKS: Case = {"tp": 2, "loss_chunk": 5, "tied": False}
CHUNKS_SP: Case = {**CHUNKS, "sp": True}
UNTIED: Case = {"tp": 2, "tied": False}
LABELS: Case = {"tp": 2, "sp": True, "head": "labels"}
NORMED: Case = {"tp": 2, "model": "post"}
REPLICAS: Case = {"dp": 2, "shard": "zero2"}
EXPERTS: Case = {"dp": 2, "ep": 2, "model": "grouped"}
EXPERTS_TP: Case = {"tp": 2, "sp": True, "model": "grouped"}
EXPERTS_CP: Case = {"cp": 2, "model": "sparse"}
SHOWN_BY: dict[str, tuple[Case, ...]] = {
    "workbench.parallel.collectives": (TP, SP, LABELS, CP, EXPERTS),
    "workbench.parallel.sequence": (TP, SP, CHUNKS, CHUNKS_SP),
    "workbench.parallel.context": (CP,),
    "workbench.parallel.embedding": (TP, UNTIED, SP),
    "workbench.parallel.loss": (TP,),
    "workbench.parallel.chunked_loss": (CHUNKS,),
    "workbench.parallel.gradients": (COPIES, TIED, TP, ANSWERS),
    "workbench.parallel.whole": (MUON,),
    "workbench.models.norm": (NORMED,),
    "workbench.models.ring": (RING,),
    "workbench.models.moe": (EXPERTS, EXPERTS_TP),
    "workbench.models.router": (EXPERTS_CP, EXPERTS_TP),
    "workbench.models.balance": (EXPERTS, EXPERTS_TP),
    "pretrain.optimizer": (COPIES, TIED),
    "pretrain.step": (REPLICAS, TIED),
}
"""The layouts at which a call in a module is missed, quickest first."""
ELSEWHERE = {
    "workbench.models.decoder": "logits of evaluations: tests/pretrain/test_token_parity.py",
    "pretrain.evaluation": "scores over ranks: tests/pretrain/test_pipeline.py",
    "workbench.models.build": "no numbers",
    "workbench.parallel.axis": "the collectives themselves",
}
OF_ANOTHER_BACKEND = Site("workbench.parallel.sequence", "column_product", "gather_from", 0)
"""Reached by Transformer Engine alone: tests/parallel/backends/test_te.py."""
OF_UNEVEN_SIZES = (
    Site("workbench.models.moe", "SparseMLP._compute_elsewhere", "exchange", 0),
    Site("workbench.parallel.collectives", "_exchange", "exchange", 0),
)
"""Without which ranks send each other other sizes than they await, and processes end."""
OF_OUTPUTS = tuple(
    Site("workbench.parallel.collectives", function, "all_reduce", 0) for function in ("_Sum.forward", "_Sum.backward")
)
"""Of outputs that are no losses: without them embeddings differ at cp=2 in tests/finetune/test_row_tasks.py."""
EXCLUDED = (OF_ANOTHER_BACKEND, *OF_UNEVEN_SIZES, *OF_OUTPUTS)
FOUND = [s for module in SHOWN_BY for s in sites(module, COLLECTIVES) if s not in EXCLUDED]


def train_without(site: Site, case: Case, folder: str, ranks: int) -> Seen:
    """What this rank sees of a case with one call taken out."""
    with without(site):
        return train(case, folder, ranks)


def is_missed(site: Site, case: Case) -> bool:
    case = {**PLAIN, **case}
    ranks = ranks_of(case)
    with tempfile.TemporaryDirectory() as folder:
        try:
            seen = run_ranks(ranks, train_without, site, case, folder, ranks)
        except RankFailed:
            return True
    return not distance_of(case, seen).largest < TOLERANCE  # also when it is no number


@pytest.mark.parity
@pytest.mark.exhaustive
@pytest.mark.parametrize("site", FOUND, ids=str)
def test_a_collective_that_is_taken_out_is_missed(site: Site) -> None:
    assert any(is_missed(site, case) for case in SHOWN_BY[site.module])


@pytest.mark.parity
@pytest.mark.parametrize("case", [TP, SP, RING, MUON, CHUNKS_SP, EXPERTS, EXPERTS_TP, EXPERTS_CP], ids=str)
def test_with_every_call_in_place_the_same_layouts_agree(case: Case) -> None:
    case = {**PLAIN, **case}
    with tempfile.TemporaryDirectory() as folder:
        seen = run_ranks(ranks_of(case), train, case, folder, ranks_of(case))
    assert distance_of(case, seen).largest < TOLERANCE


def test_no_module_has_collectives_that_nobody_takes_out() -> None:
    calling = set()
    for folder in ("workbench/parallel", "workbench/models", "pretrain"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            module = str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
            if any(_called(node) in COLLECTIVES for node in ast.walk(ast.parse(Path(path).read_text()))):
                calling.add(module)
    assert calling <= SHOWN_BY.keys() | ELSEWHERE.keys(), calling - SHOWN_BY.keys() - ELSEWHERE.keys()


def _called(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
