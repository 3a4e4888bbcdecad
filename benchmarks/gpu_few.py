"""Products of few rows on a card, the part `few` of gpu_matmul.py. What a row says:

ms, x    as in gpu_matmul.py, by the tile in use (few_sweep.py tries the others)
apart_x  decoding and then multiplying, over the bf16 GEMM
error    relative, to float32 sums of the same decoded weight
equal    no result is further from those sums than one rounding to the compute dtype, in units
         of the sum of magnitudes
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels import KERNELS, decode
from diffquant.runtime.kernels.triton import few

FEW_FORMATS = (
    "q8_0", "q4_0", "q4_k", "q5_k", "q6_k", "fp8_e4m3_scaled", "int8_rowwise", "nf4",
)  # fmt: skip
Shape = tuple[int, int]


def random_parts(name: str, shape: Shape, device: str) -> dict[str, Tensor]:
    """Random bytes, scales of one in blocks that hold their own."""
    row, parts = FORMATS[name], {}
    for part in row.parts:
        size = part.shape(shape)
        if len(row.parts) == 1 and row.block_size:
            size = (shape[0], row.nbytes((1, shape[1])))
        if part.dtype == "F32":
            parts[part.name] = torch.rand(size, device=device) * 0.02 + 0.01
        else:
            # up to 0x3B: as float16 scales below one, as e4m3 no NaN
            data = torch.randint(0, 0x3B, size, dtype=torch.uint8, device=device)
            kind = {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}.get(part.dtype, torch.uint8)
            parts[part.name] = data.view(kind)
    return parts


@dataclass(frozen=True)
class Few:
    """A product of few rows: `x` (M, K) and a packed weight (N, K) of random bytes."""

    name: str
    shape: Shape
    parts: dict[str, Tensor]
    x: Tensor

    @classmethod
    def of(cls, name: str, shape: Shape, x: Tensor) -> Few:
        return cls(name, shape, random_parts(name, shape, str(x.device)), x)

    def by(self, routine: Callable[..., Tensor], **how: object) -> Callable[[], Tensor]:
        """What multiplies it, to be called."""
        return functools.partial(routine, self.x, self.name, self.parts, self.shape, None, **how)

    def apart(self) -> Tensor:
        """Decoded, then multiplied."""
        return functional.linear(self.x, decode(self.name, self.parts, self.shape, self.x.dtype))

    @functools.cached_property
    def sums(self) -> tuple[Tensor, Tensor]:
        """The product in float32, and the sums of magnitudes."""
        weight = KERNELS[self.name](self.parts, self.shape, self.x.dtype).float().t()
        return self.x.float() @ weight, self.x.float().abs() @ weight.abs()

    def judged(self, found: Tensor) -> dict[str, Any]:
        """How far a result is from float32 sums."""
        wanted, magnitudes = self.sums
        gap = (found.float() - wanted).abs()
        rounding = torch.finfo(found.dtype).eps / 2
        return {
            "error": float(gap.norm() / wanted.norm()),
            "equal": bool((gap <= rounding * magnitudes).all()),
        }


def few_rows(bench: Any) -> None:
    """One kernel against decoding and multiplying."""
    for shape in bench.args.shapes:
        for count in bench.args.few:
            x, w = bench.normal(count, shape[1]), bench.normal(*shape)
            base = bench.ms(functools.partial(functional.linear, x, w))
            bench.row("few", f"bf16 gemm, {count} rows", shape, lambda ms=base: {"ms": ms})
            for name in served(bench, shape):
                work = functools.partial(few_row, bench, Few.of(name, shape, x), base)
                bench.row("few", f"{name}, {count} rows", shape, work)


def served(bench: Any, shape: Shape) -> list[str]:
    """Formats whose blocks rows of this length are made of."""
    return [one for one in bench.args.formats if shape[1] % (FORMATS[one].block_size or 1) == 0]


def few_row(bench: Any, product: Few, base: float) -> dict[str, Any]:
    work = product.by(few.few_rows)
    judged, ms = product.judged(work()), bench.ms(work)
    return {"ms": ms, "x": ms / base, "apart_x": bench.ms(product.apart) / base, **judged}
