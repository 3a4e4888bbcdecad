"""Where one kernel does what models write as several operations on tokens, and where it does not.

On an NVIDIA card, outside of a compiled graph (whose compiler fuses by itself) and where nobody
asks for gradients. Everywhere else, and for shapes that the kernels do not take, models do it with
torch's operations: each function here says whether it served.

Where what comes next is a layer that multiplies in 8 bits, the kernel writes the rows that it
multiplies (`QuantizedRows`), and the result in the compute dtype is never in memory.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from diffquant.runtime.kernels.rows import QuantizedRows, RowKind
from diffquant.runtime.kernels.table import fast_module

__all__ = [
    "activated", "gelu_behind", "gelu_gated", "modulated", "normed", "rotated_heads", "serves",
]  # fmt: skip

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
    x: tuple[Tensor, Tensor, Tensor | None],
    scales: tuple[Tensor, Tensor],
    positions: tuple[Tensor, Tensor],
    eps: tuple[float, float],
    out: tuple[Tensor, Tensor, Tensor | None],
) -> bool:
    """Norm and rotate heads (B, heads, L, head_dim) of q and k into `out`, and move v.

    False where that is not served.
    """
    width = x[0].shape[-1]
    whole = width >= 2 and width & (width - 1) == 0
    alike = all(
        len({(one.stride(), one.dtype) for one in some if one is not None}) == 1
        and some[0].stride(-1) == 1
        for some in (x, out)
    )
    tables = all(
        table.dim() == 2 or (table.dim() == 4 and table.shape[1] == 1) for table in positions
    )
    if not (serves(x[0]) and whole and alike and tables):
        return False
    _kernels("tokens").rotated_heads(x, scales, positions, eps, out)
    return True


def modulated(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, kind: RowKind | None = None
) -> Tensor | QuantizedRows | None:
    """Layer norm, times 1 + scale, plus shift, as rows of a kind; None where that is not served."""
    shapes = all(one.dim() == 3 and one.shape[-1] == x.shape[-1] for one in (x, shift, scale))
    if not (serves(x) and shapes and x.shape[-1] <= _MAX_WIDTH):
        return None
    if not all(one.stride(-1) == 1 for one in (x, shift, scale)):
        return None
    if kind is None:
        found: Tensor = _kernels("tokens").modulated(x, shift, scale, eps)
        return found
    rows = _kernels("rows")
    if not rows.serves(x.shape[-1], kind.rotation):
        return None
    q, size = rows.modulated_rows(x, shift, scale, eps, *kind)
    return QuantizedRows(q, size, kind, x.shape, x.dtype)


def gelu_behind(
    first: Tensor, x: Tensor, kind: RowKind | None = None
) -> Tensor | QuantizedRows | None:
    """`first` and GELU(`x`), by tanh, side by side, as rows of a kind; None if not served."""
    if not (serves(x) and first.dim() == x.dim() == 3 and first.stride(-1) == x.stride(-1) == 1):
        return None
    if kind is None:
        found: Tensor = _kernels("tokens").gelu_behind(first, x)
        return found
    width, rows = first.shape[-1] + x.shape[-1], _kernels("rows")
    if not rows.serves(width, kind.rotation):
        return None
    shape = (*x.shape[:-1], width)
    q, size = rows.activated_rows(first, x, *kind)
    return QuantizedRows(q, size, kind, shape, x.dtype)


def gelu_gated(
    x: Tensor, gate: Tensor, kind: RowKind | None = None
) -> Tensor | QuantizedRows | None:
    """`x` times GELU(`gate`), by erf, as rows of a kind; None where that is not served."""
    if not (serves(x) and x.dim() == 3 and x.stride(-1) == gate.stride(-1) == 1):
        return None
    if kind is None:
        found: Tensor = _kernels("tokens").gelu_gated(x, gate)
        return found
    rows = _kernels("rows")
    if not rows.serves(x.shape[-1], kind.rotation):
        return None
    q, size = rows.gated_rows(x, gate, *kind)
    return QuantizedRows(q, size, kind, x.shape, x.dtype)


def normed(x: Tensor, norm: nn.LayerNorm, kind: RowKind | None) -> QuantizedRows | None:
    """A layer norm of (B, L, K) as rows of a kind; None where there is none or it is not served."""
    plain = norm.weight is None or norm.bias is None
    if kind is None or plain or not serves(x) or x.dim() != 3 or x.stride(-1) != 1:
        return None
    rows = _kernels("rows")
    if not rows.serves(x.shape[-1], kind.rotation):
        return None
    q, size = rows.normed_rows(x, norm.weight, norm.bias, norm.eps, *kind)
    return QuantizedRows(q, size, kind, x.shape, x.dtype)


def activated(x: Tensor, kind: RowKind | None) -> QuantizedRows | None:
    """GELU(`x`), by tanh, as rows of a kind; None where there is no kind or it is not served."""
    found = None if kind is None else gelu_behind(x[..., :0], x, kind)
    return found if isinstance(found, QuantizedRows) else None


def _kernels(name: str) -> ModuleType:
    import importlib

    return importlib.import_module(f"diffquant.runtime.kernels.triton.{name}")
