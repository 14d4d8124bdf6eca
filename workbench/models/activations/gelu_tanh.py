"""The tanh approximation of gelu (arXiv:1606.08415, sec. 2)."""

from functools import partial

import torch.nn.functional as F

ACTIVATION = partial(F.gelu, approximate="tanh")
