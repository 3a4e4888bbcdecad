"""What decoding one packed weight for a call takes, by number format: bytes a weight at the worst.

Weights stay packed in memory and are decoded whole when their layer runs. The torch reference
(runtime/kernels/reference.py) decodes in float32: fields, their product with the scale and the cast
copy live side by side, so that a weight costs 8 bytes and more for a moment. A kernel that writes
its result at once (numba, Triton) costs the bytes of the compute dtype alone. Each row is counted
again by tests/runtime/test_footprint.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from diffquant.core.dtypes import STORAGE

__all__ = ["BACKENDS", "Backend", "Serving", "decode_nbytes", "usually"]

Backend: TypeAlias = Literal["stored", "numba", "triton", "torch"]
BACKENDS: tuple[Backend, ...] = ("stored", "numba", "triton", "torch")


@dataclass(frozen=True, slots=True)
class Serving:
    """What runs on a device.

    Attributes:
        backend: number format -> one of BACKENDS.
        copies_kernels: whether a convolution lays its kernel out again, as oneDNN does on a CPU:
            112 MiB of float32 became 226 (docs/lab-log.md).
    """

    backend: Callable[[str], str]
    copies_kernels: bool = False


_BF16_COPY = 2.0  # decoded in float32 and cast while both copies live

# Bytes a weight at the worst moment of the reference, for results in float32 and less.
_REFERENCE: Mapping[str, float] = {
    **dict.fromkeys(("fp8_e4m3_scaled", "fp8_e5m2_scaled", "fp8_e4m3_rowwise"), 8.0),
    **dict.fromkeys(("int8_tensor", "int8_rowwise", "int8_bnb"), 8.0),
    "q8_0": 8.13,
    **dict.fromkeys(("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "mxfp4", "tq2_0"), 9.13),
    **dict.fromkeys(("q4_k", "iq4_xs", "nvfp4"), 9.28),
    "q2_k": 9.5,
    **dict.fromkeys(("q5_k", "q6_k", "q3_k"), 10.38),
    **dict.fromkeys(("iq1_s", "iq1_m"), 10.88),
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"), 18.38),
    "tq1_0": 20.52,
    "mxfp8": 8.16,
    "nvfp4_comfy": 9.31,
    **dict.fromkeys(("fp8_e4m3_blockwise", "int8_blockwise"), 12.0),
    **dict.fromkeys(("nf4", "fp4", "nf4_dq", "fp4_dq"), 16.06),
    **dict.fromkeys(("int8_convrot", "int8_convrot_64", "int8_convrot_16"), 24.0),
    **dict.fromkeys(("convrot_w4a4", "convrot_w4a4_64"), 19.0),
    **dict.fromkeys(("asym_w4a8_int8", "asym_w4a8_int8_64", "asym_w4a8_int8_16"), 19.0),
}
_CASTS_LATE = ("int8_bnb", "mxfp8", "nvfp4_comfy")
_UNKNOWN = 12.0  # formats that are read and no kernel runs: what most that are scaled take
_SAME = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


# Device -> what decodes there where everything is installed.
_USUAL: Mapping[str, Backend] = {"cpu": "numba", "cuda": "triton"}


def usually(device: str) -> Serving:
    """What runs on a device with numba and Triton installed; the torch reference elsewhere."""
    backend = _USUAL.get(device, "torch")
    return Serving(lambda _fmt: backend, copies_kernels=device == "cpu")


def decode_nbytes(fmt: str, size: int, *, compute: str, backend: str = "torch") -> int:
    """Bytes that decoding a weight takes at its worst moment, the result among them.

    Args:
        fmt: FORMATS name, "" for numbers without a row.
        size: number of weights.
        compute: STORAGE name of the dtype it is decoded to; a weight stored so takes nothing.
        backend: one of BACKENDS; formats without a row are always read by the reference.
    """
    assert backend in BACKENDS, backend
    wanted = STORAGE[compute].block_nbytes
    if _SAME.get(fmt) == compute:
        return 0
    if fmt in ("f32", "f16", "bf16", "fp8_e4m3", "fp8_e5m2"):
        return size * wanted
    if backend != "torch" and fmt in _REFERENCE:
        return size * wanted
    each = _REFERENCE.get(fmt, _UNKNOWN)
    if fmt in _CASTS_LATE and compute != "F32":
        each += _BF16_COPY
    return int(size * each)
