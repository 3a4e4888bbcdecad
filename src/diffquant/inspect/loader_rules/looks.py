"""Questions that the rules of several programs ask of a file: each returns what it found, or None.

Which formats a program reads, and where packed weights may sit, is asked of convert/targets.py:
what `quantize --target NAME` writes and what is said of a file here rest on the same table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from diffquant.convert.match import PartMatch
from diffquant.convert.targets import TARGETS, mixed_bnb
from diffquant.core.errors import shorten
from diffquant.inspect.loader_rules.case import Case

__all__ = [
    "all_in_one",
    "bare_names",
    "extension_denies",
    "fact_differs",
    "foreign_names",
    "keys_like",
    "lacks_parts",
    "misplaced",
    "mixes_bnb",
    "named",
    "odd_unet_width",
    "only_variants",
    "packed_as",
    "reshaped",
    "short_pad_tokens",
    "unread_formats",
]

Look = Callable[[Case], str | None]

_PAD_TOKEN = re.compile(r"(^|\.)(x|cap)_pad_token$")
_CONTAINER_OF = {"folder": "folder", "component": "folder", "gguf": "gguf"}


def named(keys: Iterable[str], what: str = "tensors") -> str | None:
    """'3 tensors (a and 2 more)', None for no key."""
    keys = list(keys)
    return f"{len(keys)} {what} ({shorten(keys, 1)})" if keys else None


def unread_formats(target: str, *, besides: Iterable[str] = ()) -> Look:
    """Formats that the target's row does not read, but for those in `besides`."""
    passed = frozenset(besides)

    def look(case: Case) -> str | None:
        container = _CONTAINER_OF.get(case.container, "safetensors")
        if container not in TARGETS[target].reads:
            return None
        unread = TARGETS[target].unread(container, case.stored)
        found = [
            f"{len(keys)} tensors as {name} ({shorten(keys, 1)})"
            for name, keys in unread.items()
            if name not in passed
        ]
        return "; ".join(found) or None

    return look


def misplaced(target: str) -> Look:
    """Packed or BF16 tensors of a GGUF file where the target does not unpack."""
    row = TARGETS[target]
    return lambda case: named(
        row.misplaced(case.stored), f"packed or BF16 tensors that are not {row.place}"
    )


def mixes_bnb(case: Case) -> str | None:
    """Several of bitsandbytes' formats in one component."""
    return "; ".join(mixed_bnb(case.stored)) or None


def reshaped(case: Case) -> str | None:
    """Tensors stored as rows that are not their own."""
    return named(case.reshaped, "tensors with comfy.gguf.orig_shape")


def lacks_parts(case: Case) -> str | None:
    """Parts of the model that the file does not have."""
    return f"no {', no '.join(case.lacking)}" if case.lacking else None


# Widths that programs have in tables: first block, and text context where it is told apart.
_WIDTHS: Mapping[str, tuple[int, int]] = {
    "sd15": (320, 768),
    "sd2": (320, 1024),
    "sdxl": (320, 2048),
    "sdxl_refiner": (384, 1280),
    "kolors": (320, 2048),
}


def odd_unet_width(case: Case) -> str | None:
    """A UNet of other widths than its family's published models."""
    part = case.denoiser
    if part is None or case.architecture not in _WIDTHS:
        return None
    first, context = (_fact(part, name) for name in ("block_out_channels", "cross_attention_dim"))
    first = first[0] if isinstance(first, tuple | list) and first else first
    found = (first, context)
    return None if found == _WIDTHS[case.architecture] else f"widths {first} and {context}"


def _fact(part: PartMatch, name: str) -> object:
    return part.hyper[name].value if name in part.hyper else None


def fact_differs(name: str, expected: int) -> Look:
    """A number of the denoiser's configuration that is not the published models'."""

    def look(case: Case) -> str | None:
        found = _fact(case.denoiser, name) if case.denoiser else expected
        return None if found == expected else f"{name} {found}"

    return look


def foreign_names(case: Case) -> str | None:
    """Diffusers' names where the makers' are others."""
    return "Diffusers' names" if case.diffusers_names else None


def bare_names(case: Case) -> str | None:
    """A denoiser in its makers' names without `model.diffusion_model.`."""
    part = case.denoiser
    if part is None or part.layout == "diffusers" or part.prefix == "model.diffusion_model.":
        return None
    return "keys without model.diffusion_model."


def all_in_one(case: Case) -> str | None:
    """Other parts beside the denoiser."""
    match = case.subject.match
    others = [part.name for part in match.parts if part.name != "denoiser"] if match else []
    return ", ".join(others) if others and case.denoiser is not None else None


def short_pad_tokens(case: Case) -> str | None:
    """Z-Image's pad tokens without their leading dimension of 1."""
    return named(
        key for key, one in case.tensors.items() if _PAD_TOKEN.search(key) and len(one.shape) == 1
    )


def packed_as(*dialects: str) -> Look:
    """Packed weights in these dialects."""
    return lambda case: named(case.packed(*dialects), "weights")


def keys_like(pattern: str, what: str) -> Look:
    """Physical keys that match a pattern."""
    compiled = re.compile(pattern)
    return lambda case: named(
        (key for key in case.subject.source.specs if compiled.search(key)), what
    )


def only_variants(*names: str) -> Look:
    """One of these members of the family."""
    return lambda case: case.variant if case.variant in names else None


def extension_denies(case: Case) -> str | None:
    """A name that says another container than the content."""
    suffix = Path(case.subject.path).suffix.lower()
    says = {".safetensors": "safetensors", ".sft": "safetensors", ".gguf": "gguf"}
    of_pickles = (".ckpt", ".pt", ".pth", ".bin")
    said = says.get(suffix, "pickle" if suffix in of_pickles else "")
    is_file = case.container in ("safetensors", "gguf", "pickle")
    if not is_file or not suffix or said == case.container:
        return None
    return f"a {case.container} file that is called {suffix}"
