"""What the demo measured, as plain frozen data, and how its numbers are written for people.

Every measurement may be None: a family without a runtime has no pictures, a type that failed has
no numbers. None reads as "-", NaN and infinities as "not finite", identical pictures as
"identical": a reader can always tell "not measured" from "measured, and bad".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["DemoModel", "DemoRow", "decibel_text", "number_text", "size_text"]


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One type of one model: what was written, and what its pictures are like.

    Attributes:
        type: TYPES name, unique within its model.
        path: the file or folder written.
        nbytes: size on disk.
        bits_per_weight: over the quantized part's weights.
        weight_error: relative RMSE of the decoded weights.
        psnr_db: pooled over all pictures; None when identical or not measured.
        identical: every picture equals the source's.
        ssim: mean over pictures.
        prompt_score: share of the prompts' demands that the pictures meet, in [0, 1].
        control_psnr_db: the damaged copy that the gate must refuse.
        noise_floor_psnr_db: the source against itself in bfloat16.
        seconds: wall time to quantize and verify.
        verdict: pass, warn, fail, or words such as "not image-verified".
        stored: what was really stored, such as "q5_0 61%, q4_k 30%".
        note: anything a reader must know, or "".
    """

    type: str
    path: str
    nbytes: int
    bits_per_weight: float
    weight_error: float | None
    psnr_db: float | None
    identical: bool
    ssim: float | None
    prompt_score: float | None
    control_psnr_db: float | None
    noise_floor_psnr_db: float | None
    seconds: float
    verdict: str
    stored: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class DemoModel:
    """One checkpoint and its rows, in the order they are shown.

    Attributes:
        name: as the page's heading has it.
        architecture: slug, such as "sdxl".
        source: where the checkpoint is from.
        nbytes: the source's size on disk.
        prompts: one per picture, in the pictures' order.
        rows: one per type.
        reference_score: prompt score of the source's own pictures.
        noise_floor_psnr_db: the source against itself in bfloat16.
    """

    name: str
    architecture: str
    source: str
    nbytes: int
    prompts: tuple[str, ...]
    rows: tuple[DemoRow, ...]
    reference_score: float | None
    noise_floor_psnr_db: float | None


def size_text(nbytes: float) -> str:
    """Bytes with three digits and a binary unit: 13.4 MiB."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 999.5 or unit == "GiB":
            break
        value /= 1024
    digits = 0 if unit == "B" or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def number_text(value: float | None, digits: int) -> str:
    """A measurement with fixed digits, "-" when there is none."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def decibel_text(value: float | None, *, identical: bool = False) -> str:
    """A PSNR with its unit, or "identical"."""
    if identical:
        return "identical"
    text = number_text(value, 1)
    return f"{text} dB" if text[-1].isdigit() else text
