"""Rules of GGUF files: the container's, ggml's, and those of programs that load image models.

Sources: docs/gguf.md, ggml-org/ggml@01f0d4d; gguf.cpp and ggml-quants.c,
ggml-org/llama.cpp@01243c5; loader.py, city96/ComfyUI-GGUF@795e451; gguf/constants.py, gguf-py
0.19.0 (file types).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from diffquant.core.dtypes import GGML_IDS, Storage
from diffquant.inspect.audit_rules import Found, Rule, windows
from diffquant.inspect.audit_values import CODES, not_finite, unused_codes
from diffquant.io.gguf import MAX_NAME_NBYTES, RETIRED_IDS
from diffquant.io.gguf_header import GgufHeader, TensorInfo
from diffquant.io.gguf_values import GgufArray
from diffquant.io.reading import RandomFile

__all__ = ["GGUF_RULES", "GgufFile"]

_SPEC = "docs/gguf.md, ggml-org/ggml@01f0d4d"
_READER = "gguf.cpp gguf_init_from_file_impl, ggml-org/llama.cpp@01243c5"
_VALIDATE = "ggml-quants.c ggml_validate_row_data, ggml-org/llama.cpp@01243c5"
_COMFY = "city96/ComfyUI-GGUF@795e451:loader.py:16-24"
_GGML_MAX_DIMS = 4
_MAX_ELEMENTS = 2**63
_ORIG_SHAPE = "comfy.gguf.orig_shape."
_QUANTIZATION_VERSION = 2
_GUESSED = 1024
# general.file_type -> types that may be the most common; llama.cpp's IQ2_S and IQ3_XS are mixes.
_FILE_TYPES: dict[int, tuple[str, ...]] = {
    0: ("F32",),
    1: ("F16",),
    2: ("Q4_0",),
    3: ("Q4_1",),
    7: ("Q8_0",),
    8: ("Q5_0",),
    9: ("Q5_1",),
    10: ("Q2_K",),
    11: ("Q3_K",),
    12: ("Q3_K",),
    13: ("Q3_K",),
    14: ("Q4_K",),
    15: ("Q4_K",),
    16: ("Q5_K",),
    17: ("Q5_K",),
    18: ("Q6_K",),
    19: ("IQ2_XXS",),
    20: ("IQ2_XS",),
    21: ("Q2_K",),
    22: ("IQ3_S", "IQ3_XXS"),
    23: ("IQ3_XXS",),
    24: ("IQ1_S",),
    25: ("IQ4_NL",),
    26: ("IQ3_S",),
    27: ("IQ3_S",),
    28: ("IQ2_XS", "IQ2_S"),
    29: ("IQ2_S",),
    30: ("IQ4_XS",),
    31: ("IQ1_M",),
    32: ("BF16",),
    36: ("TQ1_0",),
    37: ("TQ2_0",),
    38: ("MXFP4",),
    39: ("NVFP4",),
    40: ("Q1_0",),
}


@dataclass(frozen=True)
class GgufFile:
    """A header as it stands, and the bytes behind it."""

    file: RandomFile
    header: GgufHeader
    full: bool = False

    @cached_property
    def alignment(self) -> int:
        """The alignment that holds: the header's where it is one, else 32."""
        item = self.header.pairs.get("general.alignment")
        value = item.value if item is not None else 32
        usable = type(value) is int and value > 0 and not value & (value - 1)
        return value if usable else 32

    @cached_property
    def start(self) -> int:
        """Where the data starts."""
        return self.padded(self.header.nbytes)

    @cached_property
    def sizes(self) -> dict[TensorInfo, int]:
        """Bytes of every tensor whose type and dimensions give a size."""
        found = {}
        for info in self.header.tensors:
            row, size = GGML_IDS.get(info.type_id), math.prod(info.dims)
            if row is None or size >= _MAX_ELEMENTS or _row_length(info) % row.block_size:
                continue
            found[info] = size // row.block_size * row.block_nbytes
        return found

    def padded(self, nbytes: int) -> int:
        """Round up to the alignment."""
        return -(-nbytes // self.alignment) * self.alignment

    def readable(self) -> Iterator[tuple[TensorInfo, Storage, int, int]]:
        """Tensors that lie in the file: info, storage row, first byte and bytes."""
        for info, nbytes in self.sizes.items():
            begin = self.start + info.offset
            if nbytes and begin + nbytes <= self.file.size:
                yield info, GGML_IDS[info.type_id], begin, nbytes


def _row_length(info: TensorInfo) -> int:
    return info.dims[0] if info.dims else 1


def _version(one: GgufFile) -> Iterator[Found]:
    if one.header.version != 3:
        yield "", "version 3", f"version {one.header.version}"


def _keys(one: GgufFile) -> Iterator[Found]:
    for key in one.header.pairs:
        if not key.isascii() or not key or len(key) > 65535:
            yield "", "keys of 1 to 65535 ASCII characters", f"key {key!r:.60}"


def _alignment(one: GgufFile) -> Iterator[Found]:
    item = one.header.pairs.get("general.alignment")
    if item is None:
        return
    value = item.value
    good = item.type == "u32" and value > 0 and not value & (value - 1) and value % 8 == 0
    if not good:
        yield "", "general.alignment: u32, a power of two from 8", f"{item.type} {value!r:.40}"


def _unique(one: GgufFile) -> Iterator[Found]:
    seen: set[str] = set()
    for info in one.header.tensors:
        if info.key in seen:
            yield info.key, "each name once", "the name again"
        seen.add(info.key)


def _names(one: GgufFile) -> Iterator[Found]:
    for info in one.header.tensors:
        nbytes = len(info.key.encode())
        if not 0 < nbytes <= MAX_NAME_NBYTES:
            yield info.key, f"a name of 1 to {MAX_NAME_NBYTES} bytes", f"{nbytes} bytes"


def _types(one: GgufFile) -> Iterator[Found]:
    for info in one.header.tensors:
        if info.type_id not in GGML_IDS:
            kind = "retired" if info.type_id in RETIRED_IDS else "unknown"
            yield info.key, "a ggml type", f"{kind} type id {info.type_id}"


def _dims(one: GgufFile) -> Iterator[Found]:
    for info in one.header.tensors:
        if math.prod(info.dims) >= _MAX_ELEMENTS or 0 in info.dims:
            yield info.key, "dimensions from 1, product below 2**63", f"{info.dims}"


def _rank(one: GgufFile) -> Iterator[Found]:
    for info in one.header.tensors:
        if len(info.dims) > _GGML_MAX_DIMS:
            yield info.key, f"at most {_GGML_MAX_DIMS} dimensions", f"{len(info.dims)}"


def _rows(one: GgufFile) -> Iterator[Found]:
    for info in one.header.tensors:
        row = GGML_IDS.get(info.type_id)
        if row is not None and _row_length(info) % row.block_size:
            expected = f"rows of whole {row.name} blocks of {row.block_size}"
            yield info.key, expected, f"rows of {_row_length(info)}"


def _aligned(one: GgufFile) -> Iterator[Found]:
    for info in one.header.tensors:
        if info.offset % one.alignment:
            yield info.key, f"an offset divisible by {one.alignment}", f"{info.offset}"


def _tiles(one: GgufFile) -> Iterator[Found]:
    expected, before = 0, "the header"
    for info in one.header.tensors:
        if info.offset != expected:
            kind = "a gap" if info.offset > expected else "an overlap, or another order"
            yield info.key, f"offset {expected}, after {before}", f"{info.offset}: {kind}"
        nbytes = one.sizes.get(info)
        if nbytes is None:
            return  # without its size nothing can be said about those that follow
        expected, before = one.padded(info.offset + nbytes), info.key


def _inside(one: GgufFile) -> Iterator[Found]:
    for info, nbytes in one.sizes.items():
        end = one.start + info.offset + nbytes
        if nbytes and end > one.file.size:
            yield info.key, f"a file of at least {end} bytes", f"{one.file.size} bytes"


def _trailing(one: GgufFile) -> Iterator[Found]:
    ends = [one.padded(info.offset + nbytes) for info, nbytes in one.sizes.items()]
    end = one.start + max(ends, default=0)
    if len(one.sizes) == len(one.header.tensors) and one.file.size > end:
        yield "", f"a file that ends at byte {end}", f"{one.file.size - end} bytes more"


def _padding(one: GgufFile) -> Iterator[Found]:
    spans = [("", one.header.nbytes, one.start)]
    spans += [
        (info.key, begin + nbytes, one.start + one.padded(info.offset + nbytes))
        for info, _, begin, nbytes in one.readable()
    ]
    for key, start, stop in spans:
        stop = min(stop, one.file.size)
        if start < stop and one.file.read(start, stop - start).any():
            yield key, "padding of zeros", "other bytes"


def _architecture(one: GgufFile) -> Iterator[Found]:
    item = one.header.pairs.get("general.architecture")
    if item is None or item.type != "str" or not item.value:
        found = "nothing" if item is None else f"{item.type} {item.value!r:.40}"
        yield "", "general.architecture: a string", found


def _quantization_version(one: GgufFile) -> Iterator[Found]:
    item = one.header.pairs.get("general.quantization_version")
    packed = any(GGML_IDS[i.type_id].is_block for i in one.header.tensors if i.type_id in GGML_IDS)
    if item is None and not packed:
        return
    if item is None or item.type != "u32" or item.value != _QUANTIZATION_VERSION:
        found = "nothing" if item is None else f"{item.type} {item.value!r:.40}"
        yield "", f"general.quantization_version: u32 {_QUANTIZATION_VERSION}", found


def _file_type(one: GgufFile) -> Iterator[Found]:
    item = one.header.pairs.get("general.file_type")
    if item is None:
        return
    if item.type != "u32" or item.value & ~_GUESSED not in _FILE_TYPES:
        yield (
            "",
            "general.file_type: u32, a number of llama.cpp's",
            f"{item.type} {item.value!r:.40}",
        )
        return
    weights: dict[str, int] = {}
    for info in one.sizes:
        if len(info.dims) > 1:
            name = GGML_IDS[info.type_id].name
            weights[name] = weights.get(name, 0) + math.prod(info.dims)
    most = max(weights, key=lambda name: weights[name], default="")
    expected = _FILE_TYPES[item.value & ~_GUESSED]
    if most and most not in expected:
        yield (
            "",
            f"most weights as {' or '.join(expected)}: file type {item.value}",
            f"most are {most}",
        )


def _orig_shape(one: GgufFile) -> Iterator[Found]:
    have = {info.key: info for info in one.header.tensors}
    for key, item in one.header.pairs.items():
        if not key.startswith(_ORIG_SHAPE):
            continue
        name = key.removeprefix(_ORIG_SHAPE)
        if not isinstance(item.value, GgufArray) or item.type != "i32":
            yield name, f"{key}: an array of i32", f"{item.type} {item.value!r:.40}"
        elif name not in have:
            yield name, f"a tensor of that name for {key}", "none"
        else:
            shape, size = tuple(item.value[:]), math.prod(have[name].dims)
            if any(length < 1 for length in shape) or math.prod(shape) != size:
                yield name, f"{size} elements in {key}", f"{shape}"


def _arrays_beside_5d(one: GgufFile) -> Iterator[Found]:
    deep = [info.key for info in one.header.tensors if len(info.dims) > _GGML_MAX_DIMS]
    arrays = [key for key, item in one.header.pairs.items() if isinstance(item.value, GgufArray)]
    if deep and arrays:
        yield deep[0], "no array keys beside tensors of more than 4 dimensions", arrays[0]


def _bf16(one: GgufFile) -> Iterator[Found]:
    for info in one.header.tensors:
        row = GGML_IDS.get(info.type_id)
        if row is None or row.name != "BF16":
            continue
        if len(info.dims) != 2 or not info.key.endswith(".weight"):
            yield info.key, "BF16 in linear layers only, F32 or F16 elsewhere", f"{info.dims}"


def _finite(one: GgufFile) -> Iterator[Found]:
    for info, row, begin, nbytes in one.readable():
        bad = sum(
            not_finite(row.name, one.file.read(begin + at, count))
            for at, count in windows(nbytes, row.block_nbytes, full=one.full)
        )
        if bad:
            yield (
                info.key,
                f"finite {row.name} {'scales' if row.is_block else 'numbers'}",
                f"{bad} not",
            )


def _codes(one: GgufFile) -> Iterator[Found]:
    for info, row, begin, nbytes in one.readable():
        if row.name not in CODES:
            continue
        bad = sum(
            unused_codes(row.name, one.file.read(begin + at, count))
            for at, count in windows(nbytes, row.block_nbytes, full=one.full)
        )
        if bad:
            yield info.key, f"{row.name} {CODES[row.name]}", f"{bad} blocks with others"


GGUF_RULES: tuple[Rule[GgufFile], ...] = (
    Rule("version", "warning", _SPEC, _version),
    Rule("keys", "violation", _SPEC, _keys),
    Rule("alignment", "violation", _SPEC, _alignment),
    Rule("names_unique", "violation", _READER, _unique),
    Rule("names", "violation", "city96/ComfyUI-GGUF@795e451:tools/convert.py:12", _names),
    Rule("types", "violation", _SPEC, _types),
    Rule("dimensions", "violation", _READER, _dims),
    # ggml itself stops at four; ComfyUI-GGUF reads five, and files of video models have them.
    Rule("rank", "warning", "ggml.h GGML_MAX_DIMS, ggml-org/llama.cpp@01243c5", _rank),
    Rule("rows", "violation", _READER, _rows),
    Rule("aligned", "violation", _SPEC, _aligned),
    Rule("tiles", "violation", _READER, _tiles),
    Rule("inside", "violation", _SPEC, _inside),
    Rule("trailing", "violation", _SPEC, _trailing),
    Rule("padding", "warning", _SPEC, _padding),
    Rule("architecture", "violation", _SPEC, _architecture),
    Rule("quantization_version", "violation", _SPEC, _quantization_version),
    Rule("file_type", "warning", "gguf-py 0.19.0 gguf/constants.py:4106-4149", _file_type),
    Rule("orig_shape", "violation", _COMFY, _orig_shape),
    Rule(
        "arrays_beside_5d",
        "warning",
        "leejet/stable-diffusion.cpp@97d2990:src/gguf_reader_ext.h:114-127",
        _arrays_beside_5d,
    ),
    Rule("bf16", "warning", "city96/ComfyUI-GGUF@795e451:dequant.py:7-13", _bf16),
    Rule("finite", "violation", _VALIDATE, _finite),
    Rule(
        "codes", "warning", "ggml-quants.c quantize_row_*_ref, ggml-org/llama.cpp@01243c5", _codes
    ),
)
