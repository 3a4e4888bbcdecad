"""Black Forest Labs' files are decoded as diffusers decodes them; ModelOpt's as it packs them."""

from __future__ import annotations

import importlib
import json
import warnings

import numpy as np
import pytest

from diffquant.convert.binding import bind
from diffquant.core.errors import MalformedFile, UnsupportedDtype
from diffquant.io import open_source
from diffquant.quant.codecs.swizzle import swizzle

RNG = np.random.default_rng(11)
# (E4M3 bytes of 1, 1.5, 2 and -0.5 times a scale; nibbles of 0.5, 6 ... as diffusers packs them)
HEADER = {
    "quantization_config": json.dumps({"quant_algo": "NVFP4", "producer": {"name": "modelopt"}})
}


def peer():
    """The functions that define both layouts."""
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = pytest.importorskip("diffusers.quantizers.bfl.utils")
        # anew: a model loaded before may have imported it while torch's default device was meta
        return importlib.reload(peer)


def bits(tensor):
    """Bytes of an fp8 tensor."""
    import torch

    return ("F8_E4M3", tensor.view(torch.uint8).numpy(), tuple(tensor.shape))


def weight(shape):
    import torch

    values = torch.from_numpy(RNG.standard_normal(shape).astype(np.float32) * 0.05)
    values[1, :16] = 0
    return values


def nvfp4(shape, *, swizzled=False):
    """A layer as diffusers' own quantizer makes it, and what its decoder gives."""
    module = peer()
    packed, scale, whole = module.quantize_nvfp4(weight(shape))
    expected = module.dequantize_nvfp4(packed, scale, whole).numpy()
    scales = bits(scale)
    if swizzled:
        tiled = swizzle(scales[1])
        scales = ("F8_E4M3", tiled, tiled.shape)
    tensors = {
        "l.weight": packed.numpy(),
        "l.weight_scale": scales,
        "l.weight_scale_2": whole.numpy().reshape(()),
        "l.input_scale": np.array(0.5, np.float32),
    }
    return tensors, expected


def fp8r(shape):
    module = peer()
    packed, scale = module.quantize_fp8r(weight(shape))
    expected = module.dequantize_fp8r(packed, scale).numpy()
    return {"l.weight": bits(packed), "l.weight_scale": scale.numpy()}, expected


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


def check(logical, expected):
    """The weight alone is left, and rows are read from wherever they start."""
    assert list(logical.tensors) == ["l.weight"]
    assert logical.tensors["l.weight"].shape == expected.shape
    n = len(expected)
    for start, stop in ((0, n), (0, 1), (3, 7), (n - 2, n), (n // 2, n), (4, 4)):
        found = logical.read("l.weight", (start, stop))
        assert np.array_equal(found.view(np.uint32), expected[start:stop].view(np.uint32))


@pytest.mark.oracle
@pytest.mark.parametrize("shape", [(24, 64), (7, 48), (128, 64), (256, 128), (130, 320)])
def test_bfl_nvfp4_is_decoded_as_diffusers_decodes_it(bound, shape):
    tensors, expected = nvfp4(shape)
    logical = bound(tensors)
    check(logical, expected)
    tensor = logical.tensors["l.weight"]
    assert (tensor.format, tensor.dialect) == ("", "bfl")
    assert tensor.foreign == "nvfp4 (low nibble first)"
    assert len(logical.warnings) == 1
    assert "low nibble first, scales by rows" in logical.warnings[0]


@pytest.mark.oracle
@pytest.mark.parametrize("shape", [(24, 64), (7, 48), (128, 256)])
def test_bfl_fp8r_is_decoded_as_diffusers_decodes_it(bound, shape):
    tensors, expected = fp8r(shape)
    logical = bound(tensors)
    check(logical, expected)
    tensor = logical.tensors["l.weight"]
    assert (tensor.format, tensor.dialect) == ("fp8_e4m3_rowwise", "bfl")
    assert logical.warnings == ()


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("shape", "swizzled"), [((24, 64), False), ((24, 64), True), ((130, 320), True)]
)
def test_modelopt_is_told_by_the_header_and_its_scales_by_their_shape(bound, shape, swizzled):
    tensors, expected = nvfp4(shape, swizzled=swizzled)
    layers = {"l": {"format": "nvfp4"}}
    metadata = HEADER | {"_quantization_metadata": json.dumps({"layers": layers})}
    logical = bound(tensors, metadata)
    check(logical, expected)
    assert logical.tensors["l.weight"].dialect == "modelopt"
    assert "nvfp4 of ModelOpt by the header" in logical.warnings[0]


@pytest.mark.oracle
def test_modelopt_without_layer_names_has_scales_by_rows(bound):
    tensors, expected = nvfp4((128, 64))  # both layouts have one shape
    check(bound(tensors, HEADER), expected)


@pytest.mark.oracle
def test_comfy_markers_go_before_the_nibbles_of_bfl(bound):
    """The same bytes, marked: ComfyUI's order, which is another weight."""
    tensors, expected = nvfp4((128, 64))
    marker = np.frombuffer(json.dumps({"format": "nvfp4"}).encode(), np.uint8)
    logical = bound(tensors | {"l.comfy_quant": marker})
    assert logical.tensors["l.weight"].format == "nvfp4_comfy"
    assert not np.array_equal(logical.read("l.weight"), expected)


UNTOLD = {
    "no input scale": (lambda t: t.pop("l.input_scale"), None, "nvfp4 without a marker"),
    "scales in tiles": (
        lambda t: t.update(nvfp4((24, 64), swizzled=True)[0]), None, "its scales in tiles",
    ),
    "a marker elsewhere": (
        lambda t: t.update({"m.comfy_quant": np.frombuffer(b"{}", np.uint8)}), None,
        "nvfp4 without a marker",
    ),
    "smoothed": (
        lambda t: t.update({"l.pre_quant_scale": np.ones(64, np.float32)}), HEADER,
        "with pre_quant_scale",
    ),
    "either layout": (
        lambda t: t.update(nvfp4((128, 64))[0]),
        HEADER | {"_quantization_metadata": '{"layers": {}}'},
        "by rows or in tiles",
    ),
}  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize("name", UNTOLD)
def test_nvfp4_is_refused_where_nothing_tells_its_layout(bound, name):
    change, metadata, message = UNTOLD[name]
    tensors, _ = nvfp4((24, 64))
    change(tensors)
    logical = bound(tensors, metadata)
    assert not logical.tensors["l.weight"].is_float
    with pytest.raises(UnsupportedDtype, match=rf"l\.weight: .*{message}.*is not read"):
        logical.read("l.weight")


@pytest.mark.parametrize("text", ["{", "[]", '{"producer": "modelopt"}', "[" * 10**5, "3"])
def test_other_configs_in_a_header_do_not_name_modelopt(bound, text):
    plain = {"l.weight": np.zeros((4, 8), np.uint8)}
    assert bound(plain, {"quantization_config": text}).tensors["l.weight"].dialect == "plain"


LIES = {
    "scales of other rows": (
        {"l.weight_scale": ("F8_E4M3", np.zeros((23, 4), np.uint8))},
        "scale for",
    ),
    "two tensor scales": ({"l.weight_scale_2": np.ones(2, np.float32)}, "expected one F32"),
    "a tensor scale of integers": ({"l.weight_scale_2": np.ones(1, np.int8)}, "expected one F32"),
}


@pytest.mark.parametrize("name", LIES)
def test_sizes_that_do_not_belong_together_are_malformed(bound, name):
    lie, message = LIES[name]
    tensors = {
        "l.weight": np.zeros((24, 32), np.uint8),
        "l.weight_scale": ("F8_E4M3", np.zeros((24, 4), np.uint8)),
        "l.weight_scale_2": np.ones(1, np.float32),
        "l.input_scale": np.ones(1, np.float32),
    }
    assert bound(tensors).tensors["l.weight"].is_float
    with pytest.raises(MalformedFile, match=message):
        bound(tensors | lie)


@pytest.mark.oracle
def test_padded_rows_are_those_of_the_bias(bound):
    tensors, expected = nvfp4((32, 64))
    tensors["l.bias"] = np.zeros(24, np.float32)
    logical = bound(tensors)
    assert logical.tensors["l.weight"].shape == (24, 64)
    assert np.array_equal(logical.read("l.weight"), expected[:24])
