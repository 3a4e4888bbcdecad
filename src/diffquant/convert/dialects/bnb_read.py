"""Find bitsandbytes' layers again by their quant state."""

from __future__ import annotations

import functools
import math

from diffquant.convert.dialects.found import TORCH_CAST, Bound, Finder, read_json
from diffquant.convert.logical import LogicalTensor
from diffquant.core.errors import MalformedFile
from diffquant.core.tensors import TensorSource, TensorSpec

__all__ = ["bnb_finder"]

_BNB = ".quant_state.bitsandbytes__"
# bitsandbytes 0.50.2 functional.py, QuantState.as_dict(packed=True)
_BNB_ENDINGS = (
    ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", f"{_BNB}nf4", f"{_BNB}fp4",
)  # fmt: skip


def bnb_finder(source: TensorSource) -> Finder:
    """Make the finder of a source."""
    return Finder(functools.partial(_find, source), dialect="bnb")


def _find(source: TensorSource, spec: TensorSpec) -> Bound | None:
    key = spec.key
    if not key.endswith(".weight"):
        return None
    if not any(f"{key}{_BNB}{kind}" in source.specs for kind in ("nf4", "fp4")):
        return None
    tensor, used = _bind(source, key)
    return Bound(tensor, used)


def _bind(source: TensorSource, key: str) -> tuple[LogicalTensor, tuple[str, ...]]:
    specs = source.specs
    used = tuple(k for k in (f"{key}{ending}" for ending in _BNB_ENDINGS) if k in specs)
    marker = next(k for k in used if _BNB in k)
    state = read_json(source, marker)
    shape = state.get("shape")
    if not isinstance(shape, list) or not all(type(v) is int and v > 0 for v in shape):
        raise MalformedFile(f"{marker}: no usable shape in the quant state", path=source.path)
    size = math.prod(shape)
    spec = specs[key]
    plain = state.get("quant_type") == "nf4" and state.get("blocksize") == 64
    absmax = specs.get(f"{key}.absmax")
    if not plain or absmax is None or absmax.dtype != "F32":
        why = f"bitsandbytes {state.get('quant_type')} with nested or other blocks is not supported"
        return LogicalTensor(key, tuple(shape), "", {"weight": key}, spec.dtype, why), used
    if spec.dtype != "U8" or spec.size != -(-size // 2) or absmax.size != -(-size // 64):
        raise MalformedFile(
            f"{key}: {spec.size} bytes and {absmax.size} scales do not hold {shape}",
            path=source.path,
        )
    parts = {"weight": key, "absmax": absmax.key}
    before = TORCH_CAST.get(str(state.get("dtype")), "")
    return LogicalTensor(key, tuple(shape), "nf4", parts, spec.dtype, "", before), used
