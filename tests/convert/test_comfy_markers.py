"""ComfyUI files as writers really leave them: every trap is read right, with a warning."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffquant.convert.binding import bind
from diffquant.convert.dialects import pack
from diffquant.core.errors import MalformedFile
from diffquant.io import open_source
from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS

WEIGHT = np.random.default_rng(3).standard_normal((32, 256)).astype(np.float32)


def layer(fmt, prefix="l"):
    """Tensors of one packed layer, and what they decode to."""
    row, out = FORMATS[fmt], {}
    stats = backend(row.codec, "reduce")(WEIGHT, fmt=fmt) if row.passes == 2 else None
    parts = backend(row.codec, "encode")(WEIGHT, stats, fmt=fmt)
    for one in pack("comfy", f"{prefix}.weight", fmt, WEIGHT.shape, "bf16"):
        out[one.spec.key] = (
            one.spec.dtype,
            one.data(parts[one.part] if one.part else None),
            one.spec.shape,
        )
    return out, backend(row.codec, "decode")(parts, WEIGHT.shape, fmt=fmt)


def marker(fields):
    data = np.frombuffer(json.dumps(fields).encode(), np.uint8)
    return "U8", data, data.shape


@pytest.fixture
def read(tmp_path, write):
    """Bind a file of these tensors: (logical tensor, decoded, warnings)."""

    def of(tensors, metadata=None, key="l.weight"):
        path = write(tmp_path / "w.safetensors", tensors, metadata or {})
        with open_source(path) as source:
            logical = bind(source)
            return logical.tensors[key], logical.read(key), logical.warnings

    return of


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("fmt", ["int8_rowwise", "fp8_e4m3_scaled"])
def test_a_scale_of_16_bits_is_read_and_named(read, fmt, dtype):
    tensors, decoded = layer(fmt)
    _, data, shape = tensors["l.weight_scale"]
    scale = data.view("<f4")
    half = scale.astype(np.float16)
    short = half if dtype == "F16" else (scale.view(np.uint32) >> 16).astype(np.uint16)
    tensors["l.weight_scale"] = (dtype, short, shape)
    tensor, found, warnings = read(tensors)
    assert tensor.format == fmt
    np.testing.assert_allclose(found, decoded, rtol=2.0**-7 if dtype == "BF16" else 2.0**-10)
    assert len(warnings) == 1
    assert f"l.weight_scale: the scale is {dtype}" in warnings[0]


@pytest.mark.parametrize(
    ("fmt", "fields"),
    [
        ("int8_rowwise", {}),
        ("int8_rowwise", {"per_row": True, "convrot": False}),
        ("int8_convrot", {"convrot": True, "convrot_groupsize": 256, "per_row": True}),
        ("fp8_e4m3_scaled", {"full_precision_matrix_mult": True}),
        ("fp8_e5m2_scaled", {"format": None}),
    ],
)
def test_a_marker_without_a_format_is_told_by_its_tensors(read, fmt, fields):
    tensors, decoded = layer(fmt)
    tensors["l.comfy_quant"] = marker(fields)
    tensor, found, warnings = read(tensors)
    assert tensor.format == fmt
    assert np.array_equal(found, decoded)
    assert len(warnings) == 1
    assert "names no format" in warnings[0]


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "net."])
def test_header_names_without_the_prefix_are_matched(read, prefix):
    tensors, decoded = layer("fp8_e4m3_scaled", f"{prefix}l")
    del tensors[f"{prefix}l.comfy_quant"]
    text = json.dumps({"format_version": "1.0", "layers": {"l": {"format": "float8_e4m3fn"}}})
    tensor, found, warnings = read(
        tensors, {"_quantization_metadata": text}, key=f"{prefix}l.weight"
    )
    assert (tensor.format, tensor.dialect) == ("fp8_e4m3_scaled", "comfy")
    assert np.array_equal(found, decoded)
    assert len(warnings) == 1
    assert "without the prefix" in warnings[0]


def test_a_header_name_that_fits_two_layers_is_refused(read):
    tensors = layer("fp8_e4m3_scaled", "model.l")[0] | layer("fp8_e4m3_scaled", "net.l")[0]
    text = json.dumps({"layers": {"l": {"format": "float8_e4m3fn"}}})
    with pytest.raises(MalformedFile, match=r"'l' may be model\.l or net\.l"):
        read(tensors, {"_quantization_metadata": text}, key="net.l.weight")


def test_what_stands_outside_params_goes_before_what_is_in_them(read):
    tensors, decoded = layer("int8_convrot_64")
    fields = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    tensors["l.comfy_quant"] = marker({**fields, "params": {"convrot_groupsize": 256}})
    tensor, found, warnings = read(tensors)
    assert tensor.format == "int8_convrot_64"
    assert np.array_equal(found, decoded)
    assert "convrot_groupsize 64 and, in its params, 256" in warnings[0]


def test_params_alone_are_followed(read):
    tensors, decoded = layer("int8_convrot_16")
    nested = {"convrot": True, "convrot_groupsize": 16}
    tensors["l.comfy_quant"] = marker({"format": "int8_tensorwise", "params": nested})
    tensor, found, warnings = read(tensors)
    assert tensor.format == "int8_convrot_16"
    assert np.array_equal(found, decoded)
    assert warnings == ()


def test_a_rotation_without_its_size_is_one_of_256(read):
    tensors, decoded = layer("int8_convrot")
    tensors["l.comfy_quant"] = marker({"format": "int8_tensorwise", "convrot": True})
    tensor, found, _ = read(tensors)
    assert tensor.format == "int8_convrot"
    assert np.array_equal(found, decoded)


def test_a_group_that_does_not_divide_the_rows_is_refused(read):
    tensors, _ = layer("int8_convrot_16")
    narrow = np.ascontiguousarray(WEIGHT[:, :80])
    parts = backend("int8_convrot", "encode")(narrow, fmt="int8_convrot_16")
    tensors["l.weight"] = ("I8", parts["weight"], (32, 80))
    tensors["l.comfy_quant"] = marker({"format": "int8_tensorwise", "convrot": True})
    with pytest.raises(MalformedFile, match=r"row length divisible by 256, found \(32, 80\)"):
        read(tensors)


@pytest.mark.parametrize("part", ["weight_s_rel", "weight_s_channel", "weight_codebook"])
def test_w4a8_parts_of_the_wrong_size_are_refused(read, part):
    tensors, _ = layer("asym_w4a8_int8")
    dtype, data, shape = tensors[f"l.{part}"]
    tensors[f"l.{part}"] = (dtype, data[: len(data) // 2], (shape[0] // 2, *shape[1:]))
    with pytest.raises(MalformedFile, match=f"l.{part}: expected"):
        read(tensors)


@pytest.mark.oracle
def test_six_bits_decode_as_comfy_kitchen_decodes_them(read):
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("comfy_kitchen.backends.eager.w4a8_int8")
    packed, step, channel, _, _ = module.quantize_w4a8_int8_weight(
        torch.from_numpy(WEIGHT.copy()), bits=6
    )
    expected = module.dequantize_w4a8_int8_weight(
        packed, step, channel, output_dtype=torch.float32
    ).numpy()
    tensors = {
        "l.weight": packed.numpy(),
        "l.weight_s_rel": ("F8_E4M3", step.view(torch.uint8).numpy(), tuple(step.shape)),
        "l.weight_s_channel": channel.numpy(),
        "l.comfy_quant": marker({"format": "asym_w4a8_int8", "group_size": 16}),
    }
    tensor, found, _ = read(tensors)
    assert (tensor.format, tensor.foreign, tensor.shape) == ("", "w6a8", WEIGHT.shape)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.oracle
@pytest.mark.parametrize("spelling", ["weight_zeros", "weight_zero"])
def test_awq_decodes_as_comfy_kitchen_decodes_it(read, spelling):
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("comfy_kitchen.tensor.awq_w4a16")
    layout = module.TensorCoreAWQW4A16Layout
    generator = torch.Generator().manual_seed(1)
    packed = torch.randint(-128, 128, (32, 128), generator=generator).to(torch.int8)
    scale, zeros = (torch.rand(4, 32, generator=generator) for _ in range(2))
    params = layout.Params(
        scale=scale, zeros=zeros, orig_dtype=torch.float32, orig_shape=(32, 256), group_size=64
    )
    expected = layout.dequantize(packed, params).numpy()
    tensors = {
        "l.weight": packed.numpy(),
        "l.weight_scale": scale.numpy(),
        f"l.{spelling}": zeros.numpy(),
        "l.comfy_quant": marker({"format": "awq_w4a16", "group_size": 64}),
    }
    tensor, found, _ = read(tensors)
    assert (tensor.foreign, tensor.shape) == ("awq_w4a16", (32, 256))
    assert np.array_equal(found, expected)
