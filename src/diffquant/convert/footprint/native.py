"""native_size(): the picture a model is made for."""

from __future__ import annotations

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.match import Match

__all__ = ["LARGEST_SIDE", "native_size"]

LARGEST_SIDE = 1 << 16  # pixels
_USUAL_SIDE = 1024


def native_size(match: Match | None) -> tuple[int, int]:
    """Width and height in pixels: what its configs state, else the architecture's own."""
    row = ARCHITECTURES.get(match.architecture) if match else None
    if match is None or row is None:
        return _USUAL_SIDE, _USUAL_SIDE
    for name, factor in (("denoiser", row.latent.downscale), ("vae", 1)):
        part = match.part(name)
        stated = part.hyper.get("sample_size") if part is not None else None
        if stated is None or stated.origin not in ("config.json", "diffquant.config"):
            continue
        if isinstance(stated.value, int) and 0 < stated.value * factor <= LARGEST_SIDE:
            return stated.value * factor, stated.value * factor
    native = row.sampling_for(match.variant)
    return native.width, native.height
