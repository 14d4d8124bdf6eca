"""One thread a process: ranks share the cores, and threads that wait for a busy core spin."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
