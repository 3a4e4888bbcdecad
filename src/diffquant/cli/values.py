"""Option values that commands share: sizes, seeds, prompt files, devices, LoRA pairs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from diffquant.core.amounts import bytes_from
from diffquant.core.errors import ResourceError, UsageError
from diffquant.io.atomic import check_parent, partial_path
from diffquant.io.prompt_file import read_lines
from diffquant.io.prompt_file import read_prompts as prompts_from

if TYPE_CHECKING:
    from diffquant.runtime.devices import Device

__all__ = [
    "bytes_from",
    "check_device",
    "check_free",
    "device_from",
    "fell_back",
    "header_pairs",
    "lora_pairs",
    "prompts_from",
    "seeds_from",
    "size_from",
    "write_text",
]


def check_free(path: Path, taken: Iterable[Path | None], *, force: bool) -> None:
    """Check, before work starts, that a text file can be written.

    Raises:
        UsageError: it is one of the `taken` files, exists without `force`, or has no folder.
    """
    for other in taken:
        if other is not None and other.resolve() == path.resolve():
            raise UsageError(f"{path} is read or written already; choose another name")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a file name")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; use --force to replace it")
    check_parent(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file that exists only when it is whole."""
    beside = partial_path(path)
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def header_pairs(texts: Iterable[str]) -> dict[str, str]:
    """Read KEY=VALUE pairs for a header.

    Raises:
        UsageError: no key, or one that diffquant writes itself.
    """
    pairs = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise UsageError(f"--metadata {text}: expected KEY=VALUE (KEY= removes a pair)")
        if key.startswith("diffquant.") or key == "__metadata__":
            raise UsageError(f"--metadata {key}: diffquant writes this key itself; choose another")
        pairs[key] = value
    return pairs


def size_from(text: str | None) -> tuple[int, int] | None:
    """Read WIDTHxHEIGHT, or one number for a square.

    Raises:
        UsageError: not a size.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(re.fullmatch(r"0*[1-9][0-9]{0,8}", part) for part in parts):
        raise UsageError(f"--size {text}: expected WIDTHxHEIGHT, such as 512x768")
    width, height = int(parts[0]), int(parts[-1])
    return width, height


def seeds_from(text: str, option: str = "--seeds") -> tuple[int, ...]:
    """Read seeds: 0,1,7, or a file of them, with commas or one per line.

    Raises:
        UsageError: not integers, or none.
    """
    file = Path(text)
    listed = text.split(",")
    if not text[:1].isdigit() and file.is_file():
        listed = [one for line in read_lines(file) for one in line.split(",")]
    try:
        seeds = tuple(int(part) for part in listed)
    except ValueError:
        raise UsageError(
            f"{option} {text}: expected numbers with commas, such as 0,1, or a file of them"
        ) from None
    if not seeds:
        raise UsageError(f"{option} {text}: no seeds in it")
    if any(not 0 <= seed < 2**63 for seed in seeds):
        raise UsageError(f"{option} {text}: a seed is at least 0 and below 2**63")
    return seeds


def lora_pairs(values: tuple[str, ...]) -> tuple[tuple[Path, float], ...]:
    """Read FILE or FILE:WEIGHT. A drive letter's colon is not a weight.

    Raises:
        UsageError: the weight is not a number.
    """
    pairs = []
    for text in values:
        head, separator, tail = text.rpartition(":")
        if not separator or Path(text).exists() or "/" in tail or "\\" in tail:
            pairs.append((Path(text), 1.0))
            continue
        try:
            pairs.append((Path(head), float(tail)))
        except ValueError:
            raise UsageError(
                f"--lora {text}: expected FILE:WEIGHT, such as style.safetensors:0.8"
            ) from None
    return tuple(pairs)


def device_from(name: str, engine: str = "bundled") -> Device:
    """A device by its name, or for "auto" the one that computes here; sdcpp has the CPU alone.

    Raises:
        ResourceError, UsageError: as check_device.
    """
    from diffquant.runtime.devices import Device, auto_device

    if name == "auto":
        return Device("cpu", "sdcpp runs there") if engine == "sdcpp" else auto_device()
    check_device(name, "auto, cpu, cuda or mps")
    return Device(name)


def fell_back(on: Device) -> tuple[str, ...]:
    """The warning for a card that is there and does not compute."""
    return (f"computed on the CPU: {on.why}",) if on.failed else ()


def check_device(name: str, known: str = "cpu, cuda or mps") -> None:
    """Refuse a device this machine does not have, before anything is loaded.

    Raises:
        ResourceError: no such device here.
        UsageError: not a device.
    """
    from diffquant.runtime.devices import available_devices

    kind = name.split(":", maxsplit=1)[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {name}: expected {known}")
    have = available_devices()
    if name not in have and kind not in have:
        raise ResourceError(f"--device {name}: not on this machine (it has: {', '.join(have)})")
