"""Dequantize routines. The torch reference serves every format on every device; `best` chooses."""

from diffquant.runtime.kernels.fields import Kernel, Parts
from diffquant.runtime.kernels.op import decode
from diffquant.runtime.kernels.reference import KERNELS, ROWWISE
from diffquant.runtime.kernels.table import Service, best

__all__ = ["KERNELS", "ROWWISE", "Kernel", "Parts", "Service", "best", "decode"]
