"""Which compute devices this machine has, and the dtype each computes in without emulation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

__all__ = [
    "Device",
    "auto_device",
    "available_devices",
    "full_float32",
    "native_dtype",
    "why_native",
]

_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # the last on Arm


def available_devices() -> tuple[str, ...]:
    """Device names torch can use here, "cpu" always among them."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        found.append("mps")
    return tuple(found)


class Device(NamedTuple):
    """What computes, and why; `failed`: a card is there and does not."""

    name: str
    why: str = "asked for"
    failed: bool = False


def auto_device() -> Device:
    """What computes where nobody says: a CUDA card that answers, else the CPU.

    Apple's GPUs have to be asked for: nothing here has run on one yet.
    """
    if not torch.cuda.is_available():
        also = "; --device mps is untried" if torch.backends.mps.is_available() else ""
        return Device("cpu", f"torch reaches no CUDA card{also}")
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except RuntimeError as error:  # too old for this torch, or full
        told = " ".join(str(error).split())[:160]
        return Device("cpu", f"the CUDA card does not compute: {told}", failed=True)
    return Device("cuda", torch.cuda.get_device_name())


def native_dtype(device: torch.device | str) -> torch.dtype:
    """The narrowest dtype a device multiplies in hardware: what to compute in when nobody says.

    A CPU: bfloat16 with AVX512_BF16, AMX or Arm's BF16, else float32; never float16, whose
    convolutions are emulated. CUDA: bfloat16 from compute capability 8.0 on (older ones emulate
    it), else float16. MPS: float16, as bfloat16 needs macOS 14.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32
    if kind == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16
    return torch.float16 if kind == "mps" else torch.float32


def why_native(device: torch.device | str) -> str:
    """Why `native_dtype` is what it is, for people."""
    kind = torch.device(device).type
    if kind == "cpu":
        if native_dtype(device) is torch.bfloat16:
            return "the processor multiplies bfloat16 (AVX512_BF16, AMX or Arm's BF16)"
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return "this torch has no oneDNN, which bfloat16 takes on a CPU"
        return "the processor does not multiply bfloat16 (no AVX512_BF16, AMX or Arm's BF16)"
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        than = "from 8.0 on bfloat16 is native" if major >= 8 else "below 8.0 bfloat16 is emulated"
        return f"compute capability {major}.{minor}; {than}"
    return "bfloat16 needs macOS 14" if kind == "mps" else "no narrower dtype is known to be native"


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 as float32 for a while; serves as a decorator too.

    Left alone, cuDNN rounds the inputs of float32 convolutions to 10 bits (TF32): a noise floor
    would be measured against that, and a picture would change with the shape of its strips.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _cpu_multiplies_bf16() -> bool:
    """Whether the processor has the instructions and torch the library that uses them.

    That is oneDNN; without it torch's bfloat16 is loops in float32. `get_capabilities` is new in
    torch 2.13 (torch/cpu/__init__.py); until then the question had no public name.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in _BF16_INSTRUCTIONS)
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return asked is not None and bool(asked())
