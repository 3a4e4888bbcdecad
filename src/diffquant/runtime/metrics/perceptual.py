"""FLIP and SSIMULACRA2: perceptual metrics that need no weights.

- FLIP: NVIDIA's `flip-evaluator`, LDR, sRGB, 67 pixels per degree; mean of its error map, 0 to 1.
- SSIMULACRA2: `ssimulacra2`, which reads 8-bit pictures: both are rounded first, so a difference
  under half a step is none. 100 is identical, 90 visually lossless, below 0 broken. It looks at six
  scales, each at least 8 pixels wide. Under 225 pixels there are fewer, and its weights, which
  count on six, fall on other maps: numbers of such pictures compare with each other, not with those
  of larger ones.

Sources: NVlabs/flip 1.7 flip_python_api.py; ssimulacra2 0.3.0 (after cloudinary/ssimulacra2).
"""

from __future__ import annotations

import importlib.util
import io

import numpy as np
from numpy.typing import NDArray

from diffquant.runtime.metrics import Judge, MetricNeeds, Missing

__all__ = ["open_flip", "open_ssimulacra2"]

Picture = NDArray[np.float32]
_LEAST = 8  # pixels along a side, of ssimulacra2's coarsest scale


def open_flip(_needs: MetricNeeds) -> Judge | Missing:
    """Mean FLIP error, 0 for identical pictures."""
    if importlib.util.find_spec("flip_evaluator") is None:
        return Missing(
            "flip-evaluator is not installed: pip install flip-evaluator (it is compiled where it "
            "has no wheel, as for Python 3.14 and for Linux on ARM)"
        )
    from flip_evaluator import evaluate

    def judge(reference: Picture, candidate: Picture, _prompt: str) -> float | None:
        ready = [np.ascontiguousarray(one, dtype=np.float32) for one in (reference, candidate)]
        _, mean, _ = evaluate(*ready, "LDR", inputsRGB=True, applyMagma=False)
        return float(mean)

    return judge


def open_ssimulacra2(needs: MetricNeeds) -> Judge | Missing:
    """SSIMULACRA2, 100 for pictures that are identical in 8 bits."""
    if min(needs.size) < _LEAST:
        width, height = needs.size
        return Missing(f"pictures are {width}x{height}, SSIMULACRA2 takes 8x8 or more")
    from ssimulacra2 import compute_ssimulacra2

    def judge(reference: Picture, candidate: Picture, _prompt: str) -> float | None:
        return float(compute_ssimulacra2(_file(reference), _file(candidate)))

    return judge


def _file(picture: Picture) -> io.BytesIO:
    """A picture as the 8-bit file that the program opens."""
    from PIL import Image

    made = io.BytesIO()
    levels = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(levels).save(made, "BMP")
    made.seek(0)
    return made
