"""How commands that finish in a second start: imports at their fastest."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Imports inside take about a fifth less time.

    They make many objects and no garbage, so the collector would only search in vain, as it would later and when the
    process ends: it is told to leave them alone. NumPy's BLAS would start a thread for each core, which these commands,
    with threads of their own, could not use.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for them reads every package's metadata
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # once in a process: cycles of objects that are frozen are never freed
            gc.freeze()
        if collecting:
            gc.enable()
