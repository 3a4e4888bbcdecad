"""What each format costs a weight, given the power of its gradient (gradients.py).

    error(f) = coherence * sum_nk r_n (W - Q_f(W))_nk^2 c_k / sum r

Weights of more than SAMPLE numbers are judged by evenly spaced rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import UsageError
from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS, format_named, matrix_shape
from diffquant.quant.policy import flat_shape
from diffquant.runtime.gradients import Power

__all__ = ["AMONG", "SAMPLE", "check_among", "format_errors"]

# Block formats that GGUF files of image models are made of, and what is kept instead; formats that
# need an importance matrix are added where there is one.
AMONG = (
    "q2_k", "q3_k", "iq4_xs", "iq4_nl", "q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k",
    "q8_0", "bf16", "f16", "f32",
)  # fmt: skip
SAMPLE = 1 << 20  # weights of a tensor that are encoded


def check_among(among: Sequence[str], *, matrix: bool) -> tuple[str, ...]:
    """Check names of formats before anything runs; repeated ones count once.

    Raises:
        UnknownFormat: no such format.
        UsageError: it cannot be encoded, or not without importance.
    """
    names = tuple(dict.fromkeys(among))
    if not names:
        raise UsageError("no formats to measure: name some, such as q4_k")
    for name in names:
        row = format_named(name)
        if not row.encodes:
            raise UsageError(f"{name} is read, never written: leave it out")
        if row.importance == "required" and not matrix:
            raise UsageError(f"{name} cannot be encoded without an importance matrix: leave it out")
    return names


def format_errors(
    weight: NDArray[np.float32],
    names: Sequence[str],
    power: Power,
    *,
    importance: NDArray[np.float32] | None = None,
    everywhere: bool = False,
) -> dict[str, float]:
    """Predicted error of a weight in each format that can hold it.

    Args:
        weight: (N, ...) float32.
        names: FORMATS names. One whose blocks do not divide the rows is judged as it is stored
            where readers restore shapes, in rows of 256; if that fails too it is left out, as are
            formats that overflow and those that need an importance which is not there.
        power: of the gradient of the weight as a matrix (N, K).
        importance: (K,) what encoders that need it weigh columns by.
        everywhere: whether those that can do without weigh by it too.
    """
    n, k = matrix_shape(weight.shape)
    found = {}
    for name in names:
        row = FORMATS[name]
        flat = flat_shape(weight.shape) if row.check(weight.shape) else ()
        if (row.check(weight.shape) and not flat) or (flat and row.check(flat)):
            continue
        if row.importance == "required" and (importance is None or flat):
            continue
        multiple = row.row_multiple(weight.shape)
        multiple = math.lcm(multiple, flat[1] // math.gcd(k, flat[1])) if flat else multiple
        index = _rows(n, k, multiple)
        chosen = np.ascontiguousarray(weight.reshape(n, k)[index])  # (R, K)
        rows = power.rows[index]
        stored = chosen.reshape(-1, flat[1]) if flat else chosen
        stats = backend(row.codec, "reduce")(stored, None, fmt=name) if row.passes == 2 else None
        weighs = not flat and row.importance in (("required", "optional")[: 1 + everywhere])
        weigh = {"importance": importance} if weighs else {}
        parts = backend(row.codec, "encode")(stored, stats, fmt=name, **weigh)
        decoded = backend(row.codec, "decode")(parts, stored.shape, fmt=name)
        if not np.isfinite(decoded).all():
            continue
        wrong = decoded.reshape(chosen.shape) - chosen
        error = power.weigh(wrong**2, rows) * power.coherence(wrong, index)
        share = rows.sum() / power.rows.sum() if power.rows.sum() else 1.0
        if share > 0:
            found[name] = error / share
        elif not error:
            found[name] = 0.0
    return found


def _rows(n: int, k: int, multiple: int) -> NDArray[np.int64]:
    """Rows that are judged: all, or whole groups of `multiple`, evenly spaced."""
    wanted = max(SAMPLE // (k * multiple), 1)
    groups = n // multiple
    if n * k <= SAMPLE or groups <= wanted:
        return np.arange(n)
    starts = np.linspace(0, groups - 1, wanted).astype(np.int64) * multiple
    return (starts[:, None] + np.arange(multiple)).reshape(-1)
