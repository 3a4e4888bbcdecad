"""Decoders for the CPU: the fast twins of quant/codecs, straight into the compute dtype.

A weight is cut into spans of whole rows (of whole blocks where those run through the flattened
weight). Threads take spans in turn; each decodes one to float32, which stays in the core's
cache, and rounds it into the result. So a decoded weight crosses main memory once, in the width it
is computed in, where the torch reference writes and reads it several times in float32.

The numbers are the reference's, bit for bit, and the reference itself serves what is not worth a
span and parts that are not laid out as FORMATS says (an fp8 scale per row, which some files have).

This module imports numba: kernels/table.py loads it when it is first needed.
"""

from __future__ import annotations

import functools
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffquant.core.dtypes import storage_nbytes
from diffquant.quant.backends import backend
from diffquant.quant.codecs.arrays import Float32, frozen
from diffquant.quant.codecs.numba.cast import NARROW
from diffquant.quant.formats import FORMATS
from diffquant.quant.layout import QuantFormat, matrix_shape
from diffquant.runtime.kernels.fields import Kernel, Parts
from diffquant.runtime.kernels.reference import KERNELS as REFERENCE
from diffquant.runtime.kernels.scratch import lend

__all__ = ["DTYPES", "KERNELS", "SMALLEST", "SPAN", "unavailable"]

# Weights in a span at most: a megabyte of float32, and work enough for what a span costs in Python.
SPAN = 1 << 18
# And at least; smaller weights are done by the reference before threads have their spans.
SMALLEST = 1 << 15

# Compute dtypes, and the cast format that rounds to each; float32 is copied.
DTYPES: Mapping[torch.dtype, str] = {
    torch.float32: "",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}
# Stored dtypes that numpy does not have, and one of the same width that it has.
_BITS = {
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}


@dataclass(frozen=True, slots=True)
class _Weight:
    """A packed weight as spans are cut from it.

    Attributes:
        row: its number format.
        rows, columns: the weight as a matrix; formats whose blocks run through the flattened
            weight have rows of one number.
        arrays: stored parts as numpy has them, first dimension as FORMATS says.
    """

    row: QuantFormat
    rows: int
    columns: int
    arrays: Mapping[str, NDArray[Any]]

    def spans(self) -> deque[tuple[int, int]]:
        """Half-open ranges of rows at multiples the format allows: something for every thread."""
        multiple = self.row.row_multiple((self.rows, self.columns))
        share = self.rows * self.columns // torch.get_num_threads()
        size = min(max(share, SMALLEST), SPAN)
        step = max(1, size // (self.columns * multiple)) * multiple
        starts = range(0, self.rows, step)
        return deque((start, min(start + step, self.rows)) for start in starts)

    def decode(self, start: int, stop: int) -> Float32:
        """Rows [start, stop) in float32, flat."""
        parts = {}
        for part in self.row.parts:
            array = self.arrays[part.name]
            if part.per_row:
                first, last = (part.shape((at, self.columns))[0] for at in (start, stop))
                array = array[first:last]
            parts[part.name] = array
        decode = backend(self.row.codec, "decode")
        weight: Float32 = decode(parts, (stop - start, self.columns), fmt=self.row.name)
        return weight.reshape(-1)


def _weight(name: str, parts: Parts, shape: tuple[int, ...]) -> _Weight | None:
    """A weight to cut; None where a part is missing or of another size than FORMATS says."""
    row = FORMATS[name]
    rows, columns = (math.prod(shape), 1) if row.flat_block else matrix_shape(shape)
    if row.block_size and not row.flat_block and not row.is_padded and columns % row.block_size:
        return None
    arrays = {}
    for part in row.parts:
        if part.name not in parts:
            return None
        stored = parts[part.name].detach()
        bits = stored.contiguous().view(_BITS.get(stored.dtype, stored.dtype)).numpy()
        wanted = part.shape((rows, columns))
        if part.name == "scale" and part.per_row and bits.size == 1:
            bits = np.broadcast_to(bits.reshape(()), wanted)
        if bits.nbytes != storage_nbytes(part.dtype, wanted):
            return None
        arrays[part.name] = bits.reshape((wanted[0], -1) if len(wanted) > 1 else wanted)
    return _Weight(row, rows, columns, arrays)


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    # By process: a fork has the pool, and none of its threads.
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix=f"diffquant-decode-{process}")


def _share(work: Callable[[int, int], None], spans: deque[tuple[int, int]]) -> None:
    """Do all spans, on as many threads as torch may use; the calling thread is one of them."""

    def drain() -> None:
        with np.errstate(all="ignore"):  # infinite and NaN scales are the file's own
            while True:
                try:
                    span = spans.popleft()
                except IndexError:
                    return
                work(*span)

    helpers = min(torch.get_num_threads(), len(spans)) - 1
    started = [_pool(os.getpid()).submit(drain) for _ in range(helpers)]
    drain()
    for one in started:
        if not one.cancel():  # a thread that never got to run is not waited for
            one.result()


def _decode(name: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = math.prod(shape)
    weight = _weight(name, parts, shape) if count >= SMALLEST else None
    if weight is None:
        return REFERENCE[name](parts, shape, dtype)
    out = lend(count, dtype)
    narrow = DTYPES[dtype]
    bits = out.view(torch.int16).numpy().view(np.uint16) if narrow else out.numpy()

    def work(start: int, stop: int) -> None:
        decoded = weight.decode(start, stop)
        into = bits[start * weight.columns : stop * weight.columns]
        if narrow:
            NARROW[narrow](frozen(decoded, -1), into)
        else:
            into[:] = decoded

    _share(work, weight.spans())
    return out.reshape(shape)


KERNELS: Mapping[str, Kernel] = {name: functools.partial(_decode, name) for name in FORMATS}


def unavailable() -> str:
    """Why kernels cannot run on this machine: once numba is imported, they can."""
    return ""
