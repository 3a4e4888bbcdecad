"""What stands for packages that are large and missing where commands run; each is told.

    scikit-image   50 MB with SciPy: SSIM is computed here
    numba          100 MB with LLVM: encoders and decoders of the CPU are their specifications in
                   quant/codecs, which give the same bytes, slower

Nothing else of a command is replaced.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import numpy as np


def ssim_of(
    one: Any, other: Any, *, channel_axis: int = 2, data_range: float = 1.0, size: int = 7
) -> float:
    """Structural similarity as scikit-image has it: (H, W, C), windows of 7 x 7, mean of channels.

    Source: scikit-image@v0.26.0:src/skimage/metrics/_structural_similarity.py, its defaults.
    """
    assert channel_axis == 2
    x, y = (np.asarray(picture, np.float64) for picture in (one, other))

    def mean(values: Any) -> Any:
        windows = np.lib.stride_tricks.sliding_window_view(values, (size, size), (0, 1))
        return windows.mean((-1, -2))

    sample = size**2 / (size**2 - 1)
    ux, uy = mean(x), mean(y)
    vx, vy = sample * (mean(x * x) - ux * ux), sample * (mean(y * y) - uy * uy)
    vxy = sample * (mean(x * y) - ux * uy)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    top = (2 * ux * uy + c1) * (2 * vxy + c2)
    return float((top / ((ux**2 + uy**2 + c1) * (vx + vy + c2))).mean())


def error_sums(reference: Any, decoded: Any) -> tuple[float, float, float]:
    """Sums of squares as codecs/numba/error_sums.py has them, added in another order."""
    x, y = (np.asarray(one, np.float64) for one in (reference, decoded))
    noise = x - y
    return float(x @ x), float(y @ y), float(noise @ noise)


def plain_codecs() -> None:
    """Let the CPU encode and decode by the specifications."""
    from diffquant.quant.backends import BACKENDS

    for codec, operation, device in tuple(BACKENDS):
        if device == "cpu":
            BACKENDS[codec, operation, device] = BACKENDS[codec, operation, "reference"]
    name = "diffquant.quant.codecs.numba"
    module = types.ModuleType(f"{name}.error_sums")
    module.error_sums = error_sums  # type: ignore[attr-defined]
    sys.modules |= {name: types.ModuleType(name), f"{name}.error_sums": module}


def plain_ssim() -> None:
    """Let SSIM be that of this file."""
    whole, metrics = types.ModuleType("skimage"), types.ModuleType("skimage.metrics")
    metrics.structural_similarity = ssim_of  # type: ignore[attr-defined]
    whole.metrics = metrics  # type: ignore[attr-defined]
    sys.modules |= {"skimage": whole, "skimage.metrics": metrics}


def prepare() -> list[str]:
    """Import what every command imports, and say what stands for what is missing.

    Nothing may ask for a card here: a process that has a context cannot be forked.
    """
    import torch  # noqa: F401

    import diffquant.cli  # noqa: F401

    told = []
    if importlib.util.find_spec("skimage") is None:
        plain_ssim()
        told.append("scikit-image is not installed: SSIM is that of benchmarks/stand_ins.py")
    if importlib.util.find_spec("numba") is None:
        plain_codecs()
        told.append("numba is not installed: the CPU encodes by the specifications, slower")
    return told
