"""Products of few rows on a card, the parts `few` and `tiles` of gpu_matmul.py.

A row of `few` is the package's kernel; with --candidates another follows it, the same weight and
activations by benchmarks/candidates:

    ms, x       as in gpu_matmul.py
    apart_x     decoding and then multiplying, over the bf16 GEMM
    measured_x  a candidate's time over the package's kernel's
    error       relative, to float32 sums of the same decoded weight
    equal       no result is further from those sums than one rounding to the compute dtype, in
                units of the sum of magnitudes
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from candidates import few as candidate
from torch import Tensor
from torch.nn import functional

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels import KERNELS, decode
from diffquant.runtime.kernels.triton import few

FEW_FORMATS = (
    "q8_0", "q4_0", "q4_k", "q5_k", "q6_k", "fp8_e4m3_scaled", "int8_rowwise", "nf4",
)  # fmt: skip
TILED = ((18432, 3072), (3072, 15360))  # a modulation; few programs by rows alone
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
    """One kernel against decoding and multiplying, and against its candidate."""
    for shape in bench.args.shapes:
        for count in bench.args.few:
            x, w = bench.normal(count, shape[1]), bench.normal(*shape)
            base = bench.ms(functools.partial(functional.linear, x, w))
            bench.row("few", f"bf16 gemm, {count} rows", shape, lambda ms=base: {"ms": ms})
            for name in served(bench, shape):
                product, told = Few.of(name, shape, x), f"{name}, {count} rows"
                work = functools.partial(few_row, bench, product, base)
                bench.row("few", told, shape, work)
                if bench.args.candidates:
                    ms = bench.rows[-1].get("ms")
                    work = functools.partial(candidate_row, bench, product, base, ms)
                    bench.row("few", f"{told}, candidate", shape, work)


def served(bench: Any, shape: Shape) -> list[str]:
    """Formats whose blocks rows of this length are made of."""
    return [one for one in bench.args.formats if shape[1] % (FORMATS[one].block_size or 1) == 0]


def few_row(bench: Any, product: Few, base: float) -> dict[str, Any]:
    work = product.by(few.few_rows)
    judged, ms = product.judged(work()), bench.ms(work)
    return {"ms": ms, "x": ms / base, "apart_x": bench.ms(product.apart) / base, **judged}


def candidate_row(bench: Any, product: Few, base: float, measured: float | None) -> dict[str, Any]:
    work = product.by(candidate.few_rows)
    judged, ms = product.judged(work()), bench.ms(work)
    over = {"measured_x": ms / measured} if measured else {}
    return {"ms": ms, "x": ms / base, **over, **judged}


def few_tiles(bench: Any) -> None:
    """Few rows by every tile of the package's kernel, the fastest first."""
    for shape in bench.args.shapes if bench.args.tiny else TILED:
        for count in bench.args.few:
            x, w = bench.normal(count, shape[1]), bench.normal(*shape)
            base = bench.ms(functools.partial(functional.linear, x, w))
            for name in served(bench, shape):
                work = functools.partial(tile_row, bench, Few.of(name, shape, x), base)
                bench.row("tiles", f"{name}, {count} rows", shape, work)


def tile_row(bench: Any, product: Few, base: float) -> dict[str, Any]:
    found, failed = [], []
    for tile in few.CANDIDATES:
        call = product.by(few.few_rows, tile=tile)
        try:
            gap = product.judged(call())["error"]
            found.append((bench.ms(call) / base, tuple(tile), gap))
        except Exception as error:  # a tile that is too large for the card
            failed.append((tuple(tile), type(error).__name__))
    found.sort()
    told = ", ".join(f"{x_:.2f} {tile}" for x_, tile, _ in found)
    worst = max(gap for *_, gap in found)
    return {"x": found[0][0], "error": worst, "every": told, "not_served": len(failed)}
