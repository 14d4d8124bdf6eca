"""Checkpoints of torchtitan: folders of torch.distributed.checkpoint with its names. Read as all such folders are."""

from converters.formats._dcp_names import TORCHTITAN
from converters.formats.torch_dcp import DcpFormat

FORMAT = DcpFormat("torchtitan", TORCHTITAN)
