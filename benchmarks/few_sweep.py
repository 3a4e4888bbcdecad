"""Every tile of triton/few.py: gpu_matmul.py --sweep --parts few.

For each format and number of rows (--few), the best tiles first:

    x       geometric mean over the shapes of the time over the bf16 GEMM's of the same shape
    worst   the largest of them
    in use  that mean for the tile in use
    apart   that mean for decoding and then multiplying

Then whether that tile or decoding first is faster, and the tables for triton/few_tiles.py: a tile
for each family and number of rows, and the formats for which decoding first is faster, by that
tile, from some number of rows on. A tile that fails, or whose result is not that of float32 sums,
is named and left out. Kernels are compiled beforehand by `--jobs` processes.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_few import Few, Shape
from torch.nn import functional

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels.triton import few
from diffquant.runtime.kernels.triton.few_tiles import (
    CANDIDATES,
    FewTile,
    rows_class,
    tile_for,
    usable,
)

Variant = tuple[str, int, FewTile]
Choice = dict[str, FewTile | None]  # by family
TOLD = 4  # tiles of a format and number of rows
ALL_SHARED = 1 << 16  # programs: more than a weight has tiles, so that K is shared out


@dataclass
class Found:
    """Times over the GEMM, for each shape, of a format and number of rows."""

    in_use: FewTile
    apart: list[float]
    tiles: dict[FewTile, list[float]] = field(default_factory=dict)

    def order(self) -> list[FewTile]:
        """Tiles that work, the fastest first."""
        return sorted(self.tiles, key=lambda tile: mean(self.tiles[tile]))

    def by(self, tile: FewTile | None) -> float:
        """A tile's mean; infinite if it does not work, or there is none."""
        return mean(self.tiles.get(tile, [])) if tile else math.inf


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
    """The tile in use, and candidates; blocks do not depend on the width of loads."""
    found = CANDIDATES.get(rows_class(rows), CANDIDATES[16])
    found = tuple(tile for tile in found if usable(few.family(name), tile, rows, 2))
    if few.family(name) not in ("scaled", "flat"):
        found = tuple(tile for tile in found if tile.group == FewTile(1, 1, 1).group)
    return tuple(dict.fromkeys((in_use(name, rows), *(found[:2] if tiny else found))))


def in_use(name: str, rows: int) -> FewTile:
    """A format's tile, for operands of 2 bytes."""
    return tile_for(few.family(name), rows, 2)


class WrongError(ValueError):
    """A result that is not that of float32 sums."""


def over_gemm(bench: Any, product: Few, gemm_ms: float, tile: FewTile) -> float:
    """A tile's time over the GEMM's.

    Raises:
        WrongError: its result is wrong.
    """
    work = product.by(few.few_rows, tile=tile)
    judged = product.judged(work())
    if not judged["equal"]:
        raise WrongError(f"{product.shape}, error {judged['error']:.3g}")
    return bench.ms(work) / gemm_ms


def timed(bench: Any, products: Sequence[Few], gemm: Sequence[float]) -> Found:
    """Every tile that works, and decoding first; for each shape."""
    name, rows = products[0].name, len(products[0].x)
    both = list(zip(products, gemm, strict=True))
    found = Found(in_use(name, rows), [bench.ms(one.apart) / ms for one, ms in both])
    for tile in tried(name, rows, tiny=bench.args.tiny):
        row = {"what": "few sweep", "name": name, "rows": rows, "tile": tile}
        try:
            row["x"] = [over_gemm(bench, one, ms, tile) for one, ms in both]
            found.tiles[tile] = row["x"]
        except Exception as error:  # the device's time is dear: the others go on
            row["left_out"] = f"{type(error).__name__}: {error}"[:200]
            row |= {"equal": False} if isinstance(error, WrongError) else {}
            print(f"LEFT OUT {name} {rows} rows {tuple(tile)}: {row['left_out']}")
        bench.rows.append(row)
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
    print_tables(args.formats, args.few, every)


def print_best(name: str, rows: int, found: Found) -> None:
    """The best tiles of a format and number of rows."""
    for tile in found.order()[:TOLD]:
        times = found.tiles[tile]
        print(
            f"{name:16} {rows:3} rows  x {mean(times):6.3f} worst {max(times):6.3f} "
            f"in use {found.by(found.in_use):6.3f} apart {mean(found.apart):6.3f}  {tuple(tile)}",
            flush=True,
        )


def chosen(names: Sequence[str], rows: int, every: Mapping[tuple[str, int], Found]) -> Choice:
    """The tile of each family that is best for its formats together, of those that work for all."""
    found: Choice = {}
    for family in dict.fromkeys(map(few.family, names)):
        kin = [every[name, rows].tiles for name in names if few.family(name) == family]
        means = {tile: mean([mean(one[tile]) for one in kin]) for tile in shared(kin)}
        found[family] = min(means, key=means.__getitem__, default=None)
    return found


def shared(kin: Sequence[Mapping[FewTile, object]]) -> list[FewTile]:
    """Keys of the first that all have, in its order."""
    return [tile for tile in kin[0] if all(tile in one for one in kin)]


def print_tables(
    names: Sequence[str], counts: Sequence[int], every: Mapping[tuple[str, int], Found]
) -> None:
    """Verdicts, and the tables of few_tiles.py."""
    counts = sorted(counts)
    tiles = {rows: chosen(names, rows, every) for rows in counts}
    limits = {}
    for name in names:
        family, fast = few.family(name), True
        for rows in counts:
            found = every[name, rows]
            ms, apart = found.by(tiles[rows][family]), mean(found.apart)
            faster = "tile" if ms < apart else "apart"
            print(f"# {name}, {rows} rows: {faster} (tile {ms:.3f}, apart {apart:.3f})")
            if fast and ms >= apart:  # every number of rows up to the limit has to gain
                limits[name] = max((one for one in counts if one < rows), default=0)
                fast = False
    print("TILES = {")
    for rows, choice in tiles.items():
        for family, tile in choice.items():
            if tile:
                print(f"    ({family!r}, {rows_class(rows)}): {tile!r},")
    print("}")
    print(f"LIMITS = {limits!r}")
