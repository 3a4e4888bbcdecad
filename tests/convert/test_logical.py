"""Companions folded into weights: every packing that is read, and markers that lie."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffquant.convert.binding import bind
from diffquant.core.dtypes import STORAGE
from diffquant.core.errors import MalformedFile, UnsupportedDtype
from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink, open_source
from diffquant.quant.codecs.fp8_e4m3 import e4m3_table
from diffquant.quant.codecs.nf4 import CODE

RNG = np.random.default_rng(5)
SCALE = np.array(0.25, np.float32)
UNREAD = ("Q8_1", "Q8_K", "Q1_0")
NF4 = "l.weight.quant_state.bitsandbytes__nf4"


def text(value):
    """JSON, or the text itself, as marker bytes."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return np.frombuffer(raw, np.uint8)


def fp8(shape=(6, 10)):
    """Random E4M3 bits, no NaN, and their values."""
    bits = RNG.integers(0, 0x7F, shape, dtype=np.uint8)
    return ("F8_E4M3", bits), e4m3_table()[bits]


def nf4(shape=(6, 10), **state):
    """A bitsandbytes layer and its values."""
    size = int(np.prod(shape))
    index = RNG.integers(0, 16, size + size % 2, dtype=np.uint8)
    absmax = RNG.random(-(-size // 64), np.float32) + np.float32(0.5)
    marker = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(shape)}
    tensors = {
        "l.weight": (index[::2] << 4 | index[1::2])[:, None],
        "l.weight.absmax": absmax,
        "l.weight.quant_map": CODE,
        NF4: text(marker | state),
    }
    return tensors, (CODE[index[:size]] * absmax.repeat(64)[:size]).reshape(shape)


def comfy(kind, weight, scale, **more):
    return {
        "l.weight": weight,
        "l.weight_scale": scale,
        "l.comfy_quant": text({"format": kind, **more}),
    }


@pytest.fixture
def bound(tmp_path, write):
    """Write tensors and bind them."""
    opened = []

    def make(tensors, metadata=None):
        source = open_source(write(tmp_path / "w.safetensors", tensors, metadata))
        opened.append(source)
        return bind(source)

    yield make
    for source in opened:
        source.close()


def check(logical, expected, fmt, consumed):
    tensor = logical.tensors["l.weight"]
    assert tensor.shape == expected.shape
    assert tensor.format == fmt
    assert tensor.is_float
    assert set(logical.consumed) == set(consumed)
    flat = expected.reshape(expected.shape[0], -1)
    assert np.array_equal(logical.read("l.weight"), flat)
    for start, stop in ((0, 1), (1, 4), (3, expected.shape[0]), (2, 2)):
        assert np.array_equal(logical.read("l.weight", (start, stop)), flat[start:stop])


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)])
def test_comfy_fp8_reads_one_scale_or_one_per_row(bound, shape):
    weight, values = fp8()
    scale = RNG.random(shape, np.float32) if shape else SCALE
    expected = values * scale.reshape(-1, 1)
    logical = bound(comfy("float8_e4m3fn", weight, scale))
    check(logical, expected, "fp8_e4m3_scaled", ["l.weight_scale", "l.comfy_quant"])
    assert logical.warnings == ()


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)])
def test_comfy_int8_reads_one_scale_or_one_per_row(bound, shape):
    weight = RNG.integers(-127, 128, (6, 10), dtype=np.int8)
    scale = RNG.random(shape, np.float32) if shape else SCALE
    expected = weight.astype(np.float32) * scale.reshape(-1, 1)
    logical = bound(comfy("int8_tensorwise", weight, scale))
    fmt = "int8_rowwise" if scale.size > 1 else "int8_tensor"
    check(logical, expected, fmt, ["l.weight_scale", "l.comfy_quant"])


@pytest.mark.parametrize("shape", [(6, 10), (8, 64), (7, 37), (5, 33), (130, 3), (70, 96)])
@pytest.mark.parametrize("flat", [False, True])
def test_nf4_rows_are_read_wherever_they_start_in_a_block(bound, shape, flat):
    tensors, expected = nf4(shape)
    companions = [key for key in tensors if key != "l.weight"]
    if flat:
        tensors["l.weight"] = tensors["l.weight"].reshape(-1)
    logical = bound(tensors)
    check(logical, expected, "nf4", companions)
    n = shape[0]
    for start in range(0, n, 7):
        for stop in (start + 1, n):
            rows = logical.read("l.weight", (start, stop))
            assert np.array_equal(rows, expected[start:stop])
    assert logical.tensors["l.weight"].decodes_to == "f16"
    assert logical.specs()["l.weight"].shape == shape


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
def test_legacy_scaled_fp8_reads_either_spelling(bound, name):
    weight, values = fp8()
    tensors = {
        "scaled_fp8": ("F8_E4M3", np.zeros(2, np.uint8)),
        "l.weight": weight,
        f"l.{name}": SCALE.reshape(1),
        "l.scale_input": np.ones(1, np.float32),
    }
    logical = bound(tensors)
    check(logical, values * SCALE, "fp8_e4m3_scaled", set(tensors) - {"l.weight"})
    odd = "its scale is called weight_scale under scaled_fp8: ComfyUI leaves the scale out"
    assert [odd in text for text in logical.warnings] == [True] * (name == "weight_scale")


def test_a_scale_without_a_marker_is_applied_and_said(bound):
    weight, values = fp8()
    logical = bound({"l.weight": weight, "l.scale_weight": SCALE})
    check(logical, values * SCALE, "fp8_e4m3_scaled", ["l.scale_weight"])
    assert logical.warnings == ("l.weight: scale without a marker; it is applied",)


def test_the_headers_quantization_metadata_marks_layers(bound):
    weight, values = fp8()
    header = json.dumps({"format_version": "1.0", "layers": {"l": {"format": "float8_e4m3fn"}}})
    logical = bound(
        {"l.weight": weight, "l.weight_scale": SCALE}, {"_quantization_metadata": header}
    )
    check(logical, values * SCALE, "fp8_e4m3_scaled", ["l.weight_scale"])


def test_plain_fp8_and_e5m2_are_read_without_a_scale(bound):
    weight, values = fp8()
    check(bound({"l.weight": weight}), values, "fp8_e4m3", [])
    bits = RNG.integers(0, 0x7C, (6, 10), dtype=np.uint8)
    expected = (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    logical = bound({"l.weight": ("F8_E5M2", bits)})
    check(logical, expected, "fp8_e5m2", [])
    assert logical.tensors["l.weight"].is_quantized


def test_e5m2_equals_torch(bound):
    torch = pytest.importorskip("torch")
    bits = np.arange(256, dtype=np.uint8).reshape(4, 64)
    expected = torch.from_numpy(bits).view(torch.float8_e5m2).float().numpy()
    found = bound({"l.weight": ("F8_E5M2", bits)}).read("l.weight")
    assert np.array_equal(found, expected, equal_nan=True)


def test_f64_is_read_and_is_not_quantized(bound):
    weight = RNG.standard_normal((6, 10))
    logical = bound({"l.weight": weight})
    check(logical, weight.astype(np.float32), "", [])
    assert not logical.tensors["l.weight"].is_quantized


def test_integers_are_no_floats(bound):
    logical = bound({"ids": np.arange(4)})
    assert not logical.tensors["ids"].is_float
    with pytest.raises(UnsupportedDtype, match="ids: cannot decode I64"):
        logical.read("ids")


@pytest.mark.parametrize(
    "name",
    [row.name for row in STORAGE.values() if row.is_block and row.name not in UNREAD],
)
def test_ggml_blocks_equal_gguf_py(tmp_path, write, name):
    gguf = pytest.importorskip("gguf")
    row = STORAGE[name]
    packed = RNG.integers(0, 60, (6, 512 // row.block_size * row.block_nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(packed, gguf.GGMLQuantizationType(row.ggml_id))
    path = write(
        tmp_path / "w.gguf",
        {"l.weight": (name, packed, (6, 512))},
        {"general.architecture": "flux"},
    )
    with open_source(path) as source:
        logical = bind(source)
        tensor = logical.tensors["l.weight"]
        assert tensor.is_quantized
        assert tensor.is_float
        assert tensor.spec.dtype == "F32"
        assert np.array_equal(logical.read("l.weight"), expected)
        assert np.array_equal(logical.read("l.weight", (2, 5)), expected[2:5])


@pytest.mark.parametrize("name", UNREAD)
def test_ggml_blocks_that_nobody_decodes_are_refused_by_name(tmp_path, write, name):
    row = STORAGE[name]
    packed = np.zeros((6, 512 // row.block_size * row.block_nbytes), np.uint8)
    path = write(
        tmp_path / "w.gguf",
        {"l.weight": (name, packed, (6, 512))},
        {"general.architecture": "flux"},
    )
    with open_source(path) as source:
        logical = bind(source)
        tensor = logical.tensors["l.weight"]
        assert tensor.is_quantized
        assert not tensor.is_float
        with pytest.raises(UnsupportedDtype, match=f"l.weight: blocks of {name} are not"):
            logical.read("l.weight")


def test_vectors_and_scalars_are_one_row(bound):
    vector = RNG.standard_normal(7).astype(np.float32)
    logical = bound({"v": vector, "s": np.array(3, np.float16)})
    assert np.array_equal(logical.read("v"), vector[None])
    assert logical.read("s") == np.ones((1, 1)) * 3


@pytest.mark.parametrize(
    "marker",
    [
        {"format": "svdquant_w4a4"},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 1024},
        {"format": "asym_w4a8_int8", "group_size": 8},
        {"format": "made_up"},
    ],
)
def test_unknown_comfy_formats_are_named_when_read(bound, marker):
    tensors = comfy("", np.zeros((6, 10), np.int8), SCALE)
    tensors["l.comfy_quant"] = text(marker)
    tensors["l.weight_scale_2"] = SCALE
    logical = bound(tensors)
    tensor = logical.tensors["l.weight"]
    assert tensor.is_quantized
    assert not tensor.is_float
    assert json.dumps(marker) in tensor.why
    assert set(logical.tensors) == {"l.weight"}
    with pytest.raises(UnsupportedDtype, match=r"l\.weight: comfy_quant .*not supported"):
        logical.read("l.weight")


def good_fp8():
    return comfy("float8_e4m3fn", fp8()[0], SCALE)


def good_nf4():
    return nf4()[0]


STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [6, 10]}
LIES = {
    "marker not JSON": (good_fp8, {"l.comfy_quant": text(b"{nope")}, r"l\.comfy_quant: not JSON"),
    "marker not text": (good_fp8, {"l.comfy_quant": text(b"\xff\xfe\x00")}, "not JSON"),
    "marker nested too deep": (good_fp8, {"l.comfy_quant": text(b"[" * 4000)}, "not JSON"),
    "marker a list": (good_fp8, {"l.comfy_quant": text([1])}, "expected a JSON object"),
    "marker too large": (
        good_fp8,
        {"l.comfy_quant": text(b" " * 5000)},
        r"l\.comfy_quant: expected at most 4096 bytes of JSON, found U8 \(5000,\)",
    ),
    "marker of floats": (good_fp8, {"l.comfy_quant": SCALE.reshape(1)}, "found F32"),
    "scale in whole numbers": (
        good_fp8,
        {"l.weight_scale": ("I8", np.zeros(1, np.int8))},
        r"l\.weight_scale: expected F32 with 1 or 6 values, found I8 \(1,\)",
    ),
    "scale of wrong count": (
        good_fp8,
        {"l.weight_scale": np.ones(5, np.float32)},
        r"l\.weight_scale: expected F32 with 1 or 6 values, found F32 \(5,\)",
    ),
    "empty scale": (good_fp8, {"l.weight_scale": np.ones(0, np.float32)}, r"l\.weight_scale"),
    "fp8 marker on floats": (
        good_fp8,
        {"l.weight": np.zeros((6, 10), np.float16)},
        r"l\.weight: float8_e4m3fn needs F8_E4M3 .*found F16",
    ),
    "int8 marker on fp8": (
        good_fp8,
        {"l.comfy_quant": text({"format": "int8_tensorwise"})},
        r"l\.weight: int8_tensorwise needs I8 .*found F8_E4M3",
    ),
    "marker on a vector": (
        good_fp8,
        {"l.weight": ("F8_E4M3", np.zeros(6, np.uint8))},
        "2 or more dimensions",
    ),
    "state not JSON": (good_nf4, {NF4: text(b"nope")}, "quant_state.*not JSON"),
    "state without shape": (good_nf4, {NF4: text({"quant_type": "nf4"})}, "no usable shape"),
    "state with odd shape": (
        good_nf4,
        {NF4: text({"quant_type": "nf4", "blocksize": 64, "shape": [6, -10]})},
        "no usable shape",
    ),
    "state with text for shape": (
        good_nf4,
        {NF4: text({"quant_type": "nf4", "blocksize": 64, "shape": "6x10"})},
        "no usable shape",
    ),
    "state with yes for shape": (
        good_nf4,
        {NF4: text({"quant_type": "nf4", "blocksize": 64, "shape": [True, 60]})},
        "no usable shape",
    ),
    "state of a larger weight": (
        good_nf4,
        {NF4: text(STATE | {"shape": [10**9, 10**9]})},
        r"l\.weight: expected 500000000000000000 of bytes for .*, found U8",
    ),
    "too few scales": (
        good_nf4,
        {"l.weight.absmax": np.ones(0, np.float32)},
        r"l\.weight\.absmax: expected 1 of F32 for \[6, 10\] in blocks of 64, found F32 \(0,\)",
    ),
    "packed as floats": (good_nf4, {"l.weight": np.ones(30, np.float32)}, "expected 30 of bytes"),
    "state of another kind": (
        good_nf4,
        {NF4: text(STATE | {"quant_type": "fp4"})},
        "quant_type nf4",
    ),
    "block of 60": (
        good_nf4,
        {NF4: text(STATE | {"blocksize": 60})},
        "expected blocksize 32 or 64",
    ),
    "block of truth": (good_nf4, {NF4: text(STATE | {"blocksize": True})}, "expected blocksize"),
    "decodes to int": (good_nf4, {NF4: text(STATE | {"dtype": "int8"})}, "expected dtype float32"),
    "nested without codes": (
        good_nf4,
        {NF4: text(STATE | {"nested_blocksize": 256, "nested_offset": 0.1})},
        r"absmax: expected 1 of U8",
    ),
    "nested without offset": (
        good_nf4,
        {NF4: text(STATE | {"nested_blocksize": 256})},
        "nested_blocksize and nested_offset, found 256 and None",
    ),
    "offset not a number": (
        good_nf4,
        {
            NF4: text(json.dumps(STATE | {"nested_blocksize": 1, "nested_offset": 1e999}).encode()),
        },
        "nested_offset is inf",
    ),
    "two states": (
        good_nf4,
        {NF4.replace("nf4", "fp4"): text(STATE | {"quant_type": "fp4"})},
        "2 quant states, expected one",
    ),
    "SCB of other rows": (
        lambda: {"l.weight": np.ones((2, 4), np.int8), "l.SCB": np.ones(2, np.float32)},
        {"l.SCB": np.ones(3, np.float32)},
        r"l\.SCB: expected F32 with 2 values, found F32 \(3,\)",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_markers_that_contradict_their_tensors_are_malformed(bound, tmp_path, name):
    good, lie, message = LIES[name]
    assert bound(good()).tensors["l.weight"].is_float
    with pytest.raises(MalformedFile, match=message) as error:
        bound(good() | lie)
    assert str(tmp_path / "w.safetensors") in str(error.value)


@pytest.mark.parametrize("header", ["{", "[]", '{"layers": 3}', '{"layers": []}', "[" * 10**5])
def test_a_damaged_quantization_header_is_malformed(bound, header):
    with pytest.raises(MalformedFile, match="_quantization_metadata"):
        bound({"l.weight": fp8()[0]}, {"_quantization_metadata": header})


def test_a_marker_without_its_weight_is_left_over(bound):
    logical = bound({"l.comfy_quant": text({"format": "float8_e4m3fn"}), "m.bias": SCALE})
    assert set(logical.tensors) == {"l.comfy_quant", "m.bias"}


def test_a_weight_that_lost_its_scale_is_named_when_read(bound):
    tensors = good_fp8()
    del tensors["l.weight_scale"]
    with pytest.raises(UnsupportedDtype, match=r"l\.weight"):
        bound(tensors).read("l.weight")


def test_a_vector_of_blocks_is_one_row(tmp_path):
    """GGUF allows it, and such a tensor has no rows to read."""
    block = np.concatenate([np.array([1], "<f2").view(np.uint8), np.arange(32, dtype=np.uint8)])
    path = tmp_path / "a.gguf"
    with open_sink(path, [TensorSpec("v", "Q8_0", (64,))], {"general.architecture": "x"}) as sink:
        sink.write("v", 0, np.tile(block, 2))
        sink.commit()
    with open_source(path) as source:
        values = bind(source).read("v")
    assert values.shape == (1, 64)
    assert values[0].tolist() == [*range(32), *range(32)]
