"""Products with packed weights as operators of torch's: a compiled block stays one graph.

What runs an operator is chosen when it runs, by the device of its tensors: Triton's kernels and
`torch._scaled_mm` on a card, the reference (rows.py) elsewhere.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from diffquant.runtime.kernels import rows
from diffquant.runtime.kernels.fields import Parts
from diffquant.runtime.kernels.table import fast_module

__all__ = ["few_rows", "few_rows_serve", "levels", "multiply_rows", "quantize_rows"]

_OPERATORS = torch.library.Library("diffquant", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    "quantize_rows(Tensor x, str kind, int rotation) -> (Tensor, Tensor)",
    "multiply_rows(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    "levels(Tensor[] parts, str names, str fmt, SymInt[] shape) -> Tensor",
    "few_rows(Tensor x, Tensor[] parts, str names, str fmt, SymInt[] shape, Tensor? bias) "
    "-> Tensor",
):
    _OPERATORS.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


def _triton(tensor: Tensor) -> ModuleType | None:
    """Triton's kernels, where they serve the device of a tensor."""
    return fast_module("cuda")[0] if tensor.is_cuda else None


def _quantize_rows(x: Tensor, kind: str, rotation: int) -> tuple[Tensor, Tensor]:
    routine = rows if _triton(x) is None else _module("rows")
    found: tuple[Tensor, Tensor] = routine.quantize_rows(x, kind, rotation=rotation)
    return found


def _module(name: str) -> ModuleType:
    import importlib

    return importlib.import_module(f"diffquant.runtime.kernels.triton.{name}")


def _multiply_rows(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if not a.is_cuda:
        return rows.multiply_rows(a, a_scale, b, b_scale, bias, dtype)
    if a.dtype == torch.float8_e4m3fn:
        return scaled_mm(a, a_scale, b, b_scale, bias, dtype)
    if _triton(a) is None:
        return int_mm(a, a_scale, b, b_scale, bias, dtype)
    found: Tensor = _module("gemm").multiply_rows(a, a_scale, b, b_scale, bias, dtype)
    return found


def scaled_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See rows.multiply_rows, by `torch._scaled_mm` with a scale per row on both sides.

    On Hopper fast accumulation keeps fewer bits of long sums than float32 (its error is in
    docs/gpu.md once measured). bfloat16 results alone are served there.
    """
    across = b_scale.reshape(1, -1).expand(1, len(b)).contiguous()
    added = None if bias is None else bias.to(dtype)
    found: Tensor = torch._scaled_mm(
        a, b.t(), a_scale, across, bias=added, out_dtype=dtype, use_fast_accum=a.is_cuda
    )
    return found


def int_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See rows.multiply_rows, by `torch._int_mm` and scaled afterwards: for cards without Triton.

    It wants more than 16 rows, and multiples of 8 elsewhere.
    """
    y = torch._int_mm(a, b.t()).float() * a_scale * b_scale.reshape(1, -1)
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


def _levels(parts: list[Tensor], names: str, fmt: str, shape: list[int]) -> Tensor:
    routine = rows if _triton(parts[0]) is None else _module("levels")
    found: Tensor = routine.levels(fmt, _named(parts, names), tuple(shape))
    return found


def _few_rows(
    x: Tensor, parts: list[Tensor], names: str, fmt: str, shape: list[int], bias: Tensor | None
) -> Tensor:
    found: Tensor = _module("few").few_rows(x, fmt, _named(parts, names), tuple(shape), bias)
    return found


def _named(parts: list[Tensor], names: str) -> dict[str, Tensor]:
    return dict(zip(names.split(","), parts, strict=True))


def _rows_like(x: Tensor, kind: str, rotation: int) -> tuple[Tensor, Tensor]:
    del rotation
    scale = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=rows.KINDS[kind].dtype), scale


def _product_like(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    del a_scale, b_scale, bias
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


def _levels_like(parts: list[Tensor], names: str, fmt: str, shape: list[int]) -> Tensor:
    del names, fmt
    return parts[0].new_empty(shape, dtype=torch.int8)


def _few_like(
    x: Tensor, parts: list[Tensor], names: str, fmt: str, shape: list[int], bias: Tensor | None
) -> Tensor:
    del parts, names, fmt, bias
    return x.new_empty((x.shape[0], shape[0]))


for _name, _serves, _outline in (
    ("quantize_rows", _quantize_rows, _rows_like),
    ("multiply_rows", _multiply_rows, _product_like),
    ("levels", _levels, _levels_like),
    ("few_rows", _few_rows, _few_like),
):
    _OPERATORS.impl(_name, _serves, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"diffquant::{_name}", _outline, lib=_OPERATORS)


def quantize_rows(x: Tensor, kind: str, *, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """See rows.quantize_rows, by what serves the device best.

    Inside of a graph rows that are not rotated are left to the compiler, as torch's own operators:
    it fuses them with what comes before, a norm or an activation. Its divisions may be off by an
    ulp, so that a number that lies between two codes may get the other one.
    """
    if not torch.compiler.is_compiling():
        return _quantize_rows(x, kind, rotation)
    if not rotation:
        return rows.quantize_rows(x, kind)
    found: tuple[Tensor, Tensor] = torch.ops.diffquant.quantize_rows.default(x, kind, rotation)
    return found


def multiply_rows(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See rows.multiply_rows, by what serves the device."""
    if not torch.compiler.is_compiling():
        return _multiply_rows(a, a_scale, b, b_scale, bias, dtype)
    found: Tensor = torch.ops.diffquant.multiply_rows.default(a, a_scale, b, b_scale, bias, dtype)
    return found


def levels(fmt: str, parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """See rows.levels, by what serves the device."""
    given, names = list(parts.values()), ",".join(parts)
    if not torch.compiler.is_compiling():
        return _levels(given, names, fmt, list(shape))
    found: Tensor = torch.ops.diffquant.levels.default(given, names, fmt, list(shape))
    return found


def few_rows_serve(fmt: str, parts: Parts, shape: tuple[int, ...]) -> int:
    """Rows of activations that `few_rows` takes this weight with, at most; 0: none."""
    if _triton(parts["weight"]) is None:
        return 0
    few = _module("few")
    return int(few.most_rows(fmt)) if few.serves(fmt, parts, shape) else 0


def few_rows(
    x: Tensor, fmt: str, parts: Parts, shape: tuple[int, ...], bias: Tensor | None
) -> Tensor:
    """Multiply a few rows with a packed weight, decoding it on the way; see triton/few.py.

    The numbers are those of decoding to the dtype of `x` and multiplying, to the order of sums.
    """
    given, names = list(parts.values()), ",".join(parts)
    if not torch.compiler.is_compiling():
        return _few_rows(x, given, names, fmt, list(shape), bias)
    found: Tensor = torch.ops.diffquant.few_rows.default(x, given, names, fmt, list(shape), bias)
    return found
