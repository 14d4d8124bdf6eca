"""x * Phi(x) (arXiv:1606.08415)."""

import torch.nn.functional as F

ACTIVATION = F.gelu
