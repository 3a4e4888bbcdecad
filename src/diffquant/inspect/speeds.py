"""SPEEDS: how fast formats are decoded on a card, as it was measured; nothing is guessed.

One card was measured, an H100 (docs/lab-log.md, "Decoders and compiled steps on an H100"): 37.7
million weights to bfloat16, time over the floor of copying so many bytes, and for four types one
compiled step of Flux.1 over the same step in bfloat16. The log gives numbers for formats that
stand out and a bound, 1.4, for the rest. Other programs have kernels of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from diffquant.quant.formats import FORMATS

__all__ = ["CARDS", "SPEEDS", "Speed", "speed_class"]

# Card generation -> the card it was measured on.
CARDS: Mapping[str, str] = {"hopper": "H100"}
_FAST = 1.4
_CLASSES = ((_FAST, "fast"), (2.0, "medium"), (math.inf, "slow"))
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured of a format.

    Attributes:
        decode: time over the floor of reading packed and writing decoded bytes.
        bound: whether it is "at most", since the log names no number.
        step: of a type based on it, a compiled step of Flux.1 over that in bfloat16; None where
            none was measured.
    """

    decode: float
    bound: bool = False
    step: float | None = None


_MEASURED: Mapping[str, Speed] = {
    "q8_0": Speed(1.13, step=1.15),
    "q4_k": Speed(1.18, step=1.09),
    "nf4": Speed(1.17, step=1.09),
    "fp8_e4m3_scaled": Speed(1.34, bound=True, step=1.14),
    "fp8_e4m3": Speed(1.34, bound=True),
    "fp8_e5m2": Speed(1.34, bound=True),
    "fp8_e5m2_scaled": Speed(1.34, bound=True),
    "q3_k": Speed(1.64),
    "q6_k": Speed(1.44),
    "int8_convrot": Speed(2.15),
    "int8_convrot_64": Speed(1.62),
    "asym_w4a8_int8": Speed(2.11),
    "asym_w4a8_int8_64": Speed(1.86),
    "asym_w4a8_int8_16": Speed(1.50),
    "convrot_w4a4": Speed(2.54),
    "convrot_w4a4_64": Speed(1.91),
}
# All 45 formats were measured: 38 are within 1.4, and those that are not are named above.
SPEEDS: Mapping[str, Mapping[str, Speed]] = {
    "hopper": {
        name: _MEASURED.get(name, Speed(1.39 if name.startswith("iq") else _FAST, bound=True))
        for name, row in FORMATS.items()
        if not row.is_cast
    }
}


def speed_class(card: str, formats: Iterable[tuple[str, int]]) -> str:
    """A word for how fast weights are decoded: by the average over them, bounds counted whole.

    Args:
        card: a key of CARDS; others were not measured.
        formats: (format, number of weights) of a denoiser.
    """
    table = SPEEDS.get(card)
    if table is None:
        return "not measured"
    packed = [(table[name].decode, count) for name, count in formats if name in table]
    weights = sum(count for _, count in packed)
    if not weights:
        return "nothing to decode"
    mean = sum(decode * count for decode, count in packed) / weights
    return next(word for limit, word in _CLASSES if mean <= limit + _ROUNDING)
