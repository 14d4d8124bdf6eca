"""max(x, 0)."""

import torch.nn.functional as F

ACTIVATION = F.relu
