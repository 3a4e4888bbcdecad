"""`inspect` says how weights are packed, and warns of what turns into broken pictures elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink

FP8 = ("F8_E4M3", np.full((4, 32), 56, np.uint8))
E5M2 = ("F8_E5M2", np.full((4, 32), 56, np.uint8))
I8 = ("I8", np.ones((4, 32), np.int8))
ONE, ROWS = ("F32", np.ones((), np.float32)), ("F32", np.ones(4, np.float32))
SHORT = ("BF16", np.full((), 0x3F80, np.uint16))
EMPTY, PAIR = ("F8_E4M3", np.zeros(0, np.uint8)), ("F8_E4M3", np.zeros(2, np.uint8))
FIELDS = {
    "part", "format", "dialect", "called", "marker", "scale", "readable", "weights", "parameters",
    "example",
}  # fmt: skip


def said(**fields):
    raw = np.frombuffer(json.dumps(fields).encode(), np.uint8)
    return "U8", raw


def write(path, tensors, metadata=None):
    specs = [TensorSpec(key, dtype, data.shape) for key, (dtype, data) in tensors.items()]
    with open_sink(path, specs, metadata or {}) as sink:
        for key, (_, data) in tensors.items():
            sink.write(key, 0, np.ascontiguousarray(data).reshape(-1).view(np.uint8))
        sink.commit()
    return path


HEADER = {"_quantization_metadata": json.dumps({"layers": {"l": {"format": "float8_e4m3fn"}}})}
# name -> (tensors, metadata, (format, dialect, called, marker, scale), warning or "", audit rule)
FILES = {
    "comfy": (
        {"l.weight": FP8, "l.weight_scale": ONE, "l.comfy_quant": said(format="float8_e4m3fn")},
        {},
        ("fp8_e4m3_scaled", "comfy", "float8_e4m3fn", "comfy_quant", "weight_scale"),
        "", "",
    ),
    "header": (
        {"l.weight": FP8, "l.weight_scale": ONE}, HEADER,
        ("fp8_e4m3_scaled", "comfy", "float8_e4m3fn", "_quantization_metadata", "weight_scale"),
        "", "",
    ),
    "header without the prefix": (
        {"net.l.weight": FP8, "net.l.weight_scale": ONE}, HEADER,
        ("fp8_e4m3_scaled", "comfy", "float8_e4m3fn", "_quantization_metadata", "weight_scale"),
        "without the prefix", "comfy_parts",
    ),
    "legacy": (
        {"l.weight": FP8, "l.scale_weight": ONE, "scaled_fp8": PAIR}, {},
        ("fp8_e4m3_scaled", "scaled_fp8", "float8_e4m3fn", "scaled_fp8", "scale_weight"),
        "", "",
    ),
    "legacy of e5m2": (
        {"l.weight": E5M2, "l.scale_weight": ONE, "scaled_fp8": ("F8_E5M2", EMPTY[1])}, {},
        ("fp8_e5m2_scaled", "scaled_fp8", "float8_e5m2", "scaled_fp8", "scale_weight"),
        "labels every weight float8_e4m3fn", "scaled_fp8",
    ),
    "scale of 16 bits": (
        {"l.weight": FP8, "l.weight_scale": SHORT, "l.comfy_quant": said(format="float8_e4m3fn")},
        {},
        ("fp8_e4m3_scaled", "comfy", "float8_e4m3fn", "comfy_quant", "weight_scale"),
        "the scale is BF16, which ComfyUI stops at", "comfy_parts",
    ),
    "legacy scale of 16 bits": (
        {"l.weight": FP8, "l.scale_weight": SHORT, "scaled_fp8": EMPTY}, {},
        ("fp8_e4m3_scaled", "scaled_fp8", "float8_e4m3fn", "scaled_fp8", "scale_weight"),
        "the scale is BF16", "scaled_fp8",
    ),
    "no marker": (
        {"l.weight": FP8, "l.scale_weight": ONE}, {},
        ("fp8_e4m3_scaled", "scaled_fp8", "", "", "scale_weight"),
        "scale without a marker", "unmarked",
    ),
    "no scale": (
        {"l.weight": FP8}, {}, ("fp8_e4m3", "plain", "", "", ""),
        "1 fp8 weights have no scale (l.weight): a plain cast", "bare_fp8",
    ),
    "one scale lost": (
        {"l.weight": FP8, "m.weight": FP8, "m.weight_scale": ONE,
         "m.comfy_quant": said(format="float8_e4m3fn")},
        {},
        ("fp8_e4m3", "plain", "", "", ""),
        "1 fp8 weights have no scale (l.weight) and 1 have one", "bare_fp8",
    ),
    "no format": (
        {"l.weight": I8, "l.weight_scale": ROWS, "l.comfy_quant": said(per_row=True)}, {},
        ("int8_rowwise", "comfy", "int8_tensorwise", "comfy_quant", "weight_scale"),
        "its marker names no format; taken for int8_tensorwise", "comfy_marker",
    ),
    "no format to be told": (
        {"l.weight": I8, "l.weight_scale": ROWS, "l.weight_zeros": ONE, "l.comfy_quant": said()},
        {},
        ("i8", "comfy", "", "comfy_quant", ""),
        "their marker names no format, and their tensors do not tell it", "comfy_marker",
    ),
    "a format nobody has": (
        {"l.weight": I8, "l.weight_scale": ROWS, "l.comfy_quant": said(format="int7")}, {},
        ("i8", "comfy", "int7", "comfy_quant", ""),
        "ComfyUI has no format 'int7' (it has: float8_e4m3fn, float8_e5m2, int8_tensorwise, mxfp8, "
        "nvfp4, convrot_w4a4, asym_w4a8_int8, awq_w4a16)",
        "comfy_format",
    ),
    "a format of a node": (
        {"l.weight": FP8, "l.weight_scale": ROWS,
         "l.comfy_quant": said(format="float8_e4m3fn_rowwise")},
        {},
        ("fp8_e4m3_rowwise", "comfy", "float8_e4m3fn_rowwise", "comfy_quant", "weight_scale"),
        "needs the node ComfyUI-QuantOps", "comfy_format",
    ),
    "stale params": (
        {"l.weight": I8, "l.weight_scale": ROWS,
         "l.comfy_quant": said(format="int8_tensorwise", convrot=False, params={"convrot": True})},
        {},
        ("int8_rowwise", "comfy", "int8_tensorwise", "comfy_quant", "weight_scale"),
        "and, in its params, True; the first is followed", "comfy_params",
    ),
    "fp8 by Black Forest Labs": (
        {"l.weight": FP8, "l.weight_scale": ROWS}, {},
        ("fp8_e4m3_rowwise", "bfl", "", "", "weight_scale"), "", "unmarked",
    ),
    "nvfp4 by Black Forest Labs": (
        {"l.weight": ("U8", np.zeros((4, 16), np.uint8)),
         "l.weight_scale": ("F8_E4M3", np.zeros((4, 2), np.uint8)),
         "l.weight_scale_2": ONE, "l.input_scale": ONE},
        {},
        ("nvfp4 (low nibble first)", "bfl", "", "", "weight_scale"),
        "low nibble first, scales by rows", "nvfp4_order",
    ),
    "nvfp4 by nobody": (
        {"l.weight": ("U8", np.zeros((4, 16), np.uint8)),
         "l.weight_scale": ("F8_E4M3", np.zeros((4, 2), np.uint8)), "l.weight_scale_2": ONE},
        {},
        ("u8", "bfl", "", "", ""), "which nibble comes first cannot be told", "nvfp4_order",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_dialect_scale_and_oddities_are_said(command, tmp_path, name):
    tensors, metadata, expected, warning, rule = FILES[name]
    path = write(tmp_path / "a.safetensors", tensors, metadata)
    ran = command("inspect", "--json", path)
    assert ran.code == 0
    (file,) = ran.result["files"]
    row = file["encodings"][0]
    assert set(row) == FIELDS
    assert tuple(row[key] for key in ("format", "dialect", "called", "marker", "scale")) == expected
    assert (row["weights"], row["part"]) == (1, "")
    assert row["example"].endswith("l.weight")
    assert row["readable"] == (row["format"] not in ("i8", "u8"))
    assert file["warnings"] == [line.removeprefix(f"{path}: ") for line in ran.json["warnings"]]
    assert bool(file["warnings"]) == bool(warning)
    assert not warning or any(warning in line for line in file["warnings"])
    shown = command("inspect", path)
    for text in filter(None, expected):
        assert text in shown.out
    assert ("(cannot be read)" in shown.out) == (not row["readable"])
    assert warning in shown.err
    (audit,) = command("inspect", "--audit", "--json", path).json["result"]["audits"]
    assert rule in (*audit["counts"], "")
    assert not {"scaled_fp8", "bare_fp8", "nvfp4_order", "comfy_params"} - {rule} & set(
        audit["counts"]
    )


def test_layers_that_are_packed_alike_are_one_line(command, tmp_path):
    tensors = {}
    for index in range(300):
        tensors |= {f"b.{index}.weight": FP8, f"b.{index}.weight_scale": SHORT}
        tensors[f"b.{index}.comfy_quant"] = said(format="float8_e4m3fn")
    path = write(tmp_path / "a.safetensors", tensors)
    ran = command("inspect", path)
    assert ran.err.count("\n") == 1
    assert "300 layers (b.0.weight_scale, b.1.weight_scale and 298 more): the scale is" in ran.err
    (file,) = command("inspect", "--json", path).result["files"]
    assert [row["weights"] for row in file["encodings"]] == [300]


def test_parts_and_blocks_of_gguf_are_named(command, gguf_file, examples):
    (file,) = command("inspect", "--json", gguf_file).result["files"]
    rows = {row["format"]: row for row in file["encodings"]}
    assert rows["q4_k"]["dialect"] == "gguf"
    assert rows["q4_k"]["part"] == "denoiser"
    plain = command("inspect", "--json", examples / "flux1-shapes").result["files"][0]
    assert plain["encodings"] == []


@pytest.mark.parametrize("name", ["comfy", "legacy", "nvfp4 by Black Forest Labs"])
def test_nothing_heavy_is_loaded(tmp_path, name):
    tensors, metadata, *_ = FILES[name]
    path = write(tmp_path / "a.safetensors", tensors, metadata)
    code = (
        "import sys; from diffquant.inspect.describe import describe; describe(sys.argv[1]);"
        "print([m for m in ('torch', 'numba', 'triton') if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"
