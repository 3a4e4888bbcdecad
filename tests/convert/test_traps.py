"""Low-bit files as they circulate: what lies in them is read right, said, and not passed on.

Small files from the demo checkpoint, written in the dialects of older and other programs, go
through whole jobs: what comes out is ComfyUI's current dialect with the same numbers.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffquant.convert.binding import bind
from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.core.errors import PolicyError
from diffquant.core.floats import float32_of
from diffquant.io import open_source
from diffquant.quant.types import type_named

MARK = ".comfy_quant"
ONE = np.ones(1, np.float32)


def text(value):
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def bf16(array):
    """The upper halves of float32 values."""
    return "BF16", (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16)


@pytest.fixture(scope="module")
def made(tmp_path_factory, examples, load):
    """A type's file of the demo checkpoint: key -> (dtype, bytes, shape)."""
    folder, found = tmp_path_factory.mktemp("made"), {}

    def of(name):
        if name not in found:
            path = folder / f"{name}.safetensors"
            made = Request("safetensors", type=type_named(name), parts=("denoiser",))
            run_job(examples / "flux1-shapes", path, made)
            tensors, _ = load(path)
            found[name] = {
                key: (dtype, data, shape) for key, (dtype, shape, data) in tensors.items()
            }
        return dict(found[name])

    return of


def legacy(tensors, marker, spelled="scale_weight"):
    """The same layers as older ComfyUI wrote them."""
    out = {"scaled_fp8": marker} if marker is not None else {}
    for key, value in tensors.items():
        if not key.endswith(MARK):
            out[key.replace("weight_scale", spelled)] = value
    return out


def layers_of(tensors):
    return [key.removesuffix(MARK) for key in tensors if key.endswith(MARK)]


def numbers(path):
    """Every weight, decoded, and the warnings of reading it."""
    with open_source(path) as source:
        logical = bind(source)
        found = {key: logical.read(key) for key, one in logical.tensors.items() if one.is_float}
        return found, logical


def same(a, b):
    assert a.keys() == b.keys()
    for key, values in a.items():
        assert np.array_equal(values, b[key]), key


@pytest.fixture
def job(tmp_path, write):
    """Write tensors, convert them: (report, tensors and metadata of the output, warnings)."""

    def run(tensors, metadata=None, **asked):
        path, out = (
            write(tmp_path / "in.safetensors", tensors, metadata),
            tmp_path / "o.safetensors",
        )
        report = run_job(path, out, Request("safetensors", **asked), force=True)
        before, logical = numbers(path)
        after, again = numbers(out)
        if not asked:
            same(before, after)
            assert again.warnings == ()
        with open_source(out) as source:
            found = {key: (spec, np.array(source.read(key))) for key, spec in source.specs.items()}
        return report, found, logical

    return run


def marker_of(found, layer):
    return json.loads(bytes(found[layer + MARK][1]))


EMPTY, PAIR = np.zeros(0, np.uint8), np.zeros(2, np.uint8)


@pytest.mark.parametrize(
    ("kind", "marker", "full", "odd"),
    [
        ("fp8_scaled", ("F8_E4M3", EMPTY), False, ""),
        ("fp8_scaled", ("F8_E4M3", PAIR), True, ""),
        ("fp8_scaled", np.zeros(0, np.float32), False, ""),  # float32 stands for e4m3fn
        ("fp8_scaled", np.zeros(2, np.float32), True, ""),
        ("fp8_scaled", ("F8_E5M2", PAIR), True, "scaled_fp8 says F8_E5M2; the weight is believed"),
        ("fp8_e5m2_scaled", ("F8_E5M2", EMPTY), False, "labels every weight float8_e4m3fn"),
        ("fp8_e5m2_scaled", ("F8_E4M3", EMPTY), False, "says F8_E4M3; the weight is believed"),
    ],
)
def test_legacy_files_become_current_ones(made, job, kind, marker, full, odd):
    tensors = made(kind)
    layers = layers_of(tensors)
    report, found, logical = job(legacy(tensors, marker))
    called = "float8_e5m2" if "e5m2" in kind else "float8_e4m3fn"
    expected = {"format": called} | ({"full_precision_matrix_mult": True} if full else {})
    assert layers_of(found) == layers
    assert all(marker_of(found, layer) == expected for layer in layers)
    assert not [key for key in found if "scale_weight" in key or key.endswith("scaled_fp8")]
    for layer in layers:
        one = logical.tensors[f"{layer}.weight"]
        assert (one.dialect, one.marked, one.called) == ("scaled_fp8", "scaled_fp8", called)
    assert (
        any(odd in line and f"{len(layers)} layers" in line for line in report.warnings) or not odd
    )
    assert bool(logical.warnings) == bool(odd)


def test_the_scale_is_not_forgotten_under_either_spelling(made, job):
    """An fp8 weight without its scale is noise, and nothing would say so."""
    tensors = made("fp8_scaled")
    layer = layers_of(tensors)[0]
    for spelled in ("scale_weight", "weight_scale"):
        _, _, logical = job(legacy(tensors, ("F8_E4M3", EMPTY), spelled))
        scale = tensors[f"{layer}.weight_scale"][1].view("<f4")[0]
        values = logical.source.specs[f"{layer}.weight"]
        assert values.dtype == "F8_E4M3"
        assert logical.tensors[f"{layer}.weight"].format == "fp8_e4m3_scaled"
        assert scale != 1
        warned = any("ComfyUI leaves the scale out" in line for line in logical.warnings)
        assert warned == (spelled == "weight_scale")


def test_a_header_goes_before_the_legacy_marker(made, job):
    """ComfyUI looks at the marker only where there is no header: its numel then means nothing."""
    tensors = made("fp8_scaled")
    layers = layers_of(tensors)
    old = legacy(tensors, ("F8_E4M3", PAIR))
    for layer in layers[1:]:
        old[f"{layer}.weight_scale"] = old.pop(f"{layer}.scale_weight")
    header = {"layers": {layer: {"format": "float8_e4m3fn"} for layer in layers[:-1]}}
    report, found, logical = job(old, {"_quantization_metadata": json.dumps(header)})
    for layer in layers[:-1]:
        one = logical.tensors[f"{layer}.weight"]
        assert (one.dialect, one.marked, dict(one.notes)) == ("comfy", "_quantization_metadata", {})
        assert marker_of(found, layer) == {"format": "float8_e4m3fn"}
    assert any(f"{layers[0]}: its scale is called scale_weight" in line for line in report.warnings)
    assert any(
        f"{layers[-1]}.weight: scaled_fp8 marks it and _quantization_metadata does not" in line
        for line in report.warnings
    )


def test_a_header_goes_before_a_marker_tensor_that_says_otherwise(made, job):
    tensors = made("fp8_scaled")
    layer = layers_of(tensors)[0]
    tensors[layer + MARK] = text({"format": "int8_tensorwise"})
    header = {"layers": {layer: {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}}}
    report, found, _ = job(tensors, {"_quantization_metadata": json.dumps(header)})
    assert marker_of(found, layer) == header["layers"][layer]
    assert any("the header is followed, as by ComfyUI" in line for line in report.warnings)


def test_names_in_the_header_that_no_layer_has_are_said(made, job):
    tensors = made("fp8_scaled")
    header = {"layers": {"nowhere": {"format": "float8_e4m3fn"}}}
    report, _, _ = job(tensors, {"_quantization_metadata": json.dumps(header)})
    assert any("names 1 layers that are not there: nowhere" in line for line in report.warnings)


@pytest.mark.parametrize("kind", ["fp8_scaled", "int8_rowwise", "nvfp4", "fp8_e4m3_blockwise"])
def test_scales_of_16_bits_are_written_as_float32(made, job, kind):
    tensors = made(kind)
    short = [
        key for key, (dtype, *_) in tensors.items() if dtype == "F32" and "weight_scale" in key
    ]
    for key in short:
        _, data, shape = tensors[key]
        tensors[key] = (*bf16(data.view("<f4")), shape)
    report, found, _ = job(tensors)
    assert short
    for key in short:
        spec, data = found[key]
        assert spec.dtype == "F32"
        assert np.array_equal(data.view("<f4"), float32_of(tensors[key][1].view(np.uint8), "BF16"))
    assert any("the scale is BF16, which ComfyUI stops at" in line for line in report.warnings)
    assert sum("the scale is BF16" in line for line in report.warnings) == 1  # one line for all


def test_scales_of_inputs_are_carried_with_their_weights(made, job):
    tensors = made("fp8_scaled")
    layers = layers_of(tensors)
    old = legacy(tensors, ("F8_E4M3", EMPTY))
    old[f"{layers[0]}.scale_input"] = ONE  # means none
    old[f"{layers[1]}.scale_input"] = ONE / 4
    old[f"{layers[2]}.input_scale"] = np.array(0.5, np.float32)
    old[f"{layers[3]}.scale_input"] = (*bf16(ONE / 2), (1,))
    old[f"{layers[4]}.input_scale"] = np.ones(7, np.float32)
    report, found, _ = job(old)
    kept = {key: data.view("<f4").tolist() for key, (_, data) in found.items() if "input_sc" in key}
    assert kept == {
        f"{layers[1]}.input_scale": [0.25],
        f"{layers[2]}.input_scale": [0.5],
        f"{layers[3]}.input_scale": [0.5],
    }
    assert report.dropped == {
        f"{layers[0]}.scale_input": "scale of the layer's input is 1.0, which means none",
        f"{layers[4]}.input_scale": "no scale of an input: F32 (7,)",
    }
    report, found, _ = job(old, dtype="bf16")
    assert not [key for key in found if "input" in key and "scale" in key]
    assert "it goes with weights that are copied" in report.dropped[f"{layers[1]}.scale_input"]
    assert len(report.dropped) == 5


def test_an_input_scale_of_1_stays_where_its_name_is_the_current_one(made, job):
    tensors = made("fp8_scaled")
    layer = layers_of(tensors)[0]
    tensors[f"{layer}.input_scale"] = ONE
    report, found, _ = job(tensors)
    assert found[f"{layer}.input_scale"][1].view("<f4") == 1
    assert report.dropped == {}


def test_full_precision_is_kept_on_a_current_layer(made, job):
    tensors = made("int8_rowwise")
    layer = layers_of(tensors)[0]
    said = {"format": "int8_tensorwise", "full_precision_matrix_mult": True}
    tensors[layer + MARK] = text({**said, "comment": "x"})
    _, found, _ = job(tensors)
    assert marker_of(found, layer) == said


@pytest.mark.parametrize(
    ("kind", "said", "other"),
    [("fp8_scaled", {}, "int8_rowwise"), ("mxfp8", {"a": 1}, "fp8_scaled")],
)
def test_markers_without_a_format_are_completed(made, job, kind, said, other):
    tensors = made(kind)
    layers = layers_of(tensors)
    before = {layer: json.loads(bytes(tensors[layer + MARK][1].view(np.uint8))) for layer in layers}
    for layer in layers:
        kept = {key: value for key, value in before[layer].items() if key != "format"}
        tensors[layer + MARK] = text({**kept, **said})
    report, found, _ = job(tensors)
    assert all(marker_of(found, layer) == before[layer] for layer in layers)
    assert any("its marker names no format; taken for" in line for line in report.warnings)
    with pytest.raises(PolicyError, match="--allow-requantize"):
        job(tensors, type=type_named(other))


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"weight_scale_2": ONE}, {}),
        ({"weight_zeros": ONE}, {}),
        ({}, {"linear_dtype": "int4"}),
        ({"weight_scale": ("F8_E4M3", PAIR)}, {}),
    ],
)
def test_what_several_formats_could_be_is_not_guessed(tmp_path, write, beside, said):
    tensors = {"l.weight": np.zeros((2, 64), np.int8), "l.weight_scale": np.ones(2, np.float32)}
    tensors |= {f"l.{key}": value for key, value in beside.items()}
    path = write(tmp_path / "w.safetensors", tensors | {f"l{MARK}": text(said)})
    with open_source(path) as source:
        assert "is not supported" in bind(source).tensors["l.weight"].why
