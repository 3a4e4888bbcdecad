"""LIBRARIES: what is installed, and what a missing one would add; none is imported for that."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

__all__ = ["LIBRARIES", "Installed", "Library", "installed"]


@dataclass(frozen=True, slots=True)
class Library:
    """One row of LIBRARIES.

    Attributes:
        name: of the distribution, as pip knows it.
        adds: what diffquant does with it.
        install: what to type.
        systems: platform.system() values it is made for; empty: all.
    """

    name: str
    adds: str
    install: str
    systems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Installed:
    """A library on this machine.

    Attributes:
        version: "" where it is not installed.
        error: why it does not load, "" where it does or nobody tried.
    """

    name: str
    version: str
    adds: str
    install: str
    error: str = ""


_OWN = "pip install --upgrade diffquant"
LIBRARIES: tuple[Library, ...] = (
    Library("torch", "generating, verifying, calibrating", _OWN),
    Library("numba", "fast encoders and decoders on the CPU", _OWN),
    Library("triton", "fast decoders on an NVIDIA GPU", "pip install triton", ("Linux",)),
    Library("tokenizers", "prompts", _OWN),
    Library("gguf", "tables of the IQ formats", _OWN),
    Library("huggingface-hub", "files of the Hugging Face Hub", _OWN),
    Library("pillow", "pictures", _OWN),
    Library("psutil", "free memory, checked before work starts", _OWN),
    Library(
        "diffusers",
        "--engine diffusers: pictures of families without a bundled model",
        "pip install 'diffquant[diffusers]'",
    ),
    Library(
        "transformers",
        "text encoders of --engine diffusers",
        "pip install 'diffquant[diffusers]'",
    ),
    Library(
        "bitsandbytes",
        "nf4 and int8 folders in --engine diffusers on a GPU; not needed by the bundled runtime",
        _OWN,
    ),
    Library(
        "cyllama",
        "--engine sdcpp: files proved in stable-diffusion.cpp",
        "pip install 'diffquant[clients]'",
    ),
)


def installed() -> tuple[Installed, ...]:
    """Every row that this system can have, with its version."""
    return tuple(
        Installed(row.name, _version(row.name), row.adds, row.install)
        for row in LIBRARIES
        if not row.systems or platform.system() in row.systems
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
