"""The control that must fail: a candidate damaged on purpose, in one block.

A gate that passes a broken model proves nothing. So every image verification also runs the
candidate with one block's scales shuffled within each tensor, or its output rows where a tensor
has fewer than two scales (unpacked and single-scale formats), and demands that this falls below
the gate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels import rotated
from diffquant.runtime.layers import Home, PackedLayer, PackedWeight, Segment

__all__ = ["SCALE_BYTES", "damaged", "repeated_blocks", "shuffle"]

# Where a ggml block keeps what its numbers are multiplied with: (block bytes, first, one past
# last).
SCALE_BYTES: Mapping[str, tuple[int, int, int]] = {
    "q4_0": (18, 0, 2),
    "q4_1": (20, 0, 4),
    "q5_0": (22, 0, 2),
    "q5_1": (24, 0, 4),
    "q8_0": (34, 0, 2),
    "q2_k": (84, 0, 16),
    "q3_k": (110, 96, 110),
    "q4_k": (144, 0, 16),
    "q5_k": (176, 0, 16),
    "q6_k": (210, 192, 210),
    "iq4_nl": (18, 0, 2),
    "iq4_xs": (136, 0, 8),
    "mxfp4": (17, 0, 1),
    "iq3_s": (110, 0, 2),
    "iq3_xxs": (98, 0, 2),
    "iq2_s": (82, 0, 2),
    "iq2_xs": (74, 0, 2),
    "iq2_xxs": (66, 0, 2),
    "iq1_s": (50, 0, 2),
    "iq1_m": (56, 48, 56),
    "tq1_0": (54, 52, 54),
    "tq2_0": (66, 64, 66),
    "nvfp4": (36, 0, 4),
}
# Scales of 128 x 128 are too alike to do damage: rows are shuffled instead.
_SCALE_PARTS = {
    "int8_rowwise": "scale",
    "nf4": "absmax",
    "fp4": "absmax",
    "nf4_dq": "absmax",
    "fp4_dq": "absmax",
    "int8_bnb": "scb",
    **{name: "s_channel" if "w4a8" in name else "scale" for name in rotated.KERNELS},
    "fp8_e4m3_rowwise": "scale",
    "mxfp8": "block_scale",
    "nvfp4_comfy": "block_scale",
}


def shuffle(segment: Segment, generator: torch.Generator, *, rows: bool = False) -> Segment:
    """Return a segment with its scales, or its output rows, in another order.

    Args:
        segment: packed rows of a weight.
        generator: source of the permutation.
        rows: shuffle output rows even where there are scales.
    """
    parts = dict(segment.parts)
    if rows:
        return _shuffle_rows(segment, generator)
    if segment.format in SCALE_BYTES:
        size, start, stop = SCALE_BYTES[segment.format]
        blocks = parts["weight"].reshape(-1, size).clone()
        if len(blocks) > 1:
            blocks[:, start:stop] = blocks[_order(len(blocks), generator), start:stop]
            parts["weight"] = blocks.reshape(parts["weight"].shape)
            return Segment(segment.format, segment.shape, parts)
    name = _SCALE_PARTS.get(segment.format)
    if name is not None and parts[name].numel() > 1:
        stored = parts[name]
        scales = (stored.view(torch.uint8) if stored.element_size() == 1 else stored).reshape(-1)
        order = _order(len(scales), generator)
        parts[name] = scales[order].reshape(stored.shape).view(stored.dtype)
        return Segment(segment.format, segment.shape, parts)
    return _shuffle_rows(segment, generator)


def _shuffle_rows(segment: Segment, generator: torch.Generator) -> Segment:
    """Permute output rows; scales per row go with them, flat blocks are cut into as many pieces."""
    parts = dict(segment.parts)
    count = segment.shape[0] if segment.shape else 1
    if parts["weight"].ndim > 1:
        count = len(parts["weight"])  # padding counts: it is stored as rows
    if FORMATS[segment.format].flat_block and parts["weight"].numel() % max(count, 1):
        count = 1
    if count > 1:
        order = _order(count, generator)
        weight = parts["weight"]
        raw = weight.view(torch.uint8) if weight.element_size() == 1 else weight
        shuffled = raw.reshape(count, -1)[order].reshape(raw.shape)
        parts["weight"] = shuffled.view(weight.dtype)
    return Segment(segment.format, segment.shape, parts)


def _order(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)


def repeated_blocks(denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children of the denoiser's module lists: the units a network repeats."""
    return [
        (f"{name}.{index}", block)
        for name, stack in denoiser.named_children()
        if isinstance(stack, nn.ModuleList)
        for index, block in enumerate(stack)
    ]


@contextlib.contextmanager
def damaged(denoiser: nn.Module, *, seed: int = 0, rows: bool = False) -> Iterator[str]:
    """Shuffle the scales (or `rows`) of one block for the duration; yields the block's name.

    The block is the one with the most weights, the first of several: damage there cannot hide.
    """
    candidates = repeated_blocks(denoiser)
    name, block = (
        max(candidates, key=lambda row: _weights(row[1]))
        if candidates
        else (
            "denoiser",
            denoiser,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    kept: list[tuple[PackedLayer, PackedWeight, Home | None]] = []
    for layer in block.modules():
        if isinstance(layer, PackedLayer) and layer.packed is not None:
            whole = layer.bound()  # first of all: this may bring the weight, and end the home
            if layer.home is not None:
                whole = whole.copy()  # what is streamed will be written over
            kept.append((layer, layer.packed, layer.home))
            layer.packed = PackedWeight(
                tuple(shuffle(one, generator, rows=rows) for one in whole.segments)
            )
            layer.home = None  # the damaged weight is here to stay
    try:
        yield name
    finally:
        for layer, weight, home in kept:
            layer.packed, layer.home = weight, home


def _weights(block: nn.Module) -> int:
    return sum(
        torch.Size(layer.packed.shape).numel()
        for layer in block.modules()
        if isinstance(layer, PackedLayer) and layer.packed is not None
    )
