"""OFT and BOFT: the weight is turned by orthogonal blocks.

lycoris turns rows by R = (I + Q)(I - Q)^-1, Q = B - B^T of its blocks B; OFT uses R^T, and BOFT
chains stages, stage i mixing rows that are 2^i half blocks apart. PEFT turns columns: OFT by
R = (I - Q)(I + Q)^-1 of the numbers above Q's diagonal, or, unless told otherwise, by a series that
approximates the transpose; BOFT by the exact one of Q = (B - B^T) / 2, permuted at every stage.
Columns do not mix rows, so PEFT's kinds can be applied to any rows.

Sources: lycoris-lora 4.1.3 (package), functional/{diag_oft,boft}.py; peft 0.21.2 (package),
tuners/oft/layer.py _cayley_batch and merge, tuners/boft/layer.py get_delta_weight and
block_butterfly_perm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.lora.deltas.parts import Parts, Rows

__all__ = ["butterfly", "rotated"]

Floats: TypeAlias = NDArray[np.float32]
_MOST_TERMS = 64
_TERMS = 5  # peft 0.21.2, tuners/oft/config.py: num_cayley_neumann_terms


def rotated(parts: Parts, weight: Floats, rows: Rows, strength: float) -> Floats:
    """OFT: strength * (R W - W); lycoris may scale rows after that."""
    if "oft_r" in parts:
        return _blend(_turn_columns(parts, weight), weight, strength)
    blocks = _of_skew(_lycoris_skew(parts))  # (n, b, b)
    grouped = weight.reshape(*blocks.shape[:2], -1)
    turned = np.matmul(blocks.swapaxes(1, 2), grouped).reshape(weight.shape)
    if "rescale" in parts:
        turned = turned * parts.read("rescale").reshape(-1, 1)
    return _blend(turned, weight, strength)


def _blend(turned: Floats, weight: Floats, strength: float) -> Floats:
    """The difference, times the strength."""
    found = turned - weight
    found *= np.float32(strength)
    return found


def _lycoris_skew(parts: Parts) -> Floats:
    blocks = parts.read("oft_blocks")
    skew = blocks - blocks.swapaxes(-1, -2)
    # Its alpha is the limit of the norm, per row of the weight.
    limit = parts.number("alpha") * parts.rows if "alpha" in parts else 0.0
    norm = float(np.linalg.norm(skew)) + 1e-8
    return skew * np.float32(limit / norm) if 0 < limit < norm else skew


def _of_skew(skew: Floats) -> Floats:
    """(I + Q)(I - Q)^-1, block by block."""
    eye = np.eye(skew.shape[-1], dtype=np.float32)
    found: Floats = np.matmul(eye + skew, np.linalg.inv(eye - skew))
    return found


def butterfly(parts: Parts, weight: Floats, rows: Rows, strength: float) -> Floats:
    """BOFT: every stage is blended with the identity by itself, as lycoris does."""
    if "boft_r" in parts:
        return _blend(_turn_columns_in_stages(parts, weight), weight, strength)
    stages = _of_skew(_lycoris_skew(parts))  # (m, n, b, b)
    size = stages.shape[-1]
    turned = weight
    for index, blocks in enumerate(stages):
        mixed = blocks * np.float32(strength) + np.eye(size, dtype=np.float32) * np.float32(
            1 - strength
        )
        half = 2**index * (size // 2)
        paired = turned.reshape(-1, 2, half, turned.shape[1]).swapaxes(1, 2)
        done = np.matmul(mixed, paired.reshape(len(blocks), size, -1))
        paired = done.reshape(-1, half, 2, turned.shape[1]).swapaxes(1, 2)
        turned = paired.reshape(weight.shape)
    if "rescale" in parts:
        turned = turned * parts.read("rescale").reshape(-1, 1)
    return turned - weight


def _turn_columns(parts: Parts, weight: Floats) -> Floats:
    """W R^T with R of blocks along the columns; a single block may serve for all of them."""
    upper = parts.matrix("oft_r")  # (n, b (b - 1) / 2)
    size = (1 + math.isqrt(1 + 8 * upper.shape[1])) // 2
    skew = np.zeros((len(upper), size, size), np.float32)
    above = np.triu_indices(size, 1)
    skew[:, above[0], above[1]] = upper
    turns = _cayley(skew - skew.swapaxes(1, 2), parts.config)
    grouped = weight.reshape(len(weight), -1, size)
    turns = np.broadcast_to(turns, (grouped.shape[1], size, size))
    turned: Floats = np.einsum("kij,okj->oki", turns, grouped, optimize=True)
    return turned.reshape(weight.shape)


def _cayley(skew: Floats, config: Mapping[str, Any]) -> Floats:
    """(I - Q)(I + Q)^-1, or PEFT's series for its transpose: I + 2 Q + ... + 2 Q^(n-1) + Q^n."""
    eye = np.eye(skew.shape[-1], dtype=np.float32)
    if config.get("use_cayley_neumann", True) is False:
        exact: Floats = np.matmul(eye - skew, np.linalg.inv(eye + skew))
        return exact
    terms = config.get("num_cayley_neumann_terms", _TERMS)
    count = terms if isinstance(terms, int) and 0 < terms <= _MOST_TERMS else _TERMS
    last = max(count - 1, 3) if count > 2 else 0
    found = np.broadcast_to(eye, skew.shape).copy()
    power = found
    for index in range(1, max(last + 1, count)):
        power = np.matmul(power, skew)
        found = found + power * np.float32(1 if index == last else 2)
    return found


def _turn_columns_in_stages(parts: Parts, weight: Floats) -> Floats:
    """S * W (B_m ... B_1)^T, stages being permuted block diagonals."""
    blocks = parts.read("boft_r")  # (m, n, b, b)
    stages, count, size, _ = blocks.shape
    skew = (blocks - blocks.swapaxes(2, 3)) * np.float32(0.5)
    eye = np.eye(size, dtype=np.float32)
    turns = np.matmul(eye - skew, np.linalg.inv(eye + skew))
    turned = weight
    for index in range(stages):
        order = _order(count * size, count // 2**index, size // 2) if stages > 1 else None
        # B = P D P^T with P[i, order[i]] = 1, so W B^T = ((W P) D^T) P^T
        mixed = turned if order is None else _inverse_columns(turned, order)
        grouped = mixed.reshape(len(mixed), count, size)
        done = np.einsum("kij,okj->oki", turns[index], grouped, optimize=True)
        mixed = done.reshape(weight.shape)
        turned = mixed if order is None else mixed[:, order]
    if "boft_s" in parts:
        turned = turned * parts.read("boft_s").reshape(-1, 1)
    return turned


def _inverse_columns(values: Floats, order: NDArray[np.int64]) -> Floats:
    found = np.empty_like(values)
    found[:, order] = values
    return found


def _order(width: int, count: int, half: int) -> NDArray[np.int64]:
    """Even half blocks before odd ones, inside each of `count` segments."""
    runs = np.arange(width).reshape(count, -1, half)
    return np.concatenate([runs[:, 0::2], runs[:, 1::2]], axis=1).reshape(-1)
