"""Where noise comes from: one stream per picture, so that a picture does not depend on its batch.

`cpu` is torch's CPU generator, as diffusers and ComfyUI use it. `philox` is what torch.randn draws
on an NVIDIA GPU, which A1111 and stable-diffusion.cpp draw by default, computed here on any device:
Philox4x32-10 counts through the elements of a draw, its first two words become one normal number
by Box and Muller.
Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, and the vectors of
DEShawResearch/random123 tests/kat_vectors; pytorch aten/src/ATen/native/cuda/
DistributionTemplates.h (element i is thread i, a draw advances the counter by one) and CUDA's
curand_normal.h (_curand_box_muller). A GPU draws with at most 2048 threads per multiprocessor (270
thousand on an H100); a larger tensor has other values from there on, which differ between GPUs:
here, as in A1111, they go on counting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["STREAMS", "NoiseSource", "philox4x32"]

Stream: TypeAlias = Callable[[tuple[int, ...]], Tensor]
_Words: TypeAlias = npt.NDArray[np.uint32]

_ROUNDS = 10
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_INVERSE = float(np.float32(2.3283064e-10))  # CURAND_2POW32_INV
_INVERSE_2PI = float(np.float32(2.3283064e-10 * 2 * math.pi))  # CURAND_2POW32_INV_2PI


def philox4x32(counter: Sequence[_Words], key: tuple[int, int]) -> tuple[_Words, ...]:
    """Encrypt counters: ten rounds of Philox4x32.

    Args:
        counter: four arrays (n,) of 32-bit words.
        key: two 32-bit words.

    Returns:
        Four arrays (n,) of 32-bit words.
    """
    a, b, c, d = (words.astype(np.uint32) for words in counter)
    k, l = key  # noqa: E741 (the paper's letters)
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]  # uint64: no word is lost
        a, b, c, d = (
            (second >> np.uint64(32)).astype(np.uint32) ^ b ^ np.uint32(k),
            second.astype(np.uint32),
            (first >> np.uint64(32)).astype(np.uint32) ^ d ^ np.uint32(l),
            first.astype(np.uint32),
        )
        k, l = (k + _WEYL[0]) & _WORD, (l + _WEYL[1]) & _WORD  # noqa: E741
    return a, b, c, d


def _philox(seed: int) -> Stream:
    """Draw what torch.randn draws on CUDA after manual_seed(seed), call by call."""
    key = (seed & _WORD, seed >> 32)
    calls = 0

    def draw(shape: tuple[int, ...]) -> Tensor:
        nonlocal calls
        count = math.prod(shape)
        zeros = np.zeros(count, np.uint32)
        drawn = np.full(count, calls, np.uint32)
        words = philox4x32((drawn, zeros, np.arange(count, dtype=np.uint32), zeros), key)
        calls += 1
        radius = np.sqrt(-2 * np.log(words[0] * _INVERSE + _INVERSE / 2))
        normal = radius * np.sin(words[1] * _INVERSE_2PI + _INVERSE_2PI / 2)
        return torch.from_numpy(normal.astype(np.float32).reshape(shape))

    return draw


def _cpu(seed: int) -> Stream:
    """Draw what diffusers draws with torch.Generator("cpu").manual_seed(seed)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


STREAMS: Mapping[str, Callable[[int], Stream]] = {"cpu": _cpu, "philox": _philox}


class NoiseSource:
    """Standard normal noise for a batch, each picture from its own stream, in call order."""

    def __init__(self, seeds: Sequence[int], rng: str = "cpu") -> None:
        """Start the streams; `rng` is a key of STREAMS."""
        self._seeds, self._rng = tuple(seeds), rng
        self.restart()

    def restart(self) -> None:
        """Begin again, as if nothing had been drawn."""
        self._streams = [STREAMS[self._rng](seed) for seed in self._seeds]

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Draw (B, ...) float32 on the CPU, B being the number of seeds."""
        assert shape[0] == len(self._streams), "one row per picture"
        return torch.cat([stream((1, *shape[1:])) for stream in self._streams])
