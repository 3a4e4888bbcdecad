"""Which cards encode, asked for as auto, cpu, cuda (all of them) or cuda:N.

The driver is asked before torch is: on a machine without a card nothing heavy is imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from dataclasses import dataclass

from diffquant.core.errors import ResourceError, UsageError

__all__ = ["DEVICES", "NO_CARDS", "Cards", "cards_for", "too_few"]

DEVICES = ("auto", "cpu", "cuda", "cuda:N")
_DRIVERS = {"linux": "libcuda.so.1"}  # where triton comes from wheels: pyproject.toml


@dataclass(frozen=True, slots=True)
class Cards:
    """Cards that share the tensors.

    Attributes:
        devices: torch's names; empty where the CPU encodes everything.
        name: what they are called, for people.
        why: a reason to tell why there is none; "" where there is nothing to tell.
    """

    devices: tuple[str, ...] = ()
    name: str = ""
    why: str = ""


NO_CARDS = Cards()


def too_few(weights: int, least: int) -> Cards:
    """No cards, for a run that has too little for them; told where there are any.

    Args:
        weights: as many as Q4_K would be searched for in the same time.
        least: from which cards are taken.
    """
    if not weights or not _driver_cards()[0]:
        return NO_CARDS
    return Cards(
        why=f"as much to search for as {weights / 1e9:.1f} billion weights of Q4_K; cards are "
        f"taken from {least / 1e9:.1f} billion on, and with --device cuda"
    )


def cards_for(asked: str) -> Cards:
    """Find the cards that `asked` means.

    Args:
        asked: "auto" (all cards, none where they cannot serve), "cpu", "cuda" (all) or "cuda:N".

    Raises:
        UsageError: another word.
        ResourceError: cards were asked for by name and cannot serve; says why.
    """
    if asked != "auto" and not re.fullmatch(r"cpu|cuda(:\d{1,3})?", asked):
        raise UsageError(f"--device {asked}: expected one of {', '.join(DEVICES)}")
    if asked == "cpu":
        return NO_CARDS
    count, missing = _driver_cards()
    if asked == "auto" and not count:
        return NO_CARDS
    why = missing or _unusable()
    numbers = tuple(range(count))
    if not why and ":" in asked:
        wanted = int(asked.partition(":")[2])
        if wanted not in numbers:
            why = f"there are {count} cards, numbered from 0"
        numbers = (wanted,)
    if why and asked == "auto":
        return Cards(why=why)
    if why:
        raise ResourceError(
            f"--device {asked}: no card can encode here: {why}; --device cpu makes the same bytes"
        )
    return _named(numbers)


def _driver_cards() -> tuple[int, str]:
    """How many cards the driver has, as this process may see them; and why none, if so."""
    library = _DRIVERS.get(sys.platform)
    if library is None:
        return 0, f"cards serve on Linux, not on {sys.platform}"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return 0, "NVIDIA's driver is not installed"
    count = ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code:
        return 0, f"NVIDIA's driver reports no card (CUDA error {code})"
    return count.value, "" if count.value else "NVIDIA's driver reports no card"


def _unusable() -> str:
    """Why torch or triton cannot use the driver's cards; "" if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} does not reach the card"
    from diffquant.quant.codecs.triton.launch import unavailable

    return unavailable()


def _named(numbers: tuple[int, ...]) -> Cards:
    import torch

    names = dict.fromkeys(torch.cuda.get_device_name(number) for number in numbers)
    devices = tuple(f"cuda:{number}" for number in numbers)
    return Cards(devices, f"{', '.join(devices)} ({', '.join(names)})")
