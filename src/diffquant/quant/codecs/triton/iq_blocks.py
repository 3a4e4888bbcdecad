"""Encoders of IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S; layouts as in their codecs.

What kernels found (iq_search.py) is packed by torch: integers, and a few exact operations on a
scale for each sub-block. A division by a number of the host would multiply by its inverse on a
card, so divisors are tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from diffquant.core.errors import ImportanceRequired
from diffquant.quant.codecs.iq_search import RULES, SUPER_BLOCK
from diffquant.quant.codecs.triton.iq_search import Found, search

__all__ = ["iq2_s", "iq2_xs", "iq2_xxs", "iq3_s", "iq3_xxs"]


def _scale_levels(found: Found, fudge: float) -> tuple[Tensor, Tensor, Tensor]:
    """codecs/iq_search.scale_levels: bytes of d (B, 2), levels (B, sub-blocks); and found.used."""
    scale = found.scale
    most = scale.amax(dim=1, keepdim=True)
    used = most > 0
    step = most / torch.full_like(most, 31)
    value = (torch.ones_like(step) / step * scale - 1) * 0.5
    value = torch.where(value == value, value, 0)  # as in numbers.nearest_int
    nearest = ((value + 12582912.0).view(torch.int32) & 0x7FFFFF) - 0x400000
    levels = torch.where(used, nearest.clamp(0, 15), 0)
    d = torch.where(used, step * torch.full_like(step, fudge), 0).to(torch.float16)
    return _nbytes(d.view(torch.int16), 2), levels, used


def _combined(fields: Tensor, width: int) -> Tensor:
    """(..., n) fields of `width` bits -> (...) int64, the first the lowest."""
    shifts = torch.arange(0, width * fields.shape[-1], width, device=fields.device)
    return (fields.to(torch.int64) << shifts).sum(dim=-1)


def _nbytes(words: Tensor, count: int) -> Tensor:
    """(B, n) integers -> (B, count n) uint8, the lowest byte first."""
    shifts = torch.arange(0, 8 * count, 8, device=words.device)
    return (words[..., None] >> shifts & 255).to(torch.uint8).flatten(1)


def _nibbles(levels: Tensor) -> Tensor:
    return _nbytes(_combined(levels.unflatten(1, (-1, 2)), 4), 1)


def _sign_words(found: Found, levels: Tensor) -> Tensor:
    """Seven signs of each eight weights, a level on top: (B, 8) of 32 bits."""
    return _combined(found.signs & 127, 7) | levels.to(torch.int64) << 28


def _iq2_xxs(found: Found, levels: Tensor, used: Tensor) -> tuple[Tensor, ...]:
    words = _nbytes(_sign_words(found, levels), 4).unflatten(1, (8, 4))
    both = torch.cat([found.point.to(torch.uint8), words], dim=2).flatten(1)
    return (torch.where(used, both, 0),)


def _iq2_xs(found: Found, levels: Tensor, used: Tensor) -> tuple[Tensor, ...]:
    words = found.point.to(torch.int64) | (found.signs & 127).to(torch.int64) << 9
    return torch.where(used, _nbytes(words.flatten(1), 2), 0), _nibbles(levels)


def _iq2_s(found: Found, levels: Tensor, used: Tensor) -> tuple[Tensor, ...]:
    del used  # points and signs are kept, as by ggml
    point = found.point.to(torch.int64).reshape(-1, 8, 4)
    upper = _nbytes(_combined(point >> 8, 2), 1)
    low = (point & 255).to(torch.uint8).flatten(1)
    return low, found.signs.flatten(1), upper, _nibbles(levels)


def _iq3_xxs(found: Found, levels: Tensor, used: Tensor) -> tuple[Tensor, ...]:
    words = _nbytes(_sign_words(found, levels), 4)
    both = torch.cat([found.point.to(torch.uint8).flatten(1), words], dim=1)
    return (torch.where(used, both, 0),)


def _iq3_s(found: Found, levels: Tensor, used: Tensor) -> tuple[Tensor, ...]:
    del used
    ninth = _nbytes(_combined(found.point > 255, 1), 1)
    # Indices and signs of empty sub-blocks go last, as in codecs/iq3_s.py.
    order = found.empty.to(torch.uint8).argsort(dim=1, stable=True)[:, :, None]
    low = (found.point & 255).to(torch.uint8).take_along_dim(order, dim=1)
    signs = found.signs.take_along_dim(order, dim=1)
    return low.flatten(1), ninth, signs.flatten(1), _nibbles(levels)


def _encode(
    name: str,
    pack: Callable[[Found, Tensor, Tensor], tuple[Tensor, ...]],
    weight: Tensor,
    stats: None = None,
    *,
    fmt: str,
    importance: Tensor | None = None,
) -> dict[str, Tensor]:
    """Encode (R, K) rows, K a multiple of 256; see quant/backends.py.

    Raises:
        ImportanceRequired: the format has no mode without importance.
    """
    del stats
    rule = RULES[name]
    if importance is None and rule.plain is None:
        raise ImportanceRequired(f"{fmt} cannot be encoded without an importance matrix")
    found = search(name, weight, importance)
    d, levels, used = _scale_levels(found, rule.fudge)
    packed = torch.cat([d, *pack(found, levels, used)], dim=1)
    rows, width = weight.shape
    return {"weight": packed.reshape(rows, width // SUPER_BLOCK * packed.shape[1])}


iq2_xxs = functools.partial(_encode, "iq2_xxs", _iq2_xxs)
iq2_xs = functools.partial(_encode, "iq2_xs", _iq2_xs)
iq2_s = functools.partial(_encode, "iq2_s", _iq2_s)
iq3_xxs = functools.partial(_encode, "iq3_xxs", _iq3_xxs)
iq3_s = functools.partial(_encode, "iq3_s", _iq3_s)
