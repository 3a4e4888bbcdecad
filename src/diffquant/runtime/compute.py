"""What products are computed in: as the weights say, in fp8 or in int8; a table of what a card can.

`exact` decodes a weight to the compute dtype and multiplies there (few rows on a card in one
kernel, few_rows.py). `fp8` and `int8` multiply 8-bit rows (kernels/rows.py): activations are
quantized call by call. `auto` takes fp8 for weights stored in fp8 and int8 for weights stored in
int8, where the card multiplies them, and leaves the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from diffquant.core.errors import UnknownFormat
from diffquant.runtime.kernels.table import fast_module

__all__ = [
    "ENGINES",
    "KINDS",
    "MODES",
    "Card",
    "Engine",
    "Mode",
    "Refused",
    "card_of",
    "engine_for",
    "engines_for",
]

Mode = Literal["auto", "exact", "fp8", "int8"]
MODES: tuple[Mode, ...] = ("auto", "exact", "fp8", "int8")


@dataclass(frozen=True, slots=True)
class Card:
    """What a device is to products in 8 bits.

    Attributes:
        type: of the device: cpu, cuda, mps.
        capability: compute capability, 90 for 9.0; 0 where there is none.
        without_triton: why Triton's kernels do not run there, "" if they do.
    """

    type: str
    capability: int = 0
    without_triton: str = ""


@dataclass(frozen=True, slots=True)
class Engine:
    """What multiplies a kind of 8-bit rows.

    Attributes:
        kind: a key of kernels.rows.KINDS.
        name: of the routine.
        capability: the oldest card it runs on.
        triton: whether it is a Triton kernel.
        dtypes: of activations it serves; others are computed exactly.
        reason: why this one, for people.
    """

    kind: str
    name: str
    capability: int
    triton: bool
    dtypes: tuple[torch.dtype, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a device does not multiply a kind of 8-bit rows."""

    reason: str


_HALF = (torch.bfloat16, torch.float16)
# In order: the first that serves is taken. torch._scaled_mm by rows has bfloat16 results alone.
ENGINES: tuple[Engine, ...] = (
    Engine("fp8", "torch._scaled_mm", 89, False, (torch.bfloat16,), "by rows, from 8.9 on"),
    Engine("int8", "triton", 80, True, _HALF, "scales and bias in the product itself"),
    Engine("int8", "torch._int_mm", 80, False, _HALF, "scaled afterwards: Triton is not usable"),
)
KINDS: Mapping[str, str] = {"fp8": "8.9 (Ada, Hopper)", "int8": "8.0 (Ampere)"}


def card_of(device: torch.device | str) -> Card:
    """Look at a device."""
    one = torch.device(device)
    if one.type != "cuda":
        return Card(one.type)
    major, minor = torch.cuda.get_device_capability(one)
    return Card("cuda", major * 10 + minor, fast_module("cuda")[1])


def engine_for(kind: str, card: Card) -> Engine | Refused:
    """Choose what multiplies `kind` on a card, or say why nothing does.

    Raises:
        UnknownFormat: no such kind.
    """
    if kind not in KINDS:
        raise UnknownFormat(kind, KINDS, what="kind of product")
    if card.type != "cuda":
        return Refused(f"products in {kind} gain nothing on {card.type}: they are of CUDA cards")
    for row in ENGINES:
        if row.kind == kind and row.capability <= card.capability:
            if row.triton and card.without_triton:
                continue
            return row
    found = f"{card.capability // 10}.{card.capability % 10}"
    return Refused(f"{kind} needs compute capability {KINDS[kind]} or later, this card has {found}")


def engines_for(mode: Mode, card: Card) -> tuple[dict[str, Engine], tuple[str, ...]]:
    """What multiplies each kind that a mode may use; and why others are not multiplied.

    Raises:
        UnknownFormat: no such mode.
    """
    if mode not in MODES:
        raise UnknownFormat(mode, MODES, what="way to compute")
    kinds = {"exact": (), "auto": tuple(KINDS)}.get(mode, (mode,))
    found = {kind: engine_for(kind, card) for kind in kinds}
    refused = tuple(one.reason for one in found.values() if isinstance(one, Refused))
    return {kind: one for kind, one in found.items() if isinstance(one, Engine)}, refused
