"""Kinds that multiply, replace or shift a weight, and what adapters do to biases."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.lora.deltas.additive import core_product
from diffquant.convert.lora.deltas.parts import Parts, Rows
from diffquant.convert.lora.group import Adapter

__all__ = [
    "bias_change",
    "generalized",
    "has_bias_change",
    "replaced",
    "scaled",
    "shifted_norm",
]

Floats: TypeAlias = NDArray[np.float32]


def generalized(parts: Parts, weight: Floats, rows: Rows, strength: float) -> Floats:
    """GLoRA: scale * (W a1 a2 + b1 b2), W a1 over the input channels of a kernel.

    The first releases wrote every factor transposed: W a2 a1 + b2 b1.
    """
    current = parts.shape("glora_a1")[1] == parts.shape("glora_a2")[0]
    first, second = "12" if current else "21"
    core = parts.read("glora_bm") if "glora_bm" in parts else None
    found = core_product(
        parts.matrix(f"glora_b{first}", rows), parts.matrix(f"glora_b{second}"), core
    )
    left, right = parts.matrix(f"glora_a{first}"), parts.matrix(f"glora_a{second}")
    kernel = weight.reshape(len(weight), len(left), -1)
    found += np.einsum("oik,ir,rj->ojk", kernel, left, right, optimize=True).reshape(weight.shape)
    found *= np.float32(parts.scale * strength)
    return found


def scaled(parts: Parts, weight: Floats, rows: Rows, strength: float) -> Floats:
    """IA3: lycoris multiplies by one and its numbers, PEFT by its numbers."""
    vector = _ia3(parts)
    if parts.shape("ia3") and _by_columns(parts):
        kernel = weight.reshape(len(weight), vector.size, -1)
        return (kernel * (vector * np.float32(strength))[None, :, None]).reshape(weight.shape)
    return weight * (vector[slice(*rows)] * np.float32(strength))[:, None]


def _ia3(parts: Parts) -> Floats:
    """What is added to a factor of one."""
    vector = parts.read("ia3").reshape(-1)
    return vector if "on_input" in parts else vector - np.float32(1)


def _by_columns(parts: Parts) -> bool:
    """Whether inputs are scaled: lycoris says so, PEFT writes (1, K) and not (N, 1)."""
    return parts.adapter.shape[0] is None


def replaced(parts: Parts, weight: Floats, rows: Rows, strength: float) -> Floats:
    """A whole difference, or a weight that takes the place of the old one at any strength."""
    if "set_weight" in parts:
        return parts.matrix("set_weight", rows) - weight
    return parts.matrix("diff", rows) * np.float32(strength)


def shifted_norm(parts: Parts, weight: Floats, rows: Rows, strength: float) -> Floats:
    """The weight of a norm, one number a row."""
    return parts.matrix("w_norm", rows) * np.float32(strength)


def has_bias_change(adapter: Adapter) -> bool:
    """Whether the bias is changed too; PEFT's IA3 scales it with the rows, where there is one."""
    return bool({"diff_b", "b_norm", "up_bias"} & adapter.parts.keys()) or _scales_bias(adapter)


def _scales_bias(adapter: Adapter) -> bool:
    return (
        adapter.kind == "ia3" and "on_input" not in adapter.parts and adapter.shape[0] is not None
    )


def bias_change(parts: Parts, bias: Floats, rows: Rows, strength: float) -> Floats:
    """What is added to elements of a module's bias.

    Args:
        parts: of the adapter.
        bias: (R, 1).
        rows: elements it has.
        strength: what the user multiplies the adapter by.
    """
    if _scales_bias(parts.adapter):
        return bias * (_ia3(parts)[slice(*rows)] * np.float32(strength))[:, None]
    found = np.zeros_like(bias)
    for role, scale in (("diff_b", 1.0), ("b_norm", 1.0), ("up_bias", parts.scale)):
        if role in parts:
            found += parts.read(role).reshape(-1, 1)[slice(*rows)] * np.float32(scale * strength)
    return found
