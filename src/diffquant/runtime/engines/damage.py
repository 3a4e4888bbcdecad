"""The control that must fail, in modules of other programs: rows of one block shuffled.

As control.py does it for packed layers; scales of foreign formats are out of reach, rows are not,
whether they are numbers or packed bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diffquant.runtime.control import repeated_blocks

__all__ = ["shuffled_rows"]


def _matrices(block: nn.Module) -> list[Tensor]:
    """Weights with rows to shuffle: a row for each output."""
    return [one.data for one in block.parameters() if one.ndim >= 2 and one.shape[0] > 1]


@contextlib.contextmanager
def shuffled_rows(denoiser: nn.Module, *, seed: int = 0) -> Iterator[str | None]:
    """Shuffle the rows of the block with the most weights; yields what was done.

    None where no block has rows: flat packed weights, whose damage would not be the same thing.
    """
    found = [(name, _matrices(block)) for name, block in repeated_blocks(denoiser)]
    found = [(name, weights) for name, weights in found if weights]
    if not found:
        yield None
        return
    name, weights = max(found, key=lambda row: sum(one.numel() for one in row[1]))
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for weight in weights:
        order = torch.randperm(len(weight), generator=generator).to(weight.device)
        kept.append((weight, order))
        weight.copy_(weight[order])
    try:
        yield f"rows of {name} shuffled"
    finally:
        for weight, order in kept:
            weight.copy_(weight[torch.argsort(order)])
