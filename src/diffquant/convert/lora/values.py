"""Values of an adapter's parts: what is NaN or infinite, and what is zero and changes nothing.

One part at a time is in memory. A product is zero when one of its factors is; a rotation stored as
a skew matrix turns nothing when that is zero. What replaces or scales the weight is never "zero".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffquant.convert.lora.group import Adapter
from diffquant.core.floats import PLAIN_FLOATS, float32_of
from diffquant.core.tensors import TensorSource, TensorSpec

__all__ = ["odd_values"]

_CHUNK = 16 << 20  # bytes looked at together
# Parts beside which zero factors still change the weight.
_NEVER = frozenset({"magnitude", "set_weight", "boft_s", "rescale"})
# Any one group all zero: the delta is zero. Roles an adapter lacks do not count.
_ZERO: dict[str, tuple[tuple[str, ...], ...]] = {
    "lora": (("up",), ("down",), ("mid",)),
    "loha": (
        *((role,) for role in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
        ("hada_t1",),
        ("hada_t2",),
    ),
    "lokr": tuple(
        (role,)
        for role in (
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
            *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        )
    ),
    "glora": tuple((a, b) for a in ("glora_a1", "glora_a2") for b in ("glora_b1", "glora_b2")),
    "full": (("diff", "diff_b"),),
    "norm": (("w_norm", "b_norm"),),
    "embedding": (("embedding_a",), ("embedding_b",)),
    "oft": (("oft_blocks", "oft_r"),),
    "boft": (("oft_blocks", "boft_r"),),
    "ia3": (("ia3",),),
}


def odd_values(source: TensorSource, adapters: Sequence[Adapter]) -> dict[str, str]:
    """Module as the file writes it -> "zero", or what is wrong with its values.

    Reads every part of every adapter once.
    """
    found: dict[str, str] = {}
    for adapter in adapters:
        zeros = set()
        for role, key in adapter.parts.items():
            bad, zero = _look(source, source.specs[key])
            if bad:
                found[adapter.name] = f"{bad} in {role}"
                break
            if zero:
                zeros.add(role)
        else:
            if _is_zero(adapter, zeros):
                found[adapter.name] = "zero"
    return found


def _is_zero(adapter: Adapter, zeros: set[str]) -> bool:
    parts = adapter.parts.keys()
    if parts & _NEVER or (adapter.kind == "ia3" and "on_input" not in parts):
        return False  # PEFT's IA3 multiplies by its numbers, lycoris' by one and its numbers
    if adapter.kind != "full" and ({"up_bias", "diff_b"} & parts) - zeros:
        return False
    for group in _ZERO.get(adapter.kind, ()):
        present = [role for role in group if role in adapter.parts]
        if present and all(role in zeros for role in present):
            return True
    return False


def _look(source: TensorSource, spec: TensorSpec) -> tuple[str, bool]:
    """What is wrong with a tensor ("NaN", "infinity" or ""), and whether all of it is zero."""
    if spec.dtype not in PLAIN_FLOATS or not spec.size:
        return "", False
    step = max(_CHUNK // max(spec.row_nbytes, 1), 1)
    zero = True
    for start in range(0, spec.rows, step):
        rows = (start, min(start + step, spec.rows)) if len(spec.shape) >= 2 else None
        values = float32_of(source.read(spec.key, rows), spec.dtype)
        if not np.isfinite(values).all():
            return ("NaN" if np.isnan(values).any() else "infinity"), False
        zero = zero and not values.any()
    return "", zero
