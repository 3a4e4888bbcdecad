"""Accelerators as torch sees them, and why there are none. torch is loaded when a function runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from diffquant.runtime.doctor.probe import Broken, probe

__all__ = ["Accelerator", "Accelerators", "accelerators", "nvidia_driver"]

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A device.

    Attributes:
        device: as --device takes it: cuda:0, mps.
        name: as its maker calls it.
        capability: compute capability, "" for none.
        memory, free: bytes; what this process's own context takes is not free. None where the
            system does not say.
    """

    device: str
    name: str
    capability: str
    memory: int | None
    free: int | None

    @property
    def kind(self) -> str:
        """Type of the device: cuda or mps."""
        return self.device.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Accelerators:
    """All of them, and what torch is made for.

    Attributes:
        found: none may be there.
        torch: its version, "" where it does not load.
        built_for: "CUDA 13.0", "ROCm 6.4", or "" for a torch without.
        driver: version of NVIDIA's driver, "" where there is none.
        threads: torch computes with on the CPU; None where it does not load.
        why_none: kind of device -> why there is none; kinds that could not be here are left out.
    """

    found: tuple[Accelerator, ...]
    torch: str
    built_for: str
    driver: str
    threads: int | None
    why_none: Mapping[str, str]


def accelerators(broken: list[Broken]) -> Accelerators:
    """Look for devices; what fails becomes a row of `broken`."""
    driver = probe("NVIDIA driver", nvidia_driver, broken) or ""
    torch = probe("torch", _torch, broken)
    if torch is None:
        return Accelerators((), "", "", driver, None, {"GPU": "torch does not load"})
    built_for = _built_for(torch)
    found: list[Accelerator] = []
    why: dict[str, str] = {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found += probe("CUDA", lambda: _cuda(torch), broken) or []
    if not found:
        told = [str(one.message) for one in said]
        why["CUDA"] = _why_no_cuda(built_for, driver, told)
    apple = probe("MPS", lambda: _mps(torch), broken)
    if apple is not None:
        found.append(apple)
    elif torch.backends.mps.is_built():
        why["MPS"] = "torch is built for it, and this macOS or processor has none"
    threads = torch.get_num_threads()
    return Accelerators(tuple(found), str(torch.__version__), built_for, driver, threads, why)


def nvidia_driver(place: Path = _DRIVER_FILE) -> str:
    """Version of NVIDIA's driver, "" where there is none: from Linux, else from nvidia-smi."""
    if place.exists():
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", place.read_text(encoding="utf-8"))
        return found[1] if found else "of unknown version"
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = (program, "--query-gpu=driver_version", "--format=csv,noheader")
    ran = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    return ran.stdout.split("\n")[0].strip() if ran.returncode == 0 else ""


def _torch() -> ModuleType:
    import torch

    return torch


def _built_for(torch: ModuleType) -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    hip = getattr(torch.version, "hip", None)
    return f"ROCm {hip}" if hip else ""


def _cuda(torch: ModuleType) -> list[Accelerator]:
    """Devices of CUDA, which ROCm's go by as well."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{facts.major}.{facts.minor}"
        found.append(Accelerator(f"cuda:{index}", facts.name, capability, total, free))
    return found


def _mps(torch: ModuleType) -> Accelerator | None:
    if not torch.backends.mps.is_available():
        return None
    memory = int(torch.mps.recommended_max_memory())
    return Accelerator(
        "mps", "Apple GPU", "", memory, memory - int(torch.mps.driver_allocated_memory())
    )


def _why_no_cuda(built_for: str, driver: str, said: list[str]) -> str:
    if not built_for:
        told = "this torch is built without it"
        return f"{told}; NVIDIA driver {driver} is installed" if driver else told
    if said:  # torch's own words: a driver too old, a card it has no code for
        return said[0].splitlines()[0]
    if not driver and built_for.startswith("CUDA"):
        return f"torch is built for {built_for}, and no NVIDIA driver is installed"
    return f"torch is built for {built_for} and sees no device"
