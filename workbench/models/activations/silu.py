"""x * sigmoid(x) (arXiv:1702.03118)."""

import torch.nn.functional as F

ACTIVATION = F.silu
