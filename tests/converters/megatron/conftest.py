"""What megatron-core trains once for all tests of these folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.megatron_trained import train

MODES = ("dp_reshardable", "fully_reshardable", "legacy", "plain", "plain_legacy")
QUICK: dict[str, dict[str, Any]] = {
    "buckets": {"tp": 2, "pp": 2, "tied": True, "bucket_size": 2000, "modes": MODES[:3]},
    "experts": {"dp": 2, "ep": 2, "experts": 4, "dtype": "float16", "modes": MODES},
    "biases": {"tp": 2, "biases": True, "modes": MODES[-1:]},
}


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("megatron"), QUICK)


def trained(root: Path, cases: dict[str, dict[str, Any]]) -> Path:
    train({str(root / name): what for name, what in cases.items()})
    return root
