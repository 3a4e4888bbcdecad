"""The machine: system, processor, memory, disks. Nothing here needs torch."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from diffquant import __version__
from diffquant.core.limits import Limits, limits
from diffquant.runtime.doctor.probe import Broken, probe
from diffquant.runtime.doctor.processor import Processor, processor

__all__ = ["Disk", "Machine", "Memory", "machine"]

# Where huggingface_hub keeps files: huggingface/huggingface_hub@v1.0.0:src/huggingface_hub/
# constants.py. Said only where somebody set it.
_HUB_CACHES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME")


@dataclass(frozen=True, slots=True)
class Memory:
    """RAM in bytes.

    Attributes:
        total: built in.
        available: without swapping, and within the limit.
        limit: of the control group, None where it is none.
        swap, swap_free: of swap.
    """

    total: int
    available: int
    limit: int | None
    swap: int
    swap_free: int


@dataclass(frozen=True, slots=True)
class Disk:
    """A place files go to.

    Attributes:
        what: "working directory", "temporary files" or the variable that names a cache.
        free, total: bytes of its file system; None where the place does not exist.
    """

    what: str
    path: str
    free: int | None
    total: int | None


@dataclass(frozen=True, slots=True)
class Machine:
    """What runs diffquant.

    Attributes:
        system: operating system and its release.
        python, diffquant: versions.
        processor, memory: None where they could not be looked at.
    """

    system: str
    python: str
    diffquant: str
    processor: Processor | None
    memory: Memory | None
    disks: tuple[Disk, ...]


def machine(broken: list[Broken]) -> Machine:
    """Look at the machine; what fails becomes a row of `broken`."""
    limited = probe("control groups", limits, broken) or Limits(None, None, None)
    cores = probe("psutil", _physical_cores, broken)
    return Machine(
        system=f"{_system()} on {platform.machine()}",
        python=platform.python_version(),
        diffquant=__version__,
        processor=probe("processor", lambda: processor(limited, cores), broken),
        memory=probe("psutil", lambda: _memory(limited), broken),
        disks=tuple(_disks(broken)),
    )


def _system() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}".strip()


def _physical_cores() -> int | None:
    import psutil

    found: int | None = psutil.cpu_count(logical=False)
    return found


def _memory(limited: Limits) -> Memory:
    import psutil

    found, swap = psutil.virtual_memory(), psutil.swap_memory()
    limit = limited.ram if limited.ram is not None and limited.ram < found.total else None
    free = found.available
    if limit is not None and limited.ram_free is not None:
        free = min(free, limited.ram_free)
    return Memory(found.total, free, limit, swap.total, swap.free)


def _disks(broken: list[Broken]) -> list[Disk]:
    places = [("working directory", os.curdir), ("temporary files", "")]
    places += [(name, os.environ[name]) for name in _HUB_CACHES if os.environ.get(name)][:1]
    found = []
    for what, path in places:
        one = probe(what, lambda what=what, path=path: _disk(what, path), broken)  # type: ignore[misc]
        if one is not None:
            found.append(one)
    return found


def _disk(what: str, path: str) -> Disk:
    place = Path(path or tempfile.gettempdir()).absolute()
    if not place.exists():
        return Disk(what, str(place), None, None)
    usage = shutil.disk_usage(place)
    return Disk(what, str(place), usage.free, usage.total)
