"""What each kind of adapter does to the weight of its module: a table of functions.

    kind       W' at strength s                            rows of W' need
    lora       W + s D       D = scale up [mid] down       those rows of W
    loha       W + s D       D = scale (a1 b1) * (a2 b2)   those rows
    lokr       W + s D       D = scale kron(w1, w2)        those rows
    ... + DoRA W + s (m (W + D) / |W + D| - W)             those rows; all where m is of columns
    glora      W + s scale (W a1 a2 + b1 b2)               those rows
    oft        W + s (R W - W), R of blocks                all rows; PEFT turns columns: those rows
    boft       R_m(s) ... R_1(s) W                         all rows; PEFT turns columns: those rows
    ia3        W (1 + s v), PEFT W (1 + s (v - 1))         those rows
    full       W + s diff, or W replaced                   those rows
    norm       w + s w_norm                                those rows
    embedding  W + s scale (B A)^T                         those rows

Weights arrive as float32 (R, K), rows of the module in its own order, kernels flat. Factors are
read from their file when they are needed, so that a plan holds none of them.

Sources: lycoris-lora 4.1.3 (package), modules/*.py get_merged_weight and functional/*.py; peft
0.21.2 (package), tuners/{lora,loha,lokr,oft,boft,ia3}/layer.py, merge. lycoris 4.1.3's
get_diff_weight of LoHa and LoKr multiplies by the scale twice; its forward, and this, do so once.
DoRA at strengths other than 1 is blended as Comfy-Org/ComfyUI@839df9f:comfy/weight_adapter/base.py
(weight_decompose) does: lycoris blends the magnitude alone and keeps D whole, even at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.adapters import ROWS, WHOLE
from diffquant.convert.lora.deltas.additive import hadamard, kronecker, low_rank, table
from diffquant.convert.lora.deltas.magnitude import decomposed, is_by_columns
from diffquant.convert.lora.deltas.parts import Parts, Rows
from diffquant.convert.lora.deltas.replacing import (
    bias_change,
    generalized,
    has_bias_change,
    replaced,
    scaled,
    shifted_norm,
)
from diffquant.convert.lora.deltas.rotations import butterfly, rotated
from diffquant.convert.lora.group import Adapter

__all__ = [
    "Parts",
    "bias_change",
    "has_bias_change",
    "has_weight_change",
    "reach_of",
    "refusal",
    "weight_change",
]

Floats: TypeAlias = NDArray[np.float32]

_ADDITIVE: Mapping[str, Callable[[Parts, Rows], Floats]] = {
    "lora": low_rank,
    "loha": hadamard,
    "lokr": kronecker,
    "embedding": table,
}
_OTHERS: Mapping[str, Callable[[Parts, Floats, Rows, float], Floats]] = {
    "glora": generalized,
    "oft": rotated,
    "boft": butterfly,
    "ia3": scaled,
    "full": replaced,
    "norm": shifted_norm,
}


def weight_change(parts: Parts, weight: Floats, rows: Rows, strength: float) -> Floats:
    """What is added to rows of a module's weight.

    Args:
        parts: of the adapter.
        weight: (R, K), rows `rows[0]` to `rows[1]` of the module; not modified.
        rows: half open; all of the module where its reach is WHOLE.
        strength: what the user multiplies the adapter by.

    Returns:
        (R, K) float32.

    Raises:
        MalformedFile: NaN or infinity in the parts.
    """
    additive = _ADDITIVE.get(parts.adapter.kind)
    if additive is None:
        return _OTHERS[parts.adapter.kind](parts, weight, rows, strength)
    delta = additive(parts, rows)
    if "dora" in parts.adapter.traits:
        return np.float32(strength) * (decomposed(parts, weight + delta, rows) - weight)
    delta *= np.float32(strength)
    return delta


def reach_of(adapter: Adapter) -> str:
    """ROWS where any rows can be changed by themselves, else WHOLE."""
    if adapter.kind in ("oft", "boft") and "oft_blocks" in adapter.parts:
        return WHOLE
    return WHOLE if "dora" in adapter.traits and is_by_columns(adapter) else ROWS


def has_weight_change(adapter: Adapter) -> bool:
    """Whether the weight itself is changed, and not the bias alone."""
    return adapter.parts.keys() != {"diff_b"} and adapter.parts.keys() != {"b_norm"}


def refusal(adapter: Adapter) -> str:
    """Why an adapter cannot be merged; empty where it can."""
    if adapter.kind == "tlora":
        return (
            "T-LoRA changes with the step and is measured from a decomposition of the base that "
            "the file does not hold"
        )
    if adapter.kind == "oft" and len(adapter.shapes.get("oft_r", ())) > 2:
        return (
            "OFT in square blocks, as PEFT before 0.16 wrote it, is read by nobody any more: merge "
            "it with PEFT 0.15.2 and take `lora extract` of the result"
        )
    if adapter.naming == "counted":
        return "numbered layers (cloneofsimo) whose names the shapes do not tell"
    return ""
