"""examine(): every look, in one order, and what models are planned for."""

from __future__ import annotations

import dataclasses
import functools
import importlib

from diffquant.convert.footprint.levels import CONTEXT_NBYTES
from diffquant.core.errors import UsageError
from diffquant.runtime.doctor.accelerators import Accelerator, Accelerators, accelerators
from diffquant.runtime.doctor.decoders import Decoders, decoders
from diffquant.runtime.doctor.families import families
from diffquant.runtime.doctor.libraries import Installed, installed
from diffquant.runtime.doctor.machine import Machine, machine
from diffquant.runtime.doctor.probe import Broken, probe
from diffquant.runtime.doctor.problems import problems
from diffquant.runtime.doctor.products import Products, products
from diffquant.runtime.doctor.report import Compute, Diagnosis, Planned
from diffquant.runtime.memory.plan import Budget

__all__ = ["examine"]

_STORAGE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_KINDS = ("cpu", "cuda", "mps")


def examine(
    *, device: str | None = None, vram: int | None = None, ram: int | None = None
) -> Diagnosis:
    """Look at this machine, and plan published models for it or for what is supposed.

    Args:
        device: to plan for, as --device takes it; the first accelerator where not given, or a GPU
            where `vram` is. It need not be here if its memory is given.
        vram: bytes to suppose a GPU has.
        ram: bytes of RAM to suppose a run may take.

    Raises:
        UsageError: no such kind of device, or one that is not here without its memory.
    """
    if device is not None and device.partition(":")[0] not in _KINDS:
        raise UsageError(f"--device {device}: expected cpu, cuda or mps")
    if device == "cpu" and vram is not None:
        raise UsageError("--vram is memory of a GPU: leave it out with --device cpu, or use --ram")
    broken: list[Broken] = []
    here, found = machine(broken), accelerators(broken)
    supposed = _supposed(found, device, vram)
    compute = _compute(found, supposed, broken)
    planned = _planned(here, found, compute, device, vram, ram)
    kinds = dict.fromkeys(one.device.partition(":")[0] for one in compute)
    rows: list[Decoders] = []
    for kind in kinds:
        dtype = next(one.dtype for one in compute if one.device.startswith(kind))
        rows += probe(f"decoders for {kind}", lambda k=kind, d=dtype: decoders(k, d), broken) or ()  # type: ignore[misc]
    multiplied: list[Products] = []
    for name in (one.device for one in compute if one.device != "cpu"):
        look = functools.partial(products, name, supposed=name == supposed)
        multiplied += probe(f"products on {name}", look, broken) or ()
    probe("numba", _numba, broken)
    if found.built_for.startswith("CUDA") and found.found:
        probe("triton", _triton, broken)
    libraries = tuple(_with_error(one, broken) for one in installed())
    kind = planned.device.partition(":")[0]
    fits = families(
        Budget(planned.budget, planned.ram),
        device=kind,
        compute=_STORAGE[planned.dtype],
        backends={name: row.backend for row in rows if row.device == kind for name in row.formats},
    )
    diagnosis = Diagnosis(
        here,
        found,
        libraries,
        compute,
        tuple(rows),
        tuple(multiplied),
        planned,
        fits,
        (),
        tuple(broken),
    )
    return dataclasses.replace(diagnosis, problems=problems(diagnosis))


def _supposed(found: Accelerators, device: str | None, vram: int | None) -> str:
    """The device to suppose, "" where the one to plan for is here."""
    wanted = device or ("" if vram is None else "cuda")
    kind = wanted.partition(":")[0]
    have = {one.device for one in found.found} | {one.kind for one in found.found}
    if kind in ("", "cpu") or wanted in have:
        return ""
    if vram is None:
        raise UsageError(
            f"--device {wanted}: not on this machine; add --vram to plan for one, such as --vram "
            "8GiB"
        )
    return wanted


def _compute(found: Accelerators, supposed: str, broken: list[Broken]) -> tuple[Compute, ...]:
    """The dtype of every device there is, and of a supposed one."""
    rows: list[Compute] = []
    if found.torch:
        for name in ("cpu", *(one.device for one in found.found)):
            one = probe(f"dtype of {name}", lambda name=name: _native(name), broken)  # type: ignore[misc]
            if one is not None:
                rows.append(one)
    if supposed:
        is_mps = supposed == "mps"
        why = "supposed: a Mac" if is_mps else "supposed: compute capability 8.0 or later"
        rows.append(Compute(supposed, "float16" if is_mps else "bfloat16", why))
    return tuple(rows)


def _native(device: str) -> Compute:
    from diffquant.runtime.devices import native_dtype, why_native

    return Compute(device, str(native_dtype(device)).removeprefix("torch."), why_native(device))


def _planned(
    here: Machine,
    found: Accelerators,
    compute: tuple[Compute, ...],
    device: str | None,
    vram: int | None,
    ram: int | None,
) -> Planned:
    free = here.memory.available if here.memory is not None else None
    first = found.found[0].device if found.found else "cpu"
    name = device or (first if vram is None or found.found else "cuda")
    kind = name.partition(":")[0]
    card = next((one for one in found.found if one.device.startswith(name)), None)
    dtype = next((one.dtype for one in compute if one.device.startswith(name)), "float32")
    memory = ram if ram is not None else free
    budget = memory if kind == "cpu" else vram if vram is not None else _free(card)
    return Planned(name, dtype, budget, memory, vram is not None or ram is not None)


def _free(card: Accelerator | None) -> int | None:
    """What a run may take of a device; the context this process holds is one that plans count."""
    if card is None or card.free is None or card.memory is None:
        return None
    own = CONTEXT_NBYTES[card.kind] if card.kind == "cuda" else 0
    return min(card.free + own, card.memory)


def _numba() -> None:
    importlib.import_module("numba")


def _triton() -> None:
    importlib.import_module("triton")


def _with_error(row: Installed, broken: list[Broken]) -> Installed:
    error = next((one.error for one in broken if one.what == row.name), "")
    return dataclasses.replace(row, error=error) if error and row.version else row
