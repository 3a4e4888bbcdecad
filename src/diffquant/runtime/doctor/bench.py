"""`doctor --bench`: what this machine does with each number format, measured in seconds.

A weight of the size that image models are made of is decoded, and a layer with it is run, beside
the same layer with a plain weight. Bytes are random: how long decoding takes does not depend on
them. The fastest of five rounds; the device is waited for before and after each. On a card the
cache holds part of such a weight between rounds, so a small format may look faster than memory is
(benchmarks/gpu_kernels.py empties it).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.quant.formats import FORMATS

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.runtime.layers import QuantLinear

__all__ = ["USUAL", "Bench", "BenchRow", "bench"]

# What is written and downloaded most; `-v` measures every format.
USUAL = (
    "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "q3_k", "q2_k", "iq4_xs",
    "fp8_e4m3", "fp8_e4m3_scaled", "int8_rowwise", "int8_convrot", "nf4", "mxfp8", "nvfp4_comfy",
)  # fmt: skip
_ROUNDS = 5
_COPIED_NBYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class _Size:
    """A layer: rows and columns of its weight, and how many tokens it is given."""

    rows: int
    columns: int
    tokens: int


# A layer of Flux.1 at 1024 x 1024 on a card; on a processor what takes tens of milliseconds.
_SIZES = {"cuda": _Size(12288, 3072, 4608), "mps": _Size(12288, 3072, 1024)}
_SMALL = _Size(3072, 3072, 256)


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One format.

    Attributes:
        format: number format.
        bits: per weight, scales included.
        backend: stored, numba, triton or torch.
        decode_ms: the weight to the compute dtype; None where there is nothing to decode.
        gb_per_s: stored bytes read and decoded bytes written in that time, 1e9 a second.
        layer_ms: the layer with this weight.
        to_plain: over the layer with a weight stored in the compute dtype.
    """

    format: str
    bits: float
    backend: str
    decode_ms: float | None
    gb_per_s: float | None
    layer_ms: float
    to_plain: float


@dataclass(frozen=True, slots=True)
class Bench:
    """What a device did.

    Attributes:
        device: as --device takes it; `name` of the card, "" for a processor.
        dtype: computed in, torch's name.
        rows, columns, tokens: of the layer.
        threads: of torch, on a processor.
        copy_gb_per_s: a copy's bytes read and written, 1e9 a second: the ceiling of decoding.
        plain_ms: the layer with a weight in the compute dtype.
        tflops: multiplications and additions of that, 1e12 a second.
        table: a row for each format, in FORMATS' order.
    """

    device: str
    name: str
    dtype: str
    rows: int
    columns: int
    tokens: int
    threads: int
    copy_gb_per_s: float
    plain_ms: float
    tflops: float
    table: tuple[BenchRow, ...]


def bench(
    device: str,
    dtype: str,
    *,
    every: bool = False,
    size: tuple[int, int, int] | None = None,
    progress: Progress = NO_PROGRESS,
) -> Bench:
    """Measure a device that is here.

    Args:
        device: cpu, cuda or mps, or one of several cards: cuda:1.
        dtype: torch's name of the compute dtype.
        every: all formats, not USUAL.
        size: (rows, columns, tokens) instead of the device's own.
        progress: told of each format.
    """
    import torch

    kind = device.partition(":")[0]
    one = _Size(*size) if size is not None else _SIZES.get(kind, _SMALL)
    compute: torch.dtype = getattr(torch, dtype)
    x = torch.randn(one.tokens, one.columns, device=device).to(compute)
    names = [name for name in FORMATS if every or name in USUAL]
    shape = (one.rows, one.columns)
    served = [name for name in names if not FORMATS[name].check(shape)]
    progress.start("bench", len(served) + 1, "format")
    with torch.inference_mode():
        copy_s = _copy_s(device)
        plain_s = _plain_s(x, shape, device)
        progress.advance(1)
        table = []
        for name in served:
            table.append(_row(name, shape, x, plain_s, device))
            progress.advance(1, name)
    progress.stop()
    operations = 2 * one.rows * one.columns * one.tokens
    card = torch.cuda.get_device_name(device) if kind == "cuda" else ""
    return Bench(
        device,
        card,
        dtype,
        one.rows,
        one.columns,
        one.tokens,
        torch.get_num_threads(),
        2 * _COPIED_NBYTES / copy_s / 1e9,
        plain_s * 1e3,
        operations / plain_s / 1e12,
        tuple(table),
    )


def _copy_s(device: str) -> float:
    import torch

    source = torch.zeros(_COPIED_NBYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _fastest(lambda: target.copy_(source), device)


def _plain_s(x: Tensor, shape: tuple[int, int], device: str) -> float:
    import torch

    weight = torch.randn(shape, device=device).to(x.dtype)
    return _fastest(lambda: torch.nn.functional.linear(x, weight), device)


def _row(name: str, shape: tuple[int, int], x: Tensor, plain_s: float, device: str) -> BenchRow:
    from diffquant.runtime.kernels import best, decode

    layer, parts = _layer(name, shape, device)
    backend = best(name, x.device.type, x.dtype).backend
    nbytes = sum(part.nbytes for part in parts.values())
    layer_s = _fastest(lambda: layer(x), device)
    decode_s = None
    if backend != "stored":
        decode_s = _fastest(lambda: decode(name, parts, shape, x.dtype), device)
    moved = nbytes + shape[0] * shape[1] * x.dtype.itemsize
    return BenchRow(
        name,
        nbytes * 8 / (shape[0] * shape[1]),
        backend,
        None if decode_s is None else decode_s * 1e3,
        None if decode_s is None else moved / decode_s / 1e9,
        layer_s * 1e3,
        layer_s / plain_s,
    )


def _layer(name: str, shape: tuple[int, int], device: str) -> tuple[QuantLinear, dict[str, Tensor]]:
    from diffquant.runtime.layers import PackedWeight, QuantLinear, Segment

    parts = _random_parts(name, shape, device)
    layer = QuantLinear(shape[1], shape[0], bias=False)
    layer.bind(PackedWeight((Segment(name, shape, parts),)))
    return layer, parts


def _random_parts(name: str, shape: tuple[int, int], device: str) -> dict[str, Tensor]:
    """Random bytes where numbers are packed, ordinary ones where scales are float32."""
    import torch

    kinds = {
        "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    }  # fmt: skip
    row, parts = FORMATS[name], {}
    for part in row.parts:
        size = part.shape(shape)
        if len(row.parts) == 1 and row.block_size:  # blocks hold their own scales
            size = (shape[0], row.nbytes((1, shape[1])))
        kind = kinds.get(part.dtype, torch.uint8)
        if kind.itemsize > 1:
            parts[part.name] = (torch.rand(size, device=device) * 0.02 + 0.01).to(kind)
        else:
            data = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
            parts[part.name] = data.view(kind)
    return parts


def _fastest(work: Callable[[], object], device: str) -> float:
    """Seconds of a call: the least of some, the first thrown away. Others use the machine too."""
    seconds = []
    for _ in range(1 + _ROUNDS):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _wait(device: str) -> None:
    import torch

    kind = device.partition(":")[0]
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()
