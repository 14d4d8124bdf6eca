"""One thread a process: ranks share the cores, and threads that wait for a busy core spin. No deadlines for examples of
hypothesis: on a busy machine they measure the neighbours."""

import os

from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"
settings.register_profile("workbench", deadline=None)
settings.load_profile("workbench")
