"""Find SDNQ's layers: `weight`, `scale` and, by kind, `zero_point`, `svd_up`, `svd_down`.

Only where the component's config says `quant_method: sdnq`: names and sizes alone do not tell how
many bits share a byte. Read and never written; what is not read is refused by name. The shape of a
packed weight follows from its bytes and the shape of its scales::

    linear    scale (N, 1) or (N, groups, 1)            weight packed flat, or (N, groups, group)
    kernel    scale (N, 1, h, w) or (N, groups, 1, h, w)
    turned    scale (1, N), weight (K, N)               laid out for a quantized matrix product

Source: sdnq 0.2.8 quantizer.py sdnq_quantize_layer_weight, common.py dtype_dict.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.dialects.found import Bound, Finder
from diffquant.convert.dialects.sdnq_config import SdnqConfig, SdnqLayer, read_sdnq_config
from diffquant.convert.logical import LogicalTensor
from diffquant.convert.sdnq import SdnqState, hadamard_group, read_sdnq
from diffquant.core.errors import MalformedFile
from diffquant.core.floats import PLAIN_FLOATS
from diffquant.core.tensors import TensorSource, TensorSpec
from diffquant.quant.codecs.packed_int import UNITS

__all__ = ["sdnq_finder"]

Shape = tuple[int, ...]
_ENDINGS = (
    "scale", "scale_2", "scale_zero_point", "zero_point", "zero_point_scale", "zero_point_2",
    "svd_up", "svd_down",
)  # fmt: skip
_MIN_MATMUL, _MATMUL_MULTIPLE = 32, 16  # sizes that a quantized product takes


@dataclass(frozen=True, slots=True)
class _Numbers:
    """One dtype of SDNQ: its STORAGE names, bits where codes share bytes, least code."""

    stored: tuple[str, ...]
    bits: int = 0
    least: int = 0
    unsigned: bool = False


_NUMBERS: Mapping[str, _Numbers] = {
    "uint1": _Numbers(("U8", "I64"), 1, unsigned=True),  # torch shifts bool into int64
    **{f"uint{bits}": _Numbers(("U8",), bits, unsigned=True) for bits in range(2, 8)},
    **{f"int{bits}": _Numbers(("U8",), bits, -(1 << (bits - 1))) for bits in range(2, 8)},
    "uint8": _Numbers(("U8",), unsigned=True),
    "int8": _Numbers(("I8",)),
    "float8_e4m3fn": _Numbers(("F8_E4M3",)),
    "float8_e5m2": _Numbers(("F8_E5M2",)),
}


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's tensors and what the config says of it."""

    path: Path
    weight: TensorSpec
    beside: Mapping[str, TensorSpec]
    said: SdnqLayer

    def wrong(self, spec: TensorSpec, expected: str) -> MalformedFile:
        """The error that a tensor is not what the others ask for."""
        return MalformedFile(
            f"{spec.key}: expected {expected} for {self.said.dtype} of SDNQ, found {spec.dtype} "
            f"{spec.shape}",
            path=self.path,
        )


def sdnq_finder(source: TensorSource, _names: Set[str]) -> Finder:
    """Make the finder of a source: none of its tensors, unless a config names SDNQ."""
    prefixes = {f"{key.partition('/')[0]}/" if "/" in key else "" for key in source.configs}
    found = {
        prefix: config
        for prefix in sorted(prefixes)
        if (config := read_sdnq_config(source.configs, prefix, source.path)) is not None
    }
    find = functools.partial(_find, source, found) if found else None
    return Finder(find, dialect="sdnq")


def _find(
    source: TensorSource, configs: Mapping[str, SdnqConfig], spec: TensorSpec
) -> Bound | None:
    if not spec.key.endswith(".weight"):
        return None
    prefix = f"{spec.key.partition('/')[0]}/" if "/" in spec.key else ""
    layer = spec.key.removesuffix("weight")
    if prefix not in configs or f"{layer}scale" not in source.specs:
        return None
    beside = {
        one: source.specs[f"{layer}{one}"] for one in _ENDINGS if f"{layer}{one}" in source.specs
    }
    said = configs[prefix].layer(spec.key.removeprefix(prefix))
    tensor = _bind(_Layer(source.path, spec, beside, said))
    return Bound(tensor, tuple(one.key for one in beside.values()))


def _bind(one: _Layer) -> LogicalTensor:
    numbers, said = _NUMBERS.get(one.said.dtype), one.said
    extra = sorted(set(one.beside) - {"scale", "zero_point", "svd_up", "svd_down"})
    if numbers is None or said.packs or extra:
        what = said.packs or (f"weights_dtype {said.dtype}" if numbers is None else extra[0])
        return _refused(one, f"SDNQ with {what} is not supported")
    if one.weight.dtype not in numbers.stored:
        raise one.wrong(one.weight, " or ".join(numbers.stored))
    _check_scales(one, numbers)
    return _packed(one, numbers) if numbers.bits else _whole_bytes(one)


def _check_scales(one: _Layer, numbers: _Numbers) -> None:
    scale, zero = one.beside["scale"], one.beside.get("zero_point")
    if scale.dtype not in PLAIN_FLOATS or not scale.size or len(scale.shape) < 2:
        raise one.wrong(scale, f"{' or '.join(PLAIN_FLOATS)} of 2 or more dimensions")
    if numbers.unsigned != (zero is not None):
        raise one.wrong(zero or scale, "a zero_point for unsigned numbers, and for no others")
    if zero is not None and (zero.dtype, zero.shape) != (scale.dtype, scale.shape):
        raise one.wrong(zero, f"{scale.dtype} {scale.shape}, as the scale")


def _packed(one: _Layer, numbers: _Numbers) -> LogicalTensor:
    """Codes that share bytes: their shape follows from their count and from the scales'."""
    unit, scale = UNITS[numbers.bits], one.beside["scale"].shape
    per = unit.nbytes * (8 if one.weight.dtype == "I64" else 1)
    size = one.weight.nbytes // per * len(unit.elements)
    n, rest = scale[0], scale[2:] if scale[1] == 1 else scale[3:]
    groups = 1 if scale[1] == 1 else scale[1]
    shared = math.prod((n, groups, *rest))
    if one.weight.nbytes % per or not size or size % shared:
        raise one.wrong(one.weight, f"whole units for scales of {scale}")
    if groups > 1 and (len(scale) < 3 or scale[2] != 1):
        return _refused(one, f"SDNQ scales of {scale} are not supported")
    if n == 1 and len(scale) == 2 and "svd_up" not in one.beside:
        return _refused(one, "SDNQ with one scale for a packed tensor does not say its shape")
    each = size // shared
    codes = (n, each, *rest) if groups == 1 else (n, groups, each, *rest)
    return _state(one, codes, scale, numbers)


def _whole_bytes(one: _Layer) -> LogicalTensor:
    """A byte for each code, perhaps with columns first."""
    codes, scale, numbers = one.weight.shape, one.beside["scale"].shape, _NUMBERS[one.said.dtype]
    if len(codes) != len(scale) or not all(s in (1, c) for s, c in zip(scale, codes, strict=True)):
        raise one.wrong(one.beside["scale"], f"a shape that goes with {codes}")
    if len(codes) == 2:
        if one.said.conv_matmul and not one.said.matmul:
            return _refused(one, "SDNQ kernels laid out for a quantized product are not supported")
        product = one.said.matmul and all(
            size >= _MIN_MATMUL and not size % _MATMUL_MULTIPLE for size in codes
        )
        rows = scale == (codes[0], 1)  # scales lie along the rows, whatever the config says
        if scale == (1, 1):
            rows = not product
        elif not rows and scale != (1, codes[1]):
            return _refused(one, f"SDNQ scales of {scale} for {codes} are not supported")
        if not rows:
            return _state(one, codes[::-1], scale[::-1], numbers, turned=True)
        return _state(one, codes, scale, numbers)
    grouped = scale[1] == codes[1] > 1 and scale[2] == 1 and scale[3:] == codes[3:]
    kernel = scale[1] == 1 and scale[0] == codes[0] and scale[2:] == codes[2:]
    if not grouped and not kernel and set(scale) != {1}:
        return _refused(one, f"SDNQ scales of {scale} for {codes} are not supported")
    return _state(one, codes, scale, numbers)


def _state(
    one: _Layer, codes: Shape, scale: Shape, numbers: _Numbers, *, turned: bool = False
) -> LogicalTensor:
    grouped = len(scale) > 2 and scale[1] > 1
    shape = (codes[0], codes[1] * codes[2], *codes[3:]) if grouped else codes
    svd_turned = _check_svd(one, shape)
    key = one.weight.key
    parts = {"weight": key, **{name: spec.key for name, spec in one.beside.items()}}
    state = SdnqState(
        weight=key,
        scale=parts["scale"],
        zero_point=parts.get("zero_point", ""),
        svd_up=parts.get("svd_up", ""),
        svd_down=parts.get("svd_down", ""),
        codes=codes,
        scales=scale,
        bits=numbers.bits,
        offset=numbers.least,
        turned=turned,
        svd_turned=svd_turned,
        hadamard=hadamard_group(shape[1], one.said.hadamard) if one.said.hadamard else 0,
    )
    done = ["low rank"] if state.svd_up else []
    done += ["rotated"] if state.hadamard else []
    return LogicalTensor(
        key,
        shape,
        "",
        parts,
        one.weight.dtype,
        foreign=f"sdnq {one.said.dtype}" + (f" ({', '.join(done)})" if done else ""),
        decoder=functools.partial(_decode, state),
    )


def _check_svd(one: _Layer, shape: Shape) -> bool:
    """Whether the low-rank part has columns first; its sizes must go with the weight's."""
    up, down = one.beside.get("svd_up"), one.beside.get("svd_down")
    if up is None and down is None:
        return False
    if up is None or down is None:
        raise one.wrong(up or down or one.weight, "svd_up and svd_down together")
    n, k = shape[0], math.prod(shape[1:])
    for spec in (up, down):
        if spec.dtype not in PLAIN_FLOATS or spec.dtype != up.dtype or len(spec.shape) != 2:
            raise one.wrong(spec, f"{' or '.join(PLAIN_FLOATS)} of 2 dimensions, both alike")
    ways = [
        turned
        for turned in ((True, False) if one.said.matmul else (False, True))
        if _svd_shape(up, turned=turned) + _svd_shape(down, turned=turned)
        == (n, _svd_shape(up, turned=turned)[1], _svd_shape(up, turned=turned)[1], k)
    ]
    if not ways:
        raise one.wrong(down, f"a product with {up.shape} that is {(n, k)}")
    return ways[0]


def _svd_shape(spec: TensorSpec, *, turned: bool) -> Shape:
    return spec.shape[::-1] if turned else spec.shape


def _refused(one: _Layer, why: str) -> LogicalTensor:
    key = one.weight.key
    return LogicalTensor(key, one.weight.shape, "", {"weight": key}, one.weight.dtype, why)


def _decode(state: SdnqState, source: TensorSource, rows: tuple[int, int]) -> NDArray[np.float32]:
    return read_sdnq(source, state, rows)
