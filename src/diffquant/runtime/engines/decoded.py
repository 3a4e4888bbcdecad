"""Give a module of another program the numbers of a file it cannot read: decoded by diffquant.

One tensor at a time, under Diffusers' names, cast to what the module computes in. A key the module
lacks, or one left without a value, is an error: nothing is filled in silently.
"""

from __future__ import annotations

import torch
from torch import nn

from diffquant.convert.canonical_rows import canonical_rows
from diffquant.convert.detect import PartMatch, to_diffusers
from diffquant.convert.logical import LogicalSource
from diffquant.core.errors import MissingKeys, UnmappedKeys, UnsupportedShape, shorten
from diffquant.quant.formats import matrix_shape

__all__ = ["fill"]

# transformers 5 says `layers.0` where published files say `text_model.layers.0`.
_SPELLINGS = ("", "text_model.", "model.", "model.language_model.", "language_model.")


def fill(module: nn.Module, logical: LogicalSource, part: PartMatch) -> int:
    """Write a part's decoded weights into `module`; returns how many tensors were written.

    Raises:
        UnmappedKeys, MissingKeys: names differ; every offender is carried.
        UnsupportedShape: a tensor has another shape there.
    """
    state = module.state_dict()
    left = {key for key in state if not key.endswith("position_ids")}
    tied = {key for key in left if key.endswith(("lm_head.weight", "encoder.embed_tokens.weight"))}
    unknown = []
    written = 0
    with torch.no_grad():
        for one in to_diffusers(part):
            key = _spelled(one.target, left)
            if key is None:
                unknown.append(one.target)
                continue
            rows, columns = matrix_shape(one.shape)
            found = torch.from_numpy(canonical_rows(logical, one, (0, rows)))
            target = state[key]
            if target.numel() != rows * columns:
                raise UnsupportedShape(
                    f"{part.name}: {key}: expected {tuple(target.shape)}, found {one.shape}"
                )
            target.copy_(found.reshape(target.shape))
            left.discard(key)
            written += 1
    if unknown:
        raise UnmappedKeys(
            f"{part.name}: {type(module).__name__} has no {shorten(unknown)}", keys=tuple(unknown)
        )
    if missing := sorted(left - tied):
        raise MissingKeys(f"{part.name}: the file has no {shorten(missing)}", keys=tuple(missing))
    return written


def _spelled(target: str, keys: set[str]) -> str | None:
    for spelling in _SPELLINGS:
        if spelling + target in keys:
            return spelling + target
        if spelling and target.startswith(spelling) and target.removeprefix(spelling) in keys:
            return target.removeprefix(spelling)
    return None
