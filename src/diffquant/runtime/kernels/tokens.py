"""Where one kernel does what models write as several operations on tokens, and where it does not.

On an NVIDIA card, outside of a compiled graph (whose compiler fuses by itself) and where nobody
asks for gradients. Everywhere else, and for shapes that the kernels do not take, models do it with
torch's operations: each function here says whether it served.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffquant.runtime.kernels.table import fast_module

__all__ = ["gelu_behind", "modulated", "rotated_heads", "serves"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_WIDTH = 16384  # of a token that one program keeps in registers


def serves(x: Tensor) -> bool:
    """Whether kernels run where `x` is."""
    return (
        x.is_cuda
        and x.dtype in _DTYPES
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and x.requires_grad)
        and fast_module("cuda")[0] is not None
    )


def rotated_heads(
    x: Tensor, scale: Tensor, positions: tuple[Tensor, Tensor], eps: float, out: Tensor
) -> bool:
    """Norm and rotate heads (B, heads, L, head_dim) into `out`; False where that is not served."""
    width = x.shape[-1]
    whole = width >= 2 and width & (width - 1) == 0
    dense = x.stride(-1) == 1 and out.stride(-1) == 1
    tables = all(
        table.dim() == 2 or (table.dim() == 4 and table.shape[1] == 1) for table in positions
    )
    if not (serves(x) and whole and dense and tables):
        return False
    from diffquant.runtime.kernels.triton import tokens

    tokens.rotated_heads(x, scale, positions, eps, out)
    return True


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor | None:
    """Layer norm, times 1 + scale, plus shift; None where that is not served."""
    shapes = all(one.dim() == 3 and one.shape[-1] == x.shape[-1] for one in (x, shift, scale))
    if not (serves(x) and shapes and x.shape[-1] <= _MAX_WIDTH):
        return None
    if not all(one.stride(-1) == 1 for one in (x, shift, scale)):
        return None
    from diffquant.runtime.kernels.triton import tokens

    return tokens.modulated(x, shift, scale, eps)


def gelu_behind(first: Tensor, x: Tensor) -> Tensor | None:
    """`first` and GELU(`x`), by tanh, side by side in one tensor; None where that is not served.

    The activation is written where it is wanted, not made and then copied.
    """
    if not serves(x):
        return None
    width = first.shape[-1]
    out = x.new_empty(*x.shape[:-1], width + x.shape[-1])
    out[..., :width] = first
    torch.ops.aten.gelu.out(x, approximate="tanh", out=out[..., width:])
    return out
