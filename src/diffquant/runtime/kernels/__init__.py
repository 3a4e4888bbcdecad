"""Dequantize routines. The torch reference serves every format on every device."""

from diffquant.runtime.kernels.fields import Kernel, Parts
from diffquant.runtime.kernels.reference import KERNELS, ROWWISE

__all__ = ["KERNELS", "ROWWISE", "Kernel", "Parts"]
