"""Adapters that are not read, told by name with the reason: better than a file with no LoRA in it.

Some need what their file lacks: random projections that are drawn from a seed by the library that
trained them, or one bank for all layers. Others have parts beside LoRA's factors that change what
these mean. All can be merged by the library itself, and the result extracted as a LoRA.

Sources: peft 0.21.2 (package), mapping.py, PEFT_TYPE_TO_PREFIX_MAPPING; tuners/{vera,randlora,
fourierft,vblora,adalora}/layer.py, get_delta_weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from diffquant.core.errors import ArchitectureError
from diffquant.core.tensors import TensorSource

__all__ = ["refuse_strangers", "stranger_of"]

_SEED = "all layers share projections drawn at random from a seed"
_REMEDY = "merge it with PEFT (merge_and_unload) and take `lora extract` of the result"


@dataclass(frozen=True, slots=True)
class _Row:
    """A kind that is not read: a pattern of one segment of a key, its name, and why."""

    pattern: re.Pattern[str]
    title: str
    reason: str


_ROWS = tuple(
    _Row(re.compile(pattern), title, reason)
    for pattern, title, reason in (
        (r"p?vera_(lambda_\w+|[AB])", "VeRA", _SEED),
        (r"randlora_\w+", "RandLoRA", _SEED),
        (r"fourierft_\w+", "FourierFT", "the frequencies it has numbers for are drawn from a seed"),
        (r"waveft_\w+", "WaveFT", "the places it has numbers for are drawn from a seed"),
        (r"vblora_\w+", "VB-LoRA", "its vectors come from a bank that all layers share"),
        (r"lora_E", "AdaLoRA", "its factors are weighed by singular values beside them"),
        (
            r"(adamss|beft|bone|c3a|delora|frod|gralora|hira|hra|lily|miss|road|shira|unilora)_\w+",
            "an adapter of PEFT",
            "this kind is not read here",
        ),
    )
)
# Segments that begin like a factor of LoRA; any other means the factors are not all there is.
_LORA = re.compile(r"lora_(down|up|mid|A|B|embedding_[AB]|magnitude_vector|linear_layer)")
_LIKE = re.compile(r"lora_[A-Za-z]\w*")


def refuse_strangers(source: TensorSource) -> None:
    """Refuse a file with adapters that are not read.

    Raises:
        ArchitectureError: with the kind, the reason and a tensor's name.
    """
    if (found := stranger_of(source.specs)) is not None:
        raise ArchitectureError(f"{source.path} is {found}; {_REMEDY}")


def stranger_of(keys: Iterable[str]) -> str | None:
    """What kind that is not read these keys are of, and why; None where they are of none."""
    if found := _stranger(keys):
        key, title, reason = found
        return f"{title}: {reason} (tensor {key})"
    return None


def _stranger(keys: Iterable[str]) -> tuple[str, str, str] | None:
    for key in keys:
        for segment in key.split(".")[1:]:  # the first is a module's: lora_unet_...
            row = next((one for one in _ROWS if one.pattern.fullmatch(segment)), None)
            if row is not None:
                return key, row.title, row.reason
            if _LIKE.fullmatch(segment) and not _LORA.fullmatch(segment):
                return key, "LoRA with parts of its own", f"{segment} is not known here"
    return None
