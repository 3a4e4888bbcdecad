"""How packed weights are stored: which numbers, in whose dialect, and what is odd about it.

Layers that are stored alike are one row. From logical tensors alone: no weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from diffquant.convert.detect import Match
from diffquant.convert.dialects.algos import QUANT_ALGOS, QUANTOPS
from diffquant.convert.logical import LogicalSource, LogicalTensor
from diffquant.core.dtypes import STORAGE
from diffquant.core.errors import shorten

__all__ = ["Encoding", "encoding_warnings", "encodings"]

_SCALES = ("scale", "block_scale", "absmax", "scb", "s_rel")
_BARE_FP8 = ("fp8_e4m3", "fp8_e5m2")
_SCALED_FP8 = ("fp8_e4m3_", "fp8_e5m2_", "mxfp8")


@dataclass(frozen=True, slots=True)
class Encoding:
    """Weights of one part that are stored alike.

    Attributes:
        part: part of the model, "" where none is recognised.
        format: FORMATS name, what the numbers are called where we have no row for them, or the
            stored dtype where they cannot be read.
        dialect: whose layout it is: comfy, scaled_fp8, bnb, sdnq, bfl, modelopt, gguf, plain.
        called: what the file itself calls the format, "" where it does not.
        marker: what says so: a `comfy_quant` tensor, `_quantization_metadata` in the header, a
            `scaled_fp8` tensor, or "".
        scale: how the scales' key ends, "" where there are none.
        readable: whether the numbers can be decoded.
        weights, parameters: how many.
        example: key of the first.
    """

    part: str
    format: str
    dialect: str
    called: str
    marker: str
    scale: str
    readable: bool
    weights: int
    parameters: int
    example: str


def encodings(logical: LogicalSource, match: Match | None) -> tuple[Encoding, ...]:
    """Group the packed weights of a source, in file order."""
    parts = {
        part.prefix + key: part.name
        for part in (match.parts if match else ())
        for key in part.shapes
    }
    found: dict[Encoding, tuple[int, int, str]] = {}
    for key, tensor in logical.tensors.items():
        if not tensor.is_quantized:
            continue
        row = _row(parts.get(key, ""), tensor)
        count, size, first = found.get(row, (0, 0, key))
        found[row] = (count + 1, size + tensor.spec.size, first)
    return tuple(
        replace(row, weights=count, parameters=size, example=first)
        for row, (count, size, first) in found.items()
    )


def _row(part: str, tensor: LogicalTensor) -> Encoding:
    gguf = STORAGE[tensor.dtype].is_block
    return Encoding(
        part=part,
        format=tensor.format or tensor.foreign or tensor.dtype.lower(),
        dialect="gguf" if gguf else tensor.dialect,
        called=tensor.called,
        marker=tensor.marked,
        scale=_spelling(tensor),
        readable=tensor.is_float,
        weights=0,
        parameters=0,
        example="",
    )


def _spelling(tensor: LogicalTensor) -> str:
    layer = tensor.key.removesuffix("weight")
    keys = [tensor.parts[name] for name in _SCALES if name in tensor.parts]
    return keys[0].removeprefix(layer) if keys else ""


def encoding_warnings(logical: LogicalSource) -> tuple[str, ...]:
    """What a user should know of the packed weights, that reading them right does not need."""
    packed = {key: one for key, one in logical.tensors.items() if one.is_quantized}
    return (*_bare_fp8(packed), *_unknown_names(packed), *_unread(packed))


def _bare_fp8(packed: Mapping[str, LogicalTensor]) -> Iterator[str]:
    """fp8 without scales: legal, coarser than need be, and what a lost scale looks like."""
    bare = [key for key, one in packed.items() if one.format in _BARE_FP8 and len(one.shape) > 1]
    scaled = sum(one.format.startswith(_SCALED_FP8) for one in packed.values())
    if not bare:
        return
    lost = "pictures of weights whose scale was lost are white, black or noise, with no error"
    if scaled:
        yield (
            f"{len(bare)} fp8 weights have no scale ({shorten(bare, 2)}) and {scaled} have one; "
            f"{lost}"
        )
    else:
        yield (
            f"{len(bare)} fp8 weights have no scale ({shorten(bare, 2)}): a plain cast, which "
            f"rounds coarser than scaled fp8, or the scales were lost; {lost}"
        )


def _unknown_names(packed: Mapping[str, LogicalTensor]) -> Iterator[str]:
    named: dict[str, list[str]] = {}
    for key, one in packed.items():
        if (
            one.marked in ("comfy_quant", "_quantization_metadata")
            and one.called not in QUANT_ALGOS
        ):
            named.setdefault(one.called, []).append(key)
    for name, keys in named.items():
        who = f"{len(keys)} layers ({shorten(keys, 2)})"
        if not name:
            yield f"{who}: their marker names no format, and their tensors do not tell it"
        elif name in QUANTOPS:
            yield f"{who}: {name} needs the node ComfyUI-QuantOps; ComfyUI alone has no such format"
        else:
            yield f"{who}: ComfyUI has no format {name!r:.60} (it has: {', '.join(QUANT_ALGOS)})"


def _unread(packed: Mapping[str, LogicalTensor]) -> Iterator[str]:
    why: dict[str, list[str]] = {}
    for key, one in packed.items():
        if not one.is_float:
            why.setdefault(one.why, []).append(key)
    for text, keys in why.items():
        yield f"{len(keys)} weights cannot be read ({shorten(keys, 2)}): {text:.200}"
