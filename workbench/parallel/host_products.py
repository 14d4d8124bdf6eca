"""How fast a CPU multiplies in fp32."""

from __future__ import annotations

import torch

_ROUNDING = 1e-5  # of the largest result: fp32 stays below 1e-6 in the products that are tried, bf16 above 1e-3
_TRIED = ((256, 256, 256), (64, 512, 1024))  # rows, contracted, columns


def quicken_products() -> None:
    """Has oneDNN make this process's fp32 matrix products on AMD processors with AVX-512; elsewhere does nothing.

    torch asks MKL, which keeps its AVX-512 kernels for Intel's processors and is half as fast here. The one way to
    oneDNN is to allow it bf16 inside of a product. It has kernels that use the permission for processors with AMX only,
    where this is not called; and what it makes of two products is compared with float64 before it is trusted.
    """
    processor = torch.cpu.get_capabilities()
    amd = str(processor.get("cpu_name")).startswith("AMD")
    if not (amd and processor.get("avx512_f")) or processor.get("amx_tile") or not torch.backends.mkl.is_available():
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    if not keeps_fp32():
        torch.set_float32_matmul_precision(before)


def keeps_fp32() -> bool:
    """Whether products of fp32 matrices on the CPU, plain and batched, are rounded as fp32 is."""
    generator = torch.Generator().manual_seed(0)
    for rows, contracted, columns in _TRIED:
        a = torch.randn(4, rows, contracted, generator=generator)
        b = torch.randn(4, contracted, columns, generator=generator)
        exact = a.double() @ b.double()
        for found, wanted in ((a @ b, exact), (a[0] @ b[0], exact[0])):
            if (found - wanted).abs().max() > _ROUNDING * wanted.abs().max():
                return False
    return True
