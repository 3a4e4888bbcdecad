"""Every tile of candidates/few.py: gpu_matmul.py --parts few --sweep --candidates.

For each format and number of rows (--few), the best tiles first:

    x         geometric mean over the shapes of the time over the bf16 GEMM's of the same shape
    worst     the largest of them
    measured  that mean for the package's kernel
    apart     that mean for decoding and then multiplying

Then, for each format and number of rows, which of the three is fastest; and the tables for
candidates/few_tiles.py. A tile that fails, or whose result is not that of float32 sums, is named
and left out. Kernels are compiled beforehand by `--jobs` processes.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from candidates import few
from candidates.few_tiles import CANDIDATES, FewTile, rows_class
from gpu_few import Few, Shape
from torch import Tensor
from torch.nn import functional

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels.triton import few as measured

Variant = tuple[str, int, FewTile]
TOLD = 4  # tiles of a format and number of rows
ALL_SHARED = 1 << 16  # programs: more than a weight has tiles, so that K is shared out


@dataclass
class Found:
    """Times over the GEMM, for each shape, of a format and number of rows."""

    apart: list[float]
    measured: list[float] = field(default_factory=list)
    tiles: dict[FewTile, list[float]] = field(default_factory=dict)

    def order(self) -> list[FewTile]:
        """Tiles that work, the fastest first."""
        return sorted(self.tiles, key=lambda tile: mean(self.tiles[tile]))

    def least(self) -> float:
        """The fastest tile's mean; infinite if none works."""
        return min(map(mean, self.tiles.values()), default=math.inf)


def mean(values: Sequence[float]) -> float:
    """Geometric; infinite of none: what did not run is no choice."""
    if not values:
        return math.inf
    return math.exp(sum(map(math.log, values)) / len(values))


def compile_some(variants: Sequence[Variant], shape: Shape) -> None:
    """Fill Triton's cache on disk, in a process of its own."""
    for name, rows, tile in variants:
        x = torch.zeros(rows, shape[1], dtype=torch.bfloat16, device="cuda")
        try:
            Few.of(name, shape, x).by(few.few_rows, tile=tile)()
        except Exception as error:  # told again when it is to be measured
            print(f"not compiled: {name} {rows} rows {tuple(tile)}: {str(error)[:100]}")
    torch.cuda.synchronize()


def compiled_ahead(variants: Sequence[Variant]) -> list[Variant]:
    """One variant for each kernel: results are written, or float32 sums of shares of K."""
    found = {}
    for name, rows, tile in variants:
        for programs in (0, ALL_SHARED):
            found[name, rows, tile._replace(programs=programs)] = None
    return list(found)


def compile_all(variants: Sequence[Variant], shape: Shape, jobs: int) -> float:
    """Compile all kernels; returns seconds."""
    start, kernels = time.monotonic(), compiled_ahead(variants)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = [pool.submit(compile_some, kernels[i::jobs], shape) for i in range(jobs)]
        for one in parts:
            one.result()
    return time.monotonic() - start


def tried(name: str, rows: int, *, tiny: bool) -> tuple[FewTile, ...]:
    """What is tried; blocks do not depend on the width of loads."""
    found = CANDIDATES.get(rows_class(rows), CANDIDATES[16])
    if few.family(name) not in ("scaled", "flat"):
        found = tuple(tile for tile in found if tile.group == FewTile(1, 1, 1).group)
    return found[:2] if tiny else found


class WrongError(ValueError):
    """A result that is not that of float32 sums."""


def over_gemm(bench: Any, product: Few, gemm_ms: float, work: Callable[[], Tensor]) -> float:
    """A routine's time over the GEMM's.

    Raises:
        WrongError: its result is wrong.
    """
    judged = product.judged(work())
    if not judged["equal"]:
        raise WrongError(f"{product.shape}, error {judged['error']:.3g}")
    return bench.ms(work) / gemm_ms


def timed(bench: Any, products: Sequence[Few], gemm: Sequence[float]) -> Found:
    """Every tile that works, the package's kernel, and decoding first; for each shape."""
    name, rows = products[0].name, len(products[0].x)
    both = list(zip(products, gemm, strict=True))
    found = Found([bench.ms(one.apart) / ms for one, ms in both])

    def times(routine: Callable[..., Tensor], **how: FewTile) -> list[float]:
        tile = how.get("tile", "measured")
        row = {"what": "few sweep", "name": name, "rows": rows, "tile": tile}
        try:
            row["x"] = [over_gemm(bench, one, ms, one.by(routine, **how)) for one, ms in both]
        except Exception as error:  # the device's time is dear: the others go on
            row["left_out"] = f"{type(error).__name__}: {error}"[:200]
            row |= {"equal": False} if isinstance(error, WrongError) else {}
            print(f"LEFT OUT {name} {rows} rows {tile}: {row['left_out']}")
        bench.rows.append(row)
        return row.get("x", [])

    found.measured = times(measured.few_rows)
    for tile in tried(name, rows, tiny=bench.args.tiny):
        if here := times(few.few_rows, tile=tile):
            found.tiles[tile] = here
    return found


def sweep_few(bench: Any) -> None:
    """Time every tile; print the best ones and the tables."""
    args = bench.args
    deepest = max(FORMATS[name].block_size or 64 for name in args.formats)
    shapes = [shape for shape in args.shapes if shape[1] % deepest == 0]
    if not args.tiny:
        variants = [
            (name, rows, tile)
            for name in args.formats
            for rows in args.few
            for tile in tried(name, rows, tiny=False)
        ]
        print(f"compiled in {compile_all(variants, shapes[0], args.jobs):.0f} s", flush=True)
    every: dict[tuple[str, int], Found] = {}
    for rows in args.few:
        x = [bench.normal(rows, shape[1]) for shape in shapes]
        gemm = [
            bench.ms(functools.partial(functional.linear, one, bench.normal(*shape)))
            for one, shape in zip(x, shapes, strict=True)
        ]
        for name in args.formats:
            products = [Few.of(name, shape, one) for shape, one in zip(shapes, x, strict=True)]
            every[name, rows] = timed(bench, products, gemm)
            print_best(name, rows, every[name, rows])
    print_verdicts(every)
    print_tables(args.formats, args.few, every)


def print_best(name: str, rows: int, found: Found) -> None:
    """The best tiles of a format and number of rows."""
    for tile in found.order()[:TOLD]:
        times = found.tiles[tile]
        print(
            f"{name:16} {rows:3} rows  x {mean(times):6.3f} worst {max(times):6.3f} "
            f"measured {mean(found.measured):6.3f} apart {mean(found.apart):6.3f}  {tuple(tile)}",
            flush=True,
        )


def print_verdicts(every: Mapping[tuple[str, int], Found]) -> None:
    """Which way is fastest."""
    for (name, rows), found in every.items():
        ways = {"measured": mean(found.measured), "apart": mean(found.apart)}
        ways |= {f"candidate {tuple(tile)}": mean(found.tiles[tile]) for tile in found.order()[:1]}
        told = ", ".join(f"{way} {ways[way]:.3f}" for way in sorted(ways, key=ways.__getitem__))
        print(f"# {name}, {rows} rows: {told}")


def print_tables(
    names: Sequence[str], counts: Sequence[int], every: Mapping[tuple[str, int], Found]
) -> None:
    """The best tile for each family as few_tiles.py has it, and what is slower than decoding."""
    print("TILES = {")
    for family in dict.fromkeys(few.family(name) for name in names):
        for rows in counts:
            kin = [every[name, rows].tiles for name in names if few.family(name) == family]
            shared = set(kin[0]).intersection(*kin)
            means = {tile: mean([mean(one[tile]) for one in kin]) for tile in shared}
            if means:
                best = min(means, key=means.__getitem__)
                print(f"    ({family!r}, {rows_class(rows)}): {best!r},")
    slow = []
    for name in sorted(names):
        here = [every[name, rows] for rows in counts]
        if mean([mean(one.apart) for one in here]) <= mean([one.least() for one in here]):
            slow.append(name)
    print(f"}}\nNOT_SERVED = frozenset({slow!r})")
