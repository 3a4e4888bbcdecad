"""Logical tensors: a weight with whatever its file keeps beside it, read as float32 rows.

`bind` folds the physical tensors of a source (weight, scales, quant_state, comfy_quant ...) into
logical ones, so that recognition, rules and policies see one tensor per weight, in its true shape.
Values are decoded on read, a range of rows at a time; nothing is held.

Recognised: plain dtypes, ggml blocks, `comfy.gguf.orig_shape.*` of tensors stored as rows of 256,
`comfy_quant` layers and `_quantization_metadata`, the legacy `scaled_fp8` marker, bitsandbytes nf4
(sources in convert/dialects.py and, for legacy files,
Comfy-Org/ComfyUI@09708ea:comfy/utils.py convert_old_quants).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.dialects import COMFY_FORMATS, GROUP_SIZES
from diffquant.convert.padded import bind_padded, read_padded
from diffquant.core.dtypes import STORAGE
from diffquant.core.errors import MalformedFile, UnsupportedDtype
from diffquant.core.tensors import ByteArray, TensorSource, TensorSpec
from diffquant.io.gguf_values import GgufArray
from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS, format_named, matrix_shape

__all__ = ["ORIG_SHAPE", "LogicalSource", "LogicalTensor", "bind"]

ORIG_SHAPE = "comfy.gguf.orig_shape."  # + the tensor's name as stored

_MARKER_LIMIT = 4096  # bytes of a marker tensor that `bind` is willing to read
_COMFY_NAMES = {name: fmt for fmt, (name, _) in COMFY_FORMATS.items()}
_BNB = ".quant_state.bitsandbytes__"
# bitsandbytes 0.50.2 functional.py, QuantState.as_dict(packed=True)
_BNB_ENDINGS = (
    ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", f"{_BNB}nf4", f"{_BNB}fp4",
)  # fmt: skip
_FOREIGN = ("F64",)
# Block types without a row in FORMATS: ggml's for activations, and a later one.
_UNREAD = ("Q8_1", "Q8_K", "Q1_0")
_SCALED_FP8 = {"F8_E4M3": "fp8_e4m3_scaled", "F8_E5M2": "fp8_e5m2_scaled"}
_CAST = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_TORCH_CAST = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "F64": "<f8"}


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """One weight as its users see it.

    Attributes:
        key: the source's key of the weight.
        shape: true shape.
        format: FORMATS name, or "" where no row describes the numbers (integers, foreign types).
        parts: FORMATS part name -> physical key.
        dtype: STORAGE name of the physical weight.
        why: why the numbers cannot be decoded, where they are packed in a way we do not read.
        decodes_to: cast format that the file says its numbers had before they were packed, or "".
        reshaped: shape the tensor has in the file, where a writer says it is not its own; else ().
    """

    key: str
    shape: tuple[int, ...]
    format: str
    parts: Mapping[str, str]
    dtype: str
    why: str = ""
    decodes_to: str = ""
    reshaped: tuple[int, ...] = ()

    @property
    def is_float(self) -> bool:
        """Whether the tensor can be read as floating point numbers."""
        return bool(self.format) or self._foreign

    @property
    def _foreign(self) -> bool:
        """Whether a line decodes what no FORMATS row names."""
        return not self.why and self.dtype in _FOREIGN

    @property
    def is_quantized(self) -> bool:
        """Whether numbers were already rounded to a low-bit format."""
        if self.format:
            return not FORMATS[self.format].is_cast
        return bool(self.why) or (self._foreign and self.dtype != "F64")

    @property
    def spec(self) -> TensorSpec:
        """The tensor as recognition sees it: true shape; blocks and packed weights shown as F32."""
        plain = self.dtype if not STORAGE[self.dtype].is_block and not self.is_quantized else "F32"
        return TensorSpec(self.key, plain, self.shape)


@dataclass(frozen=True, slots=True)
class LogicalSource:
    """A source with its companions folded away.

    Attributes:
        source: the container.
        tensors: source key of the weight -> logical tensor, in file order.
        consumed: physical keys that belong to a logical tensor other than as its weight.
        warnings: what looked wrong but could be read.
    """

    source: TensorSource
    tensors: Mapping[str, LogicalTensor]
    consumed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    def specs(self) -> dict[str, TensorSpec]:
        """Logical specs, for recognition."""
        return {key: tensor.spec for key, tensor in self.tensors.items()}

    def read(self, key: str, rows: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """Decode rows of a weight to float32.

        Args:
            key: logical key.
            rows: half-open range along the first dimension; all when None.

        Returns:
            (R, K) float32 for two or more dimensions, (1, size) below.

        Raises:
            UnsupportedDtype: the numbers cannot be decoded.
        """
        tensor = self.tensors[key]
        n, k = matrix_shape(tensor.shape)
        start, stop = rows or (0, n)
        if tensor.reshaped:
            return self._read_reshaped(tensor, start * k, stop * k).reshape(stop - start, k)
        if tensor.format == "nf4":
            return self._read_nf4(tensor, start * k, stop * k).reshape(stop - start, k)
        if tensor.format and format_named(tensor.format).is_tiled:
            return read_padded(
                self.source, tensor.format, tensor.parts, tensor.shape, (start, stop)
            )
        if tensor.format:
            parts = {
                part.name: self._part(tensor, part.name, part.per_row, (start, stop))
                for part in format_named(tensor.format).parts
            }
            name, scale = tensor.format, parts.get("scale")
            if name in _SCALED_FP8.values() and scale is not None and scale.ndim == 2:
                fmt = name.removesuffix("_scaled")  # some writers keep one fp8 scale per row
                rowwise: NDArray[np.float32] = backend(fmt, "decode")(
                    parts, (stop - start, k), fmt=fmt
                )
                scaled: NDArray[np.float32] = rowwise * scale
                return scaled
            out: NDArray[np.float32] = backend(format_named(name).codec, "decode")(
                parts, (stop - start, k), fmt=name
            )
            return out
        raw = self.source.read(tensor.key, (start, stop) if n > 1 else None)
        return _decode_foreign(tensor, raw, (stop - start, k))

    def _part(
        self, tensor: LogicalTensor, name: str, per_row: bool, rows: tuple[int, int]
    ) -> NDArray[Any]:
        spec = self.source.specs[tensor.parts[name]]
        n, k = matrix_shape(tensor.shape)
        start, stop = rows
        if name == "scale":  # files keep it as (), (1,), (N,) or (N, 1)
            flat = _view(self.source.read(spec.key), spec.dtype, (-1,))
            if flat.size > 1:
                return flat[start:stop, None]
            return np.full((stop - start, 1), flat[0]) if per_row else flat.reshape(())
        if spec.rows == n and n > 1:
            raw = self.source.read(spec.key, rows)
            return _view(raw, spec.dtype, (stop - start, spec.row_size))
        raw = self.source.read(spec.key)
        return _view(raw, spec.dtype, spec.shape if len(spec.shape) < 2 else (n, k))

    def _read_nf4(self, tensor: LogicalTensor, start: int, stop: int) -> NDArray[np.float32]:
        """Decode elements [start, stop) of the flattened weight; blocks run over row ends."""
        first, last = start // 64 * 64, min(-(-stop // 64) * 64, math.prod(tensor.shape))
        nbytes = first // 2, -(-last // 2)
        spec = self.source.specs[tensor.parts["weight"]]
        if spec.row_nbytes == 1:  # (bytes, 1), as bitsandbytes stores it
            packed = self.source.read(spec.key, nbytes)
        else:
            packed = self.source.read(spec.key)[slice(*nbytes)]
        absmax = _view(self.source.read(tensor.parts["absmax"]), "F32", (-1,))
        parts = {"weight": packed, "absmax": absmax[first // 64 : -(-last // 64)]}
        out: NDArray[np.float32] = backend("nf4", "decode")(parts, (1, last - first), fmt="nf4")
        return out.reshape(-1)[start - first : stop - first]

    def _read_reshaped(self, tensor: LogicalTensor, start: int, stop: int) -> NDArray[np.float32]:
        """Decode elements [start, stop) of a tensor whose rows in the file are not its own."""
        n, k = matrix_shape(tensor.reshaped)
        rows = (start // k, min(-(-stop // k), n)) if n > 1 else (0, n)
        as_stored = LogicalSource(
            self.source, {tensor.key: replace(tensor, shape=tensor.reshaped, reshaped=())}
        )
        flat = as_stored.read(tensor.key, rows).reshape(-1)
        return flat[start - rows[0] * k : stop - rows[0] * k]


def _view(raw: ByteArray, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if dtype in _NUMPY:
        flat = raw.view(_NUMPY[dtype])
        return flat.reshape(shape)
    if STORAGE[dtype].is_block:
        rows = shape[0] if shape else 1
        return raw.reshape(rows, raw.size // max(rows, 1))
    return raw.reshape(shape)


def _decode_foreign(
    tensor: LogicalTensor, raw: ByteArray, shape: tuple[int, int]
) -> NDArray[np.float32]:
    if tensor.dtype == "F64":
        return raw.view("<f8").reshape(shape).astype(np.float32)
    raise UnsupportedDtype(f"{tensor.key}: {tensor.why or f'cannot decode {tensor.dtype}'}")


def bind(source: TensorSource) -> LogicalSource:
    """Fold a source's physical tensors into logical ones; reads marker tensors of at most 4 KiB.

    Raises:
        MalformedFile: a marker contradicts the tensors beside it.
    """
    specs = source.specs
    markers = _comfy_markers(source)
    legacy = {k.removesuffix("scaled_fp8") for k in specs if k.split(".")[-1] == "scaled_fp8"}
    tensors: dict[str, LogicalTensor] = {}
    consumed: set[str] = {f"{p}scaled_fp8" for p in legacy}
    warnings: list[str] = []
    shapes = _original_shapes(source)
    for key, spec in specs.items():
        layer = key.removesuffix(".weight") if key.endswith(".weight") else ""
        if layer and layer in markers:
            tensor, used = _bind_comfy(source, key, layer, markers[layer])
        elif layer and any(f"{key}{_BNB}{kind}" in specs for kind in ("nf4", "fp4")):
            tensor, used = _bind_bnb(source, key)
        elif layer and spec.dtype.startswith("F8_") and _scale_key(specs, layer):
            tensor, used = _bind_scaled(source, key, layer)
            if not any(key.startswith(p) for p in legacy):
                warnings.append(f"{key}: scale without a marker; it is applied")
        else:
            tensor, used = _bind_plain(spec), ()
            if shapes.get(key, spec.shape) != spec.shape:
                tensor = replace(tensor, shape=shapes[key], reshaped=spec.shape)
        tensors[key] = tensor
        consumed.update(used)
    folded = {k: t for k, t in tensors.items() if k not in consumed}
    return LogicalSource(source, folded, tuple(k for k in specs if k in consumed), tuple(warnings))


def _bind_plain(spec: TensorSpec) -> LogicalTensor:
    row = STORAGE[spec.dtype]
    name = _CAST.get(spec.dtype, "")
    if not name and spec.dtype in _SCALED_FP8:
        name = _SCALED_FP8[spec.dtype].removesuffix("_scaled")
    if not name and row.is_block and spec.dtype.lower() in FORMATS:
        name = spec.dtype.lower()
    why = f"blocks of {spec.dtype} are not supported" if spec.dtype in _UNREAD else ""
    return LogicalTensor(spec.key, spec.shape, name, {"weight": spec.key}, spec.dtype, why)


def _original_shapes(source: TensorSource) -> dict[str, tuple[int, ...]]:
    """Shapes from before a writer stored tensors as rows of 256, by tensor name.

    Source: city96/ComfyUI-GGUF@795e451:loader.py:16-24 (an array of INT32 or an error).
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, value in source.metadata.items():
        if source.container != "gguf" or not name.startswith(ORIG_SHAPE):
            continue
        spec = source.specs.get(name.removeprefix(ORIG_SHAPE))
        if spec is None:
            continue  # of a tensor that was split off since: it says nothing about the others
        usable = isinstance(value, GgufArray) and value.type == "i32" and 0 < len(value) <= 8
        shape = tuple(value) if usable else ()
        if not usable or min(shape) < 1 or math.prod(shape) != spec.size:
            raise MalformedFile(
                f"{name}: expected an INT32 array whose product is {spec.size}, the size of the "
                f"tensor, found {value!r:.80}",
                path=source.path,
            )
        found[spec.key] = shape
    return found


def _scale_key(specs: Mapping[str, TensorSpec], layer: str) -> str:
    # Two spellings circulate: scale_weight (older ComfyUI) and weight_scale (current).
    return next((k for k in (f"{layer}.weight_scale", f"{layer}.scale_weight") if k in specs), "")


def _bind_scaled(
    source: TensorSource, key: str, layer: str
) -> tuple[LogicalTensor, tuple[str, ...]]:
    spec = source.specs[key]
    scale = _scale_key(source.specs, layer)
    extra = tuple(k for k in (f"{layer}.scale_input", f"{layer}.input_scale") if k in source.specs)
    _check_scale(source, scale, spec)
    parts = {"weight": key, "scale": scale}
    name = _SCALED_FP8.get(spec.dtype, "")  # by the weight's dtype: a marker of e5m2 may lie
    why = "" if name else f"{spec.dtype} with a scale is not supported"
    tensor = LogicalTensor(key, spec.shape, name, parts, spec.dtype, why)
    return tensor, (scale, *extra)


def _check_scale(source: TensorSource, scale: str, weight: TensorSpec) -> None:
    found = source.specs[scale]
    if found.dtype != "F32" or found.size not in (1, weight.rows):
        raise MalformedFile(
            f"{scale}: expected F32 with 1 or {weight.rows} values, found {found.dtype} "
            f"{found.shape}",
            path=source.path,
        )


def _bind_comfy(
    source: TensorSource, key: str, layer: str, marker: Mapping[str, Any]
) -> tuple[LogicalTensor, tuple[str, ...]]:
    specs = source.specs
    spec = specs[key]
    name = _COMFY_NAMES.get(str(marker.get("format")), "")
    endings = COMFY_FORMATS[name][1] if name else {"scale": "weight_scale"}
    parts = {part: f"{layer}.{ending}" for part, ending in endings.items()}
    beside = (f"{layer}.comfy_quant", *parts.values(), f"{layer}.input_scale")
    used = tuple(k for k in beside if k in specs)
    lacking = any(k not in specs for k in parts.values())
    smoothed = f"{layer}.pre_quant_scale" in specs  # the input is to be multiplied, and is not here
    other_blocks = name in GROUP_SIZES and marker.get("group_size") != GROUP_SIZES[name]
    if not name or marker.get("convrot") or lacking or smoothed or other_blocks:
        ours = (f"{layer}.weight_", f"{layer}.pre_quant_scale")
        others = tuple(k for k in specs if k.startswith(ours) and k not in used)
        beside_it = " with pre_quant_scale" if smoothed else ""
        why = f"comfy_quant {json.dumps(dict(marker))}{beside_it} is not supported yet"
        return LogicalTensor(key, spec.shape, "", {"weight": key}, spec.dtype, why), used + others
    row = format_named(name)
    stored = row.parts[0].dtype
    if spec.dtype != stored or len(spec.shape) < 2:
        raise MalformedFile(
            f"{key}: {marker['format']} needs {stored} with 2 or more dimensions, found "
            f"{spec.dtype} {spec.shape}",
            path=source.path,
        )
    shape = spec.shape
    if row.is_tiled:
        shape = bind_padded(source, name, {"weight": key, **parts}, layer, marker)
    else:
        _check_scale(source, parts["scale"], spec)
        if name.startswith("int8") and not _is_per_row(specs[parts["scale"]]):
            name = "int8_tensor"  # one name for both: the scale's shape tells
    return LogicalTensor(key, shape, name, {"weight": key, **parts}, spec.dtype), used


def _is_per_row(scale: TensorSpec) -> bool:
    return scale.size > 1 or len(scale.shape) == 2


def _bind_bnb(source: TensorSource, key: str) -> tuple[LogicalTensor, tuple[str, ...]]:
    specs = source.specs
    used = tuple(k for k in (f"{key}{ending}" for ending in _BNB_ENDINGS) if k in specs)
    marker = next(k for k in used if _BNB in k)
    state = _read_json(source, marker)
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
    before = _TORCH_CAST.get(str(state.get("dtype")), "")
    return LogicalTensor(key, tuple(shape), "nf4", parts, spec.dtype, "", before), used


def _comfy_markers(source: TensorSource) -> dict[str, Mapping[str, Any]]:
    """Layer -> its comfy_quant object, from marker tensors and from the header."""
    found: dict[str, Mapping[str, Any]] = {}
    header = source.metadata.get("_quantization_metadata")
    if isinstance(header, str):
        try:
            layers = json.loads(header).get("layers", {})
            found.update({k: v for k, v in layers.items() if isinstance(v, dict)})
        except (ValueError, AttributeError, RecursionError) as error:
            raise MalformedFile(
                "_quantization_metadata in the header is not JSON with layers", path=source.path
            ) from error
    for key in source.specs:
        if key.endswith(".comfy_quant"):
            found[key.removesuffix(".comfy_quant")] = _read_json(source, key)
    return found


def _read_json(source: TensorSource, key: str) -> Mapping[str, Any]:
    spec = source.specs[key]
    if spec.dtype != "U8" or spec.nbytes > _MARKER_LIMIT:
        raise MalformedFile(
            f"{key}: expected at most {_MARKER_LIMIT} bytes of JSON, found {spec.dtype} "
            f"{spec.shape}",
            path=source.path,
        )
    try:
        value = json.loads(bytes(source.read(key)).rstrip(b"\0 "))
    except (ValueError, RecursionError) as error:
        raise MalformedFile(f"{key}: not JSON", path=source.path) from error
    if not isinstance(value, dict):
        raise MalformedFile(f"{key}: expected a JSON object", path=source.path)
    return value
