"""Diagnosis: everything that `doctor` says about a machine, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from diffquant.runtime.doctor.accelerators import Accelerators
from diffquant.runtime.doctor.bench import Bench
from diffquant.runtime.doctor.decoders import Decoders
from diffquant.runtime.doctor.families import FamilyFit
from diffquant.runtime.doctor.libraries import Installed
from diffquant.runtime.doctor.machine import Machine
from diffquant.runtime.doctor.probe import Broken
from diffquant.runtime.doctor.products import Products

__all__ = ["Compute", "Diagnosis", "Planned", "Problem"]


@dataclass(frozen=True, slots=True)
class Compute:
    """The dtype that --dtype auto means on a device.

    Attributes:
        device: as --device takes it.
        dtype: torch's name.
        why: what decided.
    """

    device: str
    dtype: str
    why: str


@dataclass(frozen=True, slots=True)
class Planned:
    """What models were planned for.

    Attributes:
        device: as --device takes it.
        dtype: computed in.
        budget: bytes of the device, or of RAM on a CPU; None where unknown.
        ram: bytes of RAM that a run may take; None where unknown.
        supposed: whether any of it was asked for instead of found.
    """

    device: str
    dtype: str
    budget: int | None
    ram: int | None
    supposed: bool


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that can be done better.

    Attributes:
        what: is the matter, with numbers.
        do: what to type or change.
    """

    what: str
    do: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One machine.

    Attributes:
        compute: a row per device, the CPU first; empty where torch does not load.
        decoders: likewise, in groups.
        products: of accelerators, what multiplies in 8 bits.
        families: published models, planned for `planned`.
        broken: what failed when it was looked at; every row is a problem too.
        bench: what was measured, where that was asked for.
    """

    machine: Machine
    accelerators: Accelerators
    libraries: tuple[Installed, ...]
    compute: tuple[Compute, ...]
    decoders: tuple[Decoders, ...]
    products: tuple[Products, ...]
    planned: Planned
    families: tuple[FamilyFit, ...]
    problems: tuple[Problem, ...]
    broken: tuple[Broken, ...]
    bench: Bench | None = None
