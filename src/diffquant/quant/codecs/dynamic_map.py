"""bitsandbytes' dynamic 8-bit map: 256 ascending values in [-1, 1], denser towards zero.

An exponent runs from 1e-6 to 1; the higher it is, the more values share it: 2 ** i of them at
10 ** (i - 6), in the middles of as many equal intervals of [0.1, 1], with either sign; 0 and 1 fill
up. Source: bitsandbytes 0.50.2 functional.py:296-348 (create_dynamic_map), bit for bit.

The CPU library looks a value up by its place among 65536 equal steps of [-1, 1] and takes what is
nearest to the middle of the step, so that a value within 1.5e-5 of the border between two codes may
get either; this is what the bytes of its files hold. Found by trying: equal for every one of 2 M
values; a zero gets code 131.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32

__all__ = ["DYNAMIC_MAP", "STEPS", "STEP_CODES", "nearest_codes"]

_EXPONENTS = 7
STEPS = 65535  # between the first and the last


def _interval_middles(count: int) -> Float32:
    """Middles of `count` equal intervals of [0.1, 1], with torch.linspace's float32 roundings.

    It multiplies and adds with one rounding, which float64 gives, the second half from the end.
    """
    first, last = np.float32(0.1), np.float32(1)
    step = np.float64((last - first) / np.float32(count))
    at = np.arange(count + 1)
    low, high = np.float64(first) + step * at, np.float64(last) - step * (count - at)
    borders = np.where(at < (count + 1) // 2, low, high).astype(np.float32)
    middles: Float32 = (borders[:-1] + borders[1:]) / np.float32(2)
    return middles


def _dynamic_map() -> Float32:
    values: list[float] = [0.0, 1.0]
    for i in range(_EXPONENTS):
        scale = np.float32(10.0 ** (i - _EXPONENTS + 1))
        positive = scale * _interval_middles(2**i)
        values += [*positive.tolist(), *(-positive).tolist()]
    return np.array(sorted(values), np.float32)


DYNAMIC_MAP: Float32 = _dynamic_map()


def _step_codes() -> Bytes:
    middles = (DYNAMIC_MAP[:-1].astype(np.float64) + DYNAMIC_MAP[1:]) / 2
    values = np.arange(STEPS + 1) * 2 / STEPS - 1
    return np.searchsorted(middles, values).astype(np.uint8)


STEP_CODES: Bytes = _step_codes()


def nearest_codes(scaled: Float32) -> Bytes:
    """Codes of values in [-1, 1], as bitsandbytes' CPU library finds them; NaN gets code 0."""
    half = np.float32(0.5)
    steps = np.floor((scaled + np.float32(1)) * np.float32(STEPS / 2) + half)
    found: Bytes = STEP_CODES[np.clip(np.nan_to_num(steps), 0, STEPS).astype(np.int32)]
    return found
