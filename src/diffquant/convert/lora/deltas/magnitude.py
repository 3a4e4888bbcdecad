"""DoRA: the sum of weight and delta keeps its direction and gets a length that was learnt.

lycoris has a magnitude for each row (N, 1) or, with wd_on_output off, for each input (1, K), and
keeps kernels' axes; PEFT's is of rows always, written (N,) or, for kernels, (1, N, 1, 1).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.lora.deltas.parts import Parts, Rows
from diffquant.convert.lora.group import Adapter

__all__ = ["decomposed", "is_by_columns"]

# lycoris adds it to the length (functional/general.py, _weight_decompose): rows may be zero.
_EPSILON = np.finfo(np.float32).eps


def is_by_columns(adapter: Adapter) -> bool:
    """Whether the magnitude is of inputs.

    As ComfyUI tells them: Comfy-Org/ComfyUI@839df9f:comfy/weight_adapter/base.py, weight_decompose.
    """
    if "lora_magnitude_vector" in adapter.parts["magnitude"]:
        return False
    shape = adapter.shapes["magnitude"]
    return len(shape) > 1 and shape[0] == 1 and math.prod(shape) > 1 and adapter.shape[0] != 1


def decomposed(parts: Parts, merged: NDArray[np.float32], rows: Rows) -> NDArray[np.float32]:
    """Give rows of W + D their magnitude; all rows are needed where it is of columns."""
    magnitude = parts.read("magnitude").reshape(-1)
    if not is_by_columns(parts.adapter):
        length = np.linalg.norm(merged, axis=1) + _EPSILON
        found: NDArray[np.float32] = merged * (magnitude[slice(*rows)] / length)[:, None]
        return found
    kernel = merged.reshape(len(merged), magnitude.size, -1)
    length = np.sqrt(np.einsum("nik,nik->i", kernel, kernel, optimize=True)) + _EPSILON
    found = kernel * (magnitude / length)[None, :, None]
    return found.reshape(merged.shape)
