"""Names and sizes of tensor element types, as safetensors spells them. No torch.

NumPy has no bfloat16: a BF16 tensor is carried as the uint16 that holds its bits.
"""

from typing import Final

ITEM_BYTES: Final[dict[str, int]] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

NUMPY_NAMES: Final[dict[str, str]] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "uint16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}

TORCH_NAMES: Final[dict[str, str]] = {**NUMPY_NAMES, "BF16": "bfloat16"}
