"""Tensors of a folder for torchtitan: as of all that torch.distributed.checkpoint stores."""

from converters.independent.dcp import DcpFiles

READER = DcpFiles
