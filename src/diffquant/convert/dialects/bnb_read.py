"""Find bitsandbytes' layers again: 4-bit ones by their quant state, 8-bit ones by their SCB.

Blocks of 64 with nested blocks of 256, which is what everybody writes, are rows of FORMATS; other
block sizes and storage types are read all the same, and never written. Source: bitsandbytes 0.50.2
functional.py:494-578 (from_dict, as_dict), nn/modules.py:600-610,1094-1117.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.dialects.bnb import QUANT_STATE, TABLES
from diffquant.convert.dialects.found import TORCH_CAST, Bound, Finder, read_json
from diffquant.convert.flat import FlatState, Nested, read_flat
from diffquant.convert.logical import LogicalTensor
from diffquant.core.errors import MalformedFile
from diffquant.core.tensors import TensorSource, TensorSpec
from diffquant.quant.formats import matrix_shape

__all__ = ["bnb_finder"]

_ENDINGS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_NAMES = ("SCB", *(f"{QUANT_STATE}{kind}".rpartition(".")[2] for kind in TABLES))
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FLOATS = ("float32", "float16", "bfloat16")


def bnb_finder(source: TensorSource, names: Set[str]) -> Finder:
    """Make the finder of a source."""
    find = functools.partial(_find, source) if not names.isdisjoint(_NAMES) else None
    return Finder(find, dialect="bnb")


def _find(source: TensorSource, spec: TensorSpec) -> Bound | None:
    key = spec.key
    if not key.endswith(".weight"):
        return None
    kinds = [kind for kind in TABLES if f"{key}{QUANT_STATE}{kind}" in source.specs]
    if kinds:
        return _four_bits(source, spec, kinds)
    layer = key.removesuffix(".weight")
    if spec.dtype == "I8" and f"{layer}.SCB" in source.specs:
        return _eight_bits(source, spec, layer)
    return None


def _four_bits(source: TensorSource, spec: TensorSpec, kinds: list[str]) -> Bound:
    key = spec.key
    markers = [f"{key}{QUANT_STATE}{kind}" for kind in kinds]
    if len(markers) > 1:
        raise MalformedFile(
            f"{key}: {len(markers)} quant states, expected one: {', '.join(markers)}",
            path=source.path,
        )
    used = tuple(k for k in (f"{key}{one}" for one in _ENDINGS) if k in source.specs)
    state, shape = _read_state(source, markers[0], kinds[0])
    flat, constants = _checked(source, spec, state, shape)
    parts = {"weight": key, "absmax": flat.absmax}
    if flat.nested is not None:
        parts["nested_absmax"] = flat.nested.absmax
    kind = flat.kind if flat.nested is None else f"{flat.kind}_dq"
    usual = flat.blocksize == 64 and (flat.nested is None or flat.nested.blocksize == 256)
    before = TORCH_CAST[state["dtype"]]
    if usual and spec.dtype == "U8":
        tensor = LogicalTensor(
            key, shape, kind, parts, spec.dtype, decodes_to=before, constants=constants
        )
    else:
        tensor = LogicalTensor(
            key,
            shape,
            "",
            parts,
            spec.dtype,
            decodes_to=before,
            foreign=f"{kind} in blocks of {flat.blocksize}",
            decoder=functools.partial(_decode, flat, shape),
        )
    return Bound(tensor, (*used, *markers))


def _read_state(
    source: TensorSource, marker: str, kind: str
) -> tuple[Mapping[str, Any], tuple[int, ...]]:
    state = read_json(source, marker)
    shape = state.get("shape")
    usable = isinstance(shape, list) and 1 <= len(shape) <= 8
    if not usable or not all(type(v) is int and 0 < v < 2**31 for v in shape or ()):
        raise MalformedFile(f"{marker}: no usable shape in the quant state", path=source.path)
    wanted = {
        "quant_type": (kind,),
        "blocksize": _BLOCK_SIZES,
        "dtype": _FLOATS,
        **({"nested_dtype": ("float32",)} if "nested_dtype" in state else {}),
    }
    for name, allowed in wanted.items():
        if state.get(name) not in allowed or isinstance(state.get(name), bool):
            raise MalformedFile(
                f"{marker}: expected {name} {' or '.join(map(str, allowed))}, found "
                f"{state.get(name)!r:.40}",
                path=source.path,
            )
    return state, tuple(shape or ())


def _checked(
    source: TensorSource, spec: TensorSpec, state: Mapping[str, Any], shape: tuple[int, ...]
) -> tuple[FlatState, dict[str, float]]:
    """Sizes of all parts follow from the state, or the file is refused."""
    key, size = spec.key, math.prod(shape)
    blocks = -(-size // state["blocksize"])
    nested, constants = None, {}
    expected = [(key, "", -(-size // 2), 1)]
    if f"{key}.nested_absmax" in source.specs or "nested_blocksize" in state:
        length, offset = state.get("nested_blocksize"), state.get("nested_offset")
        number = isinstance(offset, int | float) and not isinstance(offset, bool)
        if type(length) is not int or not 0 < length <= 4096 or not number:
            raise MalformedFile(
                f"{key}: expected nested_blocksize and nested_offset, found {length!r:.40} and "
                f"{offset!r:.40}",
                path=source.path,
            )
        value = float(offset or 0)
        if not math.isfinite(value):
            raise MalformedFile(f"{key}: nested_offset is {value}", path=source.path)
        nested = Nested(f"{key}.nested_absmax", length, value)
        constants = {"nested_offset": value}
        expected += [
            (f"{key}.absmax", "U8", blocks, 1),
            (nested.absmax, "F32", -(-blocks // length), 4),
        ]
    else:
        expected.append((f"{key}.absmax", "F32", blocks, 4))
    for name, dtype, count, width in expected:
        found = source.specs.get(name)
        if found is None or (dtype and found.dtype != dtype) or found.nbytes != count * width:
            seen = "nothing" if found is None else f"{found.dtype} {found.shape}"
            raise MalformedFile(
                f"{name}: expected {count} of {dtype or 'bytes'} for {list(shape)} in blocks of "
                f"{state['blocksize']}, found {seen}",
                path=source.path,
            )
    flat = FlatState(key, f"{key}.absmax", state["quant_type"], state["blocksize"], size, nested)
    return flat, constants


def _decode(
    flat: FlatState, shape: tuple[int, ...], source: TensorSource, rows: tuple[int, int]
) -> NDArray[np.float32]:
    k = matrix_shape(shape)[1]
    return read_flat(source, flat, rows[0] * k, rows[1] * k).reshape(-1, k)


def _eight_bits(source: TensorSource, spec: TensorSpec, layer: str) -> Bound:
    scb, order = source.specs[f"{layer}.SCB"], source.specs.get(f"{layer}.weight_format")
    if len(spec.shape) != 2 or scb.dtype != "F32" or scb.size != spec.shape[0]:
        raise MalformedFile(
            f"{scb.key}: expected F32 with {spec.rows} values, found {scb.dtype} {scb.shape}",
            path=source.path,
        )
    why = ""
    if order is not None and (order.nbytes != 1 or int(source.read(order.key)[0]) != 0):
        why = "its numbers are in the order of an old GPU kernel (weight_format is not 0)"
    name = "" if why else "int8_bnb"
    parts = {"weight": spec.key, "scb": scb.key}
    tensor = LogicalTensor(spec.key, spec.shape, name, parts, spec.dtype, why)
    return Bound(tensor, (scb.key, *((order.key,) if order is not None else ())))
