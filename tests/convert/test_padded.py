"""Padded weights with scales in tiles: their own shape is found, sizes that lie are refused."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from diffquant.convert.binding import bind
from diffquant.convert.dialects import pack
from diffquant.convert.jobs import run_job
from diffquant.convert.request import Request
from diffquant.convert.targets import TARGETS
from diffquant.core.errors import MalformedFile, UnsupportedDtype
from diffquant.io import open_source
from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import type_named

NAMES = ("mxfp8", "nvfp4_comfy")
SAID = {"mxfp8": "mxfp8", "nvfp4_comfy": "nvfp4"}


def parts_of(name, shape):
    weight = np.random.default_rng(3).standard_normal(shape, np.float32)
    row = FORMATS[name]
    stats = backend(row.codec, "reduce")(weight, fmt=name) if row.passes == 2 else None
    parts = backend(row.codec, "encode")(weight, stats, fmt=name)
    return parts, backend(row.codec, "decode")(parts, shape, fmt=name)


def layer(name, shape, marker=None):
    """Tensors as ComfyUI keeps them, and the decoded weight."""
    parts, decoded = parts_of(name, shape)
    tensors = {}
    for one in pack("comfy", "l.weight", name, shape, "bf16"):
        data = parts[one.part] if one.part else np.frombuffer(one.constant, np.uint8)
        tensors[one.spec.key] = (one.spec.dtype, data, one.spec.shape)
    if marker is not None:
        raw = np.frombuffer(json.dumps(marker).encode(), np.uint8)
        tensors["l.comfy_quant"] = ("U8", raw, raw.shape)
    return tensors, decoded


@pytest.fixture
def bound(tmp_path, write):
    opened = []

    def make(tensors, metadata=None):
        source = open_source(write(tmp_path / "w.safetensors", tensors, metadata))
        opened.append(source)
        return bind(source)

    yield make
    for source in opened:
        source.close()


def test_the_marker_keeps_the_shape_only_where_there_is_padding():
    for name, whole in (("mxfp8", (64, 96)), ("nvfp4_comfy", (16, 48))):
        *_, marker = pack("comfy", "l.weight", name, whole, "bf16")
        assert json.loads(marker.constant) == {"format": SAID[name]}
        for shape in ((whole[0] + 1, whole[1]), (whole[0], whole[1] - 1)):
            *_, marker = pack("comfy", "l.weight", name, shape, "bf16")
            assert json.loads(marker.constant) == {
                "format": SAID[name],
                "orig_shape": list(shape),
            }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(200, 512), (33, 47), (300, 20), (1, 16)])
def test_any_rows_are_read_from_whole_tiles(bound, name, shape):
    tensors, decoded = layer(name, shape)
    logical = bound(tensors)
    assert logical.tensors["l.weight"].shape == shape
    assert logical.specs()["l.weight"].shape == shape
    for start, stop in ((0, 1), (0, shape[0]), (shape[0] - 1, shape[0]), (shape[0] // 2, shape[0])):
        assert np.array_equal(logical.read("l.weight", (start, stop)), decoded[start:stop])


@pytest.mark.parametrize("name", NAMES)
def test_without_a_marked_shape_rows_are_those_of_the_bias(bound, name):
    tensors, decoded = layer(name, (201, 64), marker={"format": SAID[name]})
    stored = 224 if name == "mxfp8" else 208
    assert bound(tensors).tensors["l.weight"].shape == (stored, 64)
    logical = bound({**tensors, "l.bias": np.zeros(201, np.float32)})
    assert logical.tensors["l.weight"].shape == (201, 64)
    assert np.array_equal(logical.read("l.weight"), decoded)
    logical = bound({**tensors, "l.bias": np.zeros(7, np.float32)})  # some other bias
    assert logical.tensors["l.weight"].shape == (stored, 64)


@pytest.mark.parametrize("name", NAMES)
def test_the_header_marks_layers_under_their_whole_name(bound, name):
    tensors, decoded = layer(name, (32, 64))
    del tensors["l.comfy_quant"]
    layers = {"l": {"format": SAID[name]}}
    header = json.dumps({"format_version": "1.0", "layers": layers})
    logical = bound(tensors, {"_quantization_metadata": header})
    assert np.array_equal(logical.read("l.weight"), decoded)


def test_exponents_are_read_under_either_dtype(bound):
    tensors, decoded = layer("mxfp8", (32, 64))
    _, data, shape = tensors["l.weight_scale"]
    tensors["l.weight_scale"] = ("F8_E8M0", data, shape)
    assert np.array_equal(bound(tensors).read("l.weight"), decoded)


@pytest.mark.parametrize("name", NAMES)
def test_input_scales_are_set_aside_and_smoothing_is_refused(bound, name):
    tensors, decoded = layer(name, (32, 64))
    tensors["l.input_scale"] = np.ones((), np.float32)
    logical = bound(tensors)
    assert "l.input_scale" in logical.consumed
    assert np.array_equal(logical.read("l.weight"), decoded)
    logical = bound({**tensors, "l.pre_quant_scale": np.ones(64, np.float32)})
    assert set(logical.tensors) == {"l.weight"}
    with pytest.raises(UnsupportedDtype, match="with pre_quant_scale is not supported"):
        logical.read("l.weight")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "given", [[33, 48], [32, 64, 1], "32x64", [True, 64], [0, 64], [-32, 64], [10**12, 64]]
)
def test_a_shape_that_the_padding_contradicts_is_refused(bound, name, given):
    tensors, _ = layer(name, (32, 64), marker={"format": SAID[name], "orig_shape": given})
    with pytest.raises(MalformedFile, match=r"l\.weight: stored as .*not the padding of"):
        bound(tensors)


@pytest.mark.parametrize("name", NAMES)
def test_scales_that_are_no_whole_tiles_are_refused(bound, name):
    tensors, _ = layer(name, (32, 64))
    dtype, data, (rows, columns) = tensors["l.weight_scale"]
    assert (rows, columns) == (128, 4)
    plain = np.ascontiguousarray(data[:32])  # as a writer that does not swizzle leaves them
    tensors["l.weight_scale"] = (dtype, plain, plain.shape)
    with pytest.raises(MalformedFile, match=r"l\.weight_scale: expected .*\(128, 4\)"):
        bound(tensors)
    flat = data.reshape(-1)
    tensors["l.weight_scale"] = (dtype, flat, flat.shape)
    with pytest.raises(MalformedFile, match="weight_scale: expected"):
        bound(tensors)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_other_dtypes_and_dimensions_are_refused(bound, name):
    tensors, _ = layer(name, (32, 64))
    dtype, data, shape = tensors["l.weight"]
    with pytest.raises(MalformedFile, match=r"l\.weight: .*needs 2 dimensions"):
        bound({**tensors, "l.weight": (dtype, data, (shape[0], shape[1] // 2, 2))})
    with pytest.raises(MalformedFile, match=r"l\.weight: .*found I8"):
        bound({**tensors, "l.weight": ("I8", data, shape)})


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_layers_that_loaders_read_shapes_from_are_never_packed(examples, tmp_path, load, name):
    """A packed row is shorter than the layer's: dimensions would be read wrong."""
    out = tmp_path / "out.safetensors"
    run_job(examples / "flux1-shapes", out, Request("safetensors", type=type_named(name)))
    tensors, _ = load(out)
    packed = {key.removesuffix(".comfy_quant") for key in tensors if key.endswith(".comfy_quant")}
    assert packed
    for one in ("img_in", "txt_in", "vector_in.in_layer", "time_in.in_layer"):
        found = [key for key in tensors if key.endswith(f"{one}.weight")]
        assert found
        assert not {key.removesuffix(".weight") for key in found} & packed


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "fp8_e5m2_scaled", "int8_tensor"])
def test_a_file_converts_back_to_the_numbers_it_holds(examples, tmp_path, name):
    packed, plain = tmp_path / "packed.safetensors", tmp_path / "plain.safetensors"
    run_job(examples / "flux1-shapes", packed, Request("safetensors", type=type_named(name)))
    run_job(packed, plain, Request("safetensors", dtype="f32"))
    with open_source(packed) as one, open_source(plain) as other:
        before, after = bind(one), bind(other)
        assert before.tensors.keys() == after.tensors.keys()
        assert any(tensor.format == type_named(name).base for tensor in before.tensors.values())
        for key in before.tensors:
            assert np.array_equal(before.read(key), after.read(key)), key


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "kind"), [("mxfp8", "TensorCoreMXFP8Layout"), ("nvfp4_comfy", "TensorCoreNVFP4Layout")]
)
@pytest.mark.parametrize("shape", [(96, 256), (33, 47)])
def test_comfy_kitchen_decodes_what_we_write(tmp_path, write, name, kind, shape):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layout = getattr(pytest.importorskip("comfy_kitchen.tensor"), kind)
    load_file = pytest.importorskip("safetensors.torch").load_file
    tensors, decoded = layer(name, shape)
    found = load_file(write(tmp_path / "w.safetensors", tensors))
    given = {"orig_dtype": torch.float32, "orig_shape": shape}
    if name == "mxfp8":
        given["scale"] = found["l.weight_scale"].view(torch.float8_e8m0fnu)
    else:
        given |= {"scale": found["l.weight_scale_2"], "block_scale": found["l.weight_scale"]}
    params = layout.Params(**given)
    assert tuple(found["l.weight"].shape) == layout.get_storage_shape(shape)
    values = layout.dequantize(found["l.weight"], params)[: shape[0], : shape[1]]
    assert np.array_equal(values.numpy(), decoded)
    names = set(layout.state_dict_tensors(found["l.weight"], params))
    assert {f"l.weight{ending}" for ending in names} == set(found) - {"l.comfy_quant"}


@pytest.mark.parametrize("name", ["fp8_e4m3_blockwise", "int8_blockwise"])
def test_blocks_of_128_are_read_and_others_named(bound, name):
    tensors, decoded = layer(name, (256, 384))
    logical = bound(tensors)
    assert logical.tensors["l.weight"].format == name
    for rows in ((0, 256), (3, 130), (255, 256)):
        assert np.array_equal(logical.read("l.weight", rows), decoded[slice(*rows)])
    said = json.loads(bytes(tensors["l.comfy_quant"][1]))
    assert said["group_size"] == 128
    raw = np.frombuffer(json.dumps(said | {"group_size": 64}).encode(), np.uint8)
    logical = bound({**tensors, "l.comfy_quant": ("U8", raw, raw.shape)})
    with pytest.raises(UnsupportedDtype, match=r"group_size.*not supported"):
        logical.read("l.weight")


@pytest.mark.parametrize("name", ["fp8_e4m3_rowwise", "fp8_e4m3_blockwise", "int8_blockwise"])
def test_only_quantops_is_said_to_read_its_formats(name):
    reading = {key for key, row in TARGETS.items() if name in row.reads.get("safetensors", ())}
    assert reading == {"comfyui-quantops", "diffquant"}
