"""The processor: its name, the cores this process may use, the instructions that decide speed."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffquant.core.limits import Limits

__all__ = ["Processor", "processor"]

_CPUINFO = Path("/proc/cpuinfo")
_PATIENCE_S = 5.0

# As /proc/cpuinfo or LLVM spells them -> as people do. Those that kernels of torch, oneDNN and
# numba choose by.
_INSTRUCTIONS: Mapping[str, str] = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "avx512bf16": "AVX512_BF16",
    "amx_bf16": "AMX_BF16",
    "amx-bf16": "AMX_BF16",
    "asimd": "NEON",
    "neon": "NEON",
    "bf16": "BF16",
    "i8mm": "I8MM",
    "sve": "SVE",
}


@dataclass(frozen=True, slots=True)
class Processor:
    """A processor.

    Attributes:
        name: as its maker calls it.
        cores: physical ones, None where the system does not say.
        threads: logical ones.
        usable: processors' worth of time that this process gets.
        limited_by: "" for all of them, "affinity" or "quota of its control group".
        instructions: those of note, e.g. AVX2, AVX512_BF16, NEON; None where nobody could say.
    """

    name: str
    cores: int | None
    threads: int
    usable: float
    limited_by: str
    instructions: tuple[str, ...] | None


def processor(limited: Limits, cores: int | None, cpuinfo: Path = _CPUINFO) -> Processor:
    """Look at the processor.

    Args:
        limited: what control groups allow.
        cores: physical ones, None where unknown.
        cpuinfo: Linux's description; other systems are asked in their own way.
    """
    threads = os.cpu_count() or 1
    usable, why = float(threads), ""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
        if allowed < threads:
            usable, why = float(allowed), "affinity"
    if limited.cores is not None and limited.cores < usable:
        usable, why = limited.cores, "quota of its control group"
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    name = _line(text, "model name") or _name()
    return Processor(name, cores, threads, usable, why, _instructions(text))


def _line(text: str, name: str) -> str:
    """The value of the first line of that name in /proc/cpuinfo."""
    found = re.search(rf"^{name}\s*: *(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _name() -> str:
    """What macOS, Windows and Linux on Arm call it."""
    if sys.platform == "darwin":
        command = ("sysctl", "-n", "machdep.cpu.brand_string")
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
        return ran.stdout.strip() or platform.processor()
    if sys.platform == "win32":
        import winreg

        place = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, place) as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
    return platform.processor() or platform.machine()


def _instructions(text: str) -> tuple[str, ...] | None:
    """Instructions of note; Linux lists them, LLVM knows them elsewhere."""
    listed = _line(text, "flags") or _line(text, "Features")
    if listed:
        return _named(listed.split())
    try:
        from llvmlite import binding
    except (ImportError, OSError):  # the libraries' own rows say so
        return None
    return _named(name for name, has in binding.get_host_cpu_features().items() if has)


def _named(flags: Iterable[str]) -> tuple[str, ...]:
    have = set(flags)
    return tuple(dict.fromkeys(told for flag, told in _INSTRUCTIONS.items() if flag in have))
