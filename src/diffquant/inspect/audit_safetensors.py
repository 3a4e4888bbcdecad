"""Rules of safetensors files: the container's, and those of packed layers in it.

Sources: README.md and safetensors/src/tensor.rs, huggingface/safetensors@24b0b28; comfy/ops.py and
comfy/quant_ops.py, Comfy-Org/ComfyUI@0271a46; functional.py, bitsandbytes 0.50.2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from diffquant.convert.dialects.algos import QUANT_ALGOS
from diffquant.core.dtypes import storage
from diffquant.core.errors import DiffquantError
from diffquant.core.tensors import TensorSpec
from diffquant.inspect.audit_rules import Found, Rule, windows
from diffquant.inspect.audit_values import not_finite
from diffquant.io.reading import RandomFile
from diffquant.io.safetensors import checked_entry

__all__ = ["SAFETENSORS_RULES", "SafetensorsFile"]

_SPEC = "README.md Format, huggingface/safetensors@24b0b28"
_CHECKS = "safetensors/src/tensor.rs, huggingface/safetensors@24b0b28"
_OPS = "comfy/ops.py _load_quantized_module, Comfy-Org/ComfyUI@0271a46"
_ALGOS = "comfy/quant_ops.py QUANT_ALGOS, Comfy-Org/ComfyUI@0271a46"
_BNB = "functional.py QuantState.from_dict, bitsandbytes 0.50.2"
_METADATA = "__metadata__"
_LAYERS = "_quantization_metadata"
_MARKER = ".comfy_quant"
_STATE = ".quant_state.bitsandbytes__"
_MARKER_LIMIT = 4096
_BNB_SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_BNB_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_SCALES = (".weight_scale", ".scale_weight", ".weight_scale_2", ".input_scale", ".scale_input")
_WEIGHT_SCALES = ("weight_scale", "scale_weight", "scale")
# Formats whose scale is one value or one per output row.
_ONE_OR_ROWS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "convrot_w4a4")


@dataclass(frozen=True)
class SafetensorsFile:
    """A header as it stands, and the bytes behind it."""

    file: RandomFile
    start: int
    header: Mapping[str, Any]
    full: bool = False

    @cached_property
    def checked(self) -> tuple[dict[str, tuple[TensorSpec, int]], dict[str, str]]:
        """Key -> spec and begin of the entries that keep the rules; key -> what breaks them."""
        good: dict[str, tuple[TensorSpec, int]] = {}
        bad: dict[str, str] = {}
        for key, entry in self.header.items():
            if key == _METADATA:
                continue
            try:
                spec, begin, _ = checked_entry(key, entry, self.file.path)
                good[key] = spec, begin
            except DiffquantError as error:
                bad[key] = str(error).removeprefix(f"{self.file.path}: ")
        return good, bad

    @property
    def entries(self) -> dict[str, tuple[TensorSpec, int]]:
        """Key -> spec and begin, of the entries that keep the rules."""
        return self.checked[0]

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Key -> spec."""
        return {key: spec for key, (spec, _) in self.entries.items()}

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """The header's own pairs, where they are an object."""
        found = self.header.get(_METADATA)
        return found if isinstance(found, dict) else {}

    def read(self, key: str, at: int, nbytes: int) -> Any:  # noqa: ANN401 - ByteArray
        """Bytes of a tensor."""
        return self.file.read(self.start + self.entries[key][1] + at, nbytes)

    def lies_inside(self, key: str) -> bool:
        """Whether the file has the tensor's bytes."""
        spec, begin = self.entries[key]
        return self.start + begin + spec.nbytes <= self.file.size

    def marker(self, key: str) -> dict[str, Any] | str:
        """A marker tensor's JSON object, or what is wrong with it."""
        spec = self.specs[key]
        if spec.dtype != "U8" or len(spec.shape) != 1 or spec.nbytes > _MARKER_LIMIT:
            return f"{spec.dtype} {spec.shape}"
        if not self.lies_inside(key):
            return "beyond the end of the file"
        try:
            value = json.loads(bytes(self.read(key, 0, spec.nbytes)).rstrip(b"\0 "))
        except (ValueError, RecursionError):
            return "not JSON"
        return value if isinstance(value, dict) else "JSON that is no object"

    @cached_property
    def comfy(self) -> dict[str, dict[str, Any] | str]:
        """Layer -> its comfy_quant object or what is wrong with it, from tensors and header."""
        found = {
            key.removesuffix(_MARKER): self.marker(key)
            for key in self.specs
            if key.endswith(_MARKER)
        }
        try:  # the header goes first, as in ComfyUI
            layers = json.loads(self.metadata.get(_LAYERS, "{}")).get("layers", {})
            found.update({str(key): value for key, value in layers.items()})
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass  # its own rule says so
        return found


def _metadata(one: SafetensorsFile) -> Iterator[Found]:
    found = one.header.get(_METADATA, {})
    if not isinstance(found, dict):
        yield "", f"{_METADATA}: an object", type(found).__name__
        return
    for key, value in found.items():
        if not isinstance(value, str):
            yield "", f"text for {_METADATA} {key!r:.40}", type(value).__name__


def _entries(one: SafetensorsFile) -> Iterator[Found]:
    for key, text in one.checked[1].items():
        yield key, "dtype, shape and data_offsets that agree", text


def _tiles(one: SafetensorsFile) -> Iterator[Found]:
    if one.checked[1]:
        return  # what an entry without a size covers cannot be told
    position = 0
    ordered = sorted(one.entries.items(), key=lambda item: (item[1][1], item[1][0].nbytes))
    for key, (spec, begin) in ordered:
        if begin != position:
            kind = "a gap" if begin > position else "an overlap"
            yield key, f"begin {position}", f"{begin}: {kind}"
        position = max(position, begin + spec.nbytes)
    if one.start + position != one.file.size:
        yield "", f"a file of {one.start + position} bytes", f"{one.file.size} bytes"


def _aligned(one: SafetensorsFile) -> Iterator[Found]:
    if one.start % 8:
        yield "", "data that starts at a multiple of 8", f"byte {one.start}"
    for key, (spec, begin) in one.entries.items():
        width = storage(spec.dtype).block_nbytes
        if spec.nbytes and (one.start + begin) % width:
            yield key, f"{spec.dtype} at a multiple of {width}", f"byte {one.start + begin}"


def _layers(one: SafetensorsFile) -> Iterator[Found]:
    text = one.metadata.get(_LAYERS)
    if text is None:
        return
    try:
        layers = json.loads(text)["layers"]
        names = list(layers.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        yield "", f"{_LAYERS}: JSON with an object of layers", f"{text!r:.60}"
        return
    for name, value in names:
        if not isinstance(value, dict):
            yield f"{name}", "an object for each layer", type(value).__name__


def _comfy_marker(one: SafetensorsFile) -> Iterator[Found]:
    for layer, marker in one.comfy.items():
        if not isinstance(marker, dict):
            found = marker if isinstance(marker, str) else type(marker).__name__
            yield layer, "comfy_quant: a JSON object in at most 4096 bytes of U8", found
        elif not isinstance(marker.get("format"), str):
            yield layer, "comfy_quant with a format", json.dumps(marker)[:80]


def _comfy_format(one: SafetensorsFile) -> Iterator[Found]:
    for layer, name, _ in _formats(one):
        if name not in QUANT_ALGOS:
            yield layer, f"a format that ComfyUI has: {', '.join(QUANT_ALGOS)}", name


def _formats(one: SafetensorsFile) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for layer, marker in one.comfy.items():
        if isinstance(marker, dict) and isinstance(marker.get("format"), str):
            yield layer, marker["format"], marker


def _comfy_parts(one: SafetensorsFile) -> Iterator[Found]:
    for layer, name, _ in _formats(one):
        if name not in QUANT_ALGOS:
            continue
        dtype, companions = QUANT_ALGOS[name]
        weight = one.specs.get(f"{layer}.weight")
        if weight is None or weight.dtype != dtype or len(weight.shape) < 2:
            yield f"{layer}.weight", f"{dtype} of 2 dimensions for {name}", _shown(weight)
        for part, dtypes in companions.items():
            spec = one.specs.get(f"{layer}.{part}")
            if spec is None or spec.dtype not in dtypes:
                yield f"{layer}.{part}", f"{' or '.join(dtypes)} for {name}", _shown(spec)


def _comfy_scale(one: SafetensorsFile) -> Iterator[Found]:
    for layer, name, marker in _formats(one):
        weight, scale = one.specs.get(f"{layer}.weight"), one.specs.get(f"{layer}.weight_scale")
        if weight is None or scale is None or name not in _ONE_OR_ROWS:
            continue
        rows = weight.rows
        allowed = (rows,) if marker.get("convrot") or name == "convrot_w4a4" else (1, rows)
        if scale.size not in allowed:
            expected = " or ".join(str(count) for count in dict.fromkeys(allowed))
            yield scale.key, f"{expected} scales for {rows} rows", f"{scale.shape}"


def _shown(spec: TensorSpec | None) -> str:
    return f"{spec.dtype} {spec.shape}" if spec is not None else "nothing"


def _unmarked(one: SafetensorsFile) -> Iterator[Found]:
    legacy = [k.removesuffix("scaled_fp8") for k in one.specs if k.split(".")[-1] == "scaled_fp8"]
    for key, spec in one.specs.items():
        layer = key.removesuffix(".weight")
        if layer == key or not spec.dtype.startswith("F8_E") or layer in one.comfy:
            continue
        scaled = any(
            f"{layer}{ending}" in one.specs for ending in (".weight_scale", ".scale_weight")
        )
        marked = any(key.startswith(prefix) for prefix in legacy)
        if scaled and not marked:
            yield key, "comfy_quant or scaled_fp8 beside a scale", "none: loaders ignore the scale"
        elif marked and not scaled:
            yield key, "a scale for each fp8 layer under scaled_fp8", "none"


def _scaled_fp8(one: SafetensorsFile) -> Iterator[Found]:
    """Legacy layers that ComfyUI reads otherwise than their tensors say."""
    for mark, spec in one.specs.items():
        if mark.split(".")[-1] != "scaled_fp8" or _LAYERS in one.metadata:
            continue
        says = "F8_E4M3" if spec.dtype == "F32" else spec.dtype
        for key, weight in one.specs.items():
            layer = key.removesuffix(".weight")
            scale = one.specs.get(f"{layer}.scale_weight")
            other = f"{layer}.weight_scale" in one.specs
            ours = key.startswith(mark.removesuffix("scaled_fp8")) and layer not in one.comfy
            if layer == key or not ours or not weight.dtype.startswith("F8_E"):
                continue
            if weight.dtype != says or weight.dtype == "F8_E5M2":
                found = f"{weight.dtype} under a marker of {says}"
                yield key, "F8_E4M3, which ComfyUI labels every such weight", found
            if scale is None and other:
                yield key, "its scale as scale_weight", "weight_scale: ComfyUI leaves it out"
            if scale is not None and scale.dtype != "F32":
                yield scale.key, "F32: other scales stop ComfyUI", scale.dtype


def _bare_fp8(one: SafetensorsFile) -> Iterator[Found]:
    bare = [
        key
        for key, spec in one.specs.items()
        if spec.dtype.startswith("F8_E")
        and len(spec.shape) > 1
        and key.endswith(".weight")
        and not any(f"{key.removesuffix('weight')}{end}" in one.specs for end in _WEIGHT_SCALES)
    ]
    if bare:
        yield bare[0], "a scale beside each fp8 weight", f"none for {len(bare)}: a cast, or lost"


def _nvfp4_order(one: SafetensorsFile) -> Iterator[Found]:
    for key, spec in one.specs.items():
        layer = key.removesuffix(".weight_scale_2")
        weight = one.specs.get(f"{layer}.weight")
        if layer == key or weight is None or weight.dtype != "U8" or layer in one.comfy:
            continue
        yield spec.key, "a marker that says which nibble comes first", "none"


def _params(one: SafetensorsFile) -> Iterator[Found]:
    for layer, marker in one.comfy.items():
        nested = marker.get("params") if isinstance(marker, dict) else None
        if not isinstance(marker, dict) or not isinstance(nested, dict):
            continue
        for name, value in nested.items():
            if name in marker and marker[name] != value:
                yield layer, f"{name} {marker[name]!r:.40} in its params too", f"{value!r:.40}"


def _bnb(one: SafetensorsFile) -> Iterator[Found]:
    groups: dict[str, list[str]] = {}
    for key in one.specs:
        head, found, kind = key.partition(_STATE)
        if found:
            groups.setdefault(head, []).append(kind)
    for weight, kinds in groups.items():
        if len(kinds) > 1:
            yield weight, "one quant_state", ", ".join(kinds)
            continue
        state = one.marker(f"{weight}{_STATE}{kinds[0]}")
        if isinstance(state, str):
            yield weight, "quant_state: a JSON object in at most 4096 bytes of U8", state
            continue
        yield from _bnb_state(one, weight, kinds[0], state)
    for key in one.specs:
        head, _, part = key.rpartition(".")
        if head in groups and part not in _BNB_SUFFIXES:
            yield key, f"no tensor beside {', '.join(_BNB_SUFFIXES)}", "the loader stops at it"


def _bnb_state(
    one: SafetensorsFile, weight: str, kind: str, state: Mapping[str, Any]
) -> Iterator[Found]:
    if state.get("quant_type") != kind or kind not in ("nf4", "fp4"):
        yield weight, f"quant_type {kind}", f"{state.get('quant_type')!r:.40}"
    block, shape = state.get("blocksize"), state.get("shape")
    if type(block) is not int or block not in _BNB_BLOCKS:
        yield weight, f"blocksize from {_BNB_BLOCKS}", f"{block!r:.40}"
        return
    if not isinstance(shape, list) or not all(type(v) is int and 0 < v < 2**31 for v in shape):
        yield weight, "shape: a list of integers", f"{shape!r:.60}"
        return
    size = math.prod(shape)
    blocks = -(-size // block)
    nested = "nested_blocksize" in state
    stored = one.specs.get(weight)
    if stored is None or stored.nbytes != -(-size // 2):
        yield weight, f"{-(-size // 2)} bytes for {shape}", _shown(stored)
    expected: dict[str, tuple[str, int]] = {
        "absmax": ("U8" if nested else "F32", blocks),
        "quant_map": ("F32", 16),
    }
    if nested:
        outer = state["nested_blocksize"]
        if type(outer) is not int or outer < 1:
            yield weight, "nested_blocksize: an integer", f"{outer!r:.40}"
            return
        expected["nested_absmax"] = ("F32", -(-blocks // outer))
        expected["nested_quant_map"] = ("F32", 256)
    for part, (dtype, count) in expected.items():
        spec = one.specs.get(f"{weight}.{part}")
        if spec is None or (spec.dtype, spec.size) != (dtype, count):
            yield f"{weight}.{part}", f"{dtype} with {count} values", _shown(spec)


def _values(
    wanted: Callable[[TensorSpec], bool], what: str
) -> Callable[[SafetensorsFile], Iterator[Found]]:
    def check(one: SafetensorsFile) -> Iterator[Found]:
        for key, spec in one.specs.items():
            if not wanted(spec) or not one.lies_inside(key):
                continue
            width = storage(spec.dtype).block_nbytes
            bad = sum(
                not_finite(spec.dtype, one.read(key, at, count))
                for at, count in windows(spec.nbytes, width, full=one.full)
            )
            if bad:
                yield key, f"finite {spec.dtype} {what}", f"{bad} not"

    return check


def _is_scale(spec: TensorSpec) -> bool:
    return spec.key.endswith((*_SCALES, ".absmax", ".weight_s_rel", ".weight_s_channel"))


SAFETENSORS_RULES: tuple[Rule[SafetensorsFile], ...] = (
    Rule("metadata", "violation", _SPEC, _metadata),
    Rule("entries", "violation", _CHECKS, _entries),
    Rule("tiles", "violation", _CHECKS, _tiles),
    Rule("aligned", "warning", _SPEC, _aligned),
    Rule("layers", "violation", "comfy/utils.py convert_old_quants", _layers),
    Rule("comfy_marker", "violation", _OPS, _comfy_marker),
    Rule("comfy_format", "warning", _ALGOS, _comfy_format),
    Rule("comfy_parts", "violation", _ALGOS, _comfy_parts),
    Rule("comfy_scale", "violation", _ALGOS, _comfy_scale),
    Rule("comfy_params", "warning", _OPS, _params),
    Rule("unmarked", "warning", "comfy/utils.py convert_old_quants", _unmarked),
    Rule("scaled_fp8", "warning", "comfy/utils.py convert_old_quants", _scaled_fp8),
    Rule("bare_fp8", "warning", "comfy/ops.py pick_operations", _bare_fp8),
    Rule("nvfp4_order", "warning", _ALGOS, _nvfp4_order),
    Rule("bnb", "violation", _BNB, _bnb),
    Rule("finite_scales", "violation", _ALGOS, _values(_is_scale, "scales")),
    Rule("finite", "warning", _SPEC, _values(lambda spec: not _is_scale(spec), "numbers")),
)
