"""Dequantize routines. The torch reference serves every format on every device."""

from diffquant.runtime.kernels.reference import KERNELS, ROWWISE, Kernel, Parts

__all__ = ["KERNELS", "ROWWISE", "Kernel", "Parts"]
