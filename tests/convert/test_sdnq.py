"""SDNQ folders are decoded as sdnq 0.2.8 decodes them, and what is not read is refused by name.

tests/data/sdnq.safetensors holds layers that sdnq made, and what it decodes them to (float32, CPU,
torch 2.13). Made by `python tests/convert/test_sdnq.py`, with sdnq on the path (it is GPL-3 and no
dependency); the oracle test makes them anew where sdnq can be imported.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffquant.convert.binding import bind
from diffquant.convert.dialects.sdnq_config import names_match, read_sdnq_config
from diffquant.core.errors import MalformedFile, UnsupportedDtype
from diffquant.core.floats import float32_of
from diffquant.io import open_source

GOLDEN = Path(__file__).parents[1] / "data" / "sdnq.safetensors"
BITS = [*(f"uint{n}" for n in range(1, 9)), *(f"int{n}" for n in range(2, 9))]
SMALL, WIDE, KERNEL = (8, 32), (32, 48), (4, 16, 3, 3)
# name -> (layer class, shape, torch dtype, options of sdnq)
CASES = {
    **{name: ("Linear", SMALL, "float32", {"weights_dtype": name}) for name in BITS},
    "float8_e4m3fn": ("Linear", SMALL, "float32", {"weights_dtype": "float8_e4m3fn"}),
    "float8_e5m2": ("Linear", SMALL, "float32", {"weights_dtype": "float8_e5m2"}),
    "groups": ("Linear", SMALL, "float32", {"weights_dtype": "int3", "group_size": 8}),
    "groups of bytes": ("Linear", SMALL, "float32", {"weights_dtype": "uint8", "group_size": 8}),
    "rows": ("Linear", SMALL, "float32", {"weights_dtype": "uint5", "group_size": -1}),
    "one scale": ("Linear", SMALL, "float32", {"weights_dtype": "uint8", "group_size": -2}),
    "scales of 16 bits": (
        "Linear", SMALL, "bfloat16", {"weights_dtype": "uint4", "dequantize_fp32": False},
    ),
    "low rank": ("Linear", SMALL, "float32", {"weights_dtype": "int4", "use_svd": True}),
    "low rank of 16 bits": (
        "Linear", SMALL, "bfloat16", {"weights_dtype": "uint4", "use_svd": True},
    ),
    "rotated by 4": (
        "Linear", SMALL, "float32",
        {"weights_dtype": "uint4", "use_hadamard": True, "hadamard_group_size": 16},
    ),
    "rotated by 2": (
        "Linear", SMALL, "float32", {"weights_dtype": "int6", "use_hadamard": True},
    ),
    "turned": ("Linear", WIDE, "float32", {"weights_dtype": "int8", "use_quantized_matmul": True}),
    "turned, one scale": (
        "Linear", (32, 32), "float32",
        {"weights_dtype": "int8", "use_quantized_matmul": True, "group_size": -2},
    ),
    "turned, low rank": (
        "Linear", WIDE, "float32",
        {"weights_dtype": "uint4", "use_quantized_matmul": True, "use_svd": True},
    ),
    "kernel": ("Conv2d", KERNEL, "float32", {"weights_dtype": "uint4", "group_size": -1}),
    "kernel of bytes": ("Conv2d", KERNEL, "float32", {"weights_dtype": "int8", "group_size": -1}),
    "kernel in groups": ("Conv2d", KERNEL, "float32", {"weights_dtype": "uint3", "group_size": 8}),
    "kernel, rotated": (
        "Conv2d", KERNEL, "float32",
        {"weights_dtype": "int8", "use_hadamard": True, "hadamard_group_size": 8},
    ),
    "embedding": ("Embedding", SMALL, "float32", {"weights_dtype": "uint4", "group_size": 8}),
}  # fmt: skip
REFUSED = {
    "codebook": ("Linear", SMALL, {"weights_dtype": "uint4", "use_codebook": True}, "use_codebook"),
    "scales of scales": (
        "Linear", SMALL, {"weights_dtype": "uint4", "scale_dtype": "uint8"}, "scale_dtype uint8",
    ),
    "4-bit floats": (
        "Linear", SMALL, {"weights_dtype": "float4_e2m1fn"}, "weights_dtype float4_e2m1fn",
    ),
    "12 bits": ("Linear", SMALL, {"weights_dtype": "int12"}, "weights_dtype int12"),
    "one scale, packed": (
        "Linear", SMALL, {"weights_dtype": "int4", "group_size": -2}, "does not say its shape",
    ),
    "kernel for a product": (
        "Conv2d", (32, 32, 3, 3), {"weights_dtype": "int8", "use_quantized_matmul": True},
        "laid out for a quantized product",
    ),
    "transposed kernel": (
        "ConvTranspose2d", (16, 8, 3, 3), {"weights_dtype": "int8"}, r"scales of \(1, 8, 3, 3\)",
    ),
}  # fmt: skip


def config_of(kind, options):
    """The part of quantization_config that decoding depends on."""
    found = {"quant_method": "sdnq", **options}
    if "Conv" in kind and "use_quantized_matmul" in found:
        found["use_quantized_matmul_conv"] = found.pop("use_quantized_matmul")
    return found


def made(name, kind, shape, dtype, options):
    """Let sdnq make a layer: its tensors, and what it decodes them to."""
    import torch
    from sdnq.quantizer import sdnq_quantize_layer_weight

    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    weight = (torch.randn(shape, generator=generator) * 0.02).to(getattr(torch, dtype))
    torch.manual_seed(1)  # its SVD is a random one
    ranks = {"svd_rank": 4} if options.get("use_svd") else {}
    layer, found = sdnq_quantize_layer_weight(weight, layer_class_name=kind, **options, **ranks)
    tensors = {key: value for key, value in found.items() if value is not None}
    decoded = layer(
        **{key: value.clone() for key, value in tensors.items()},
        dtype=torch.float32,
        skip_compile=True,
        skip_quantized_matmul=layer.use_quantized_matmul,
    )
    assert decoded.shape == weight.shape
    return {key: value.contiguous() for key, value in tensors.items()}, decoded.contiguous()


@pytest.fixture
def folder(tmp_path, write):
    """Write a bare component: (tensors, quantization_config, where the config stands) -> path."""

    def make(tensors, config, where="config.json"):
        path = tmp_path / "transformer"
        path.mkdir(exist_ok=True)
        write(path / "diffusion_pytorch_model.safetensors", tensors)
        inside = where == "config.json"
        (path / "config.json").write_text(
            json.dumps({"quantization_config": config} if inside else {})
        )
        if not inside:
            (path / where).write_text(json.dumps(config))
        return path

    return make


def golden(name):
    """A layer of the data file: key -> (dtype, bytes, shape), and its decoded values."""
    with open_source(GOLDEN) as source:
        keys = [key for key in source.specs if key.startswith(f"{name}/")]
        found = {
            key.partition("/")[2]: (spec.dtype, np.array(source.read(key)), spec.shape)
            for key in keys
            for spec in [source.specs[key]]
        }
    dtype, data, shape = found.pop("expected")
    return {f"l.{key}": value for key, value in found.items()}, float32_of(data, dtype), shape


def check(path, expected, shape, name):
    with open_source(path) as source:
        logical = bind(source)
        tensor = logical.tensors["l.weight"]
        assert list(logical.tensors) == ["l.weight"]
        assert (tensor.format, tensor.shape, tensor.dialect) == ("", shape, "sdnq")
        assert tensor.foreign.startswith(f"sdnq {CASES[name][3]['weights_dtype']}")
        assert set(logical.consumed) == set(source.specs) - {"l.weight"}
        n = shape[0]
        wanted = expected.reshape(n, -1)
        spans = [(0, n), (0, 1), (1, n), (n // 2, min(n // 2 + 3, n)), (2, 2)]
        for start, stop in spans:
            found = logical.read("l.weight", (start, stop))
            if "rotated" in name:  # sums in another order
                limit = 1e-6 * np.abs(wanted).max()
                np.testing.assert_allclose(found, wanted[start:stop], rtol=0, atol=limit)
            elif "low rank" in name:
                np.testing.assert_allclose(
                    found, wanted[start:stop], rtol=2.0**-7 if "16 bits" in name else 1e-5,
                    atol=1e-7,
                )  # fmt: skip
            else:
                assert np.array_equal(found, wanted[start:stop])


@pytest.mark.parametrize("name", CASES)
def test_layers_are_decoded_as_sdnq_decodes_them(folder, name):
    kind, _, _, options = CASES[name]
    tensors, expected, shape = golden(name)
    check(folder(tensors, config_of(kind, options)), expected, shape, name)


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_layers_made_now_are_decoded_as_sdnq_decodes_them(folder, tmp_path, name):
    pytest.importorskip("sdnq", reason="sdnq is no dependency")
    save_file = pytest.importorskip("safetensors.torch").save_file
    kind, shape, dtype, options = CASES[name]
    tensors, decoded = made(name, kind, shape, dtype, options)
    path = folder({}, config_of(kind, options))
    keys = {f"l.{key}": value for key, value in tensors.items()}
    save_file(keys, path / "diffusion_pytorch_model.safetensors")
    check(path, decoded.numpy(), tuple(decoded.shape), name)


@pytest.mark.parametrize("where", ["config.json", "quantization_config.json"])
def test_the_config_is_read_from_either_file(folder, where):
    tensors, expected, shape = golden("uint4")
    check(folder(tensors, config_of("Linear", {"weights_dtype": "uint4"}), where), expected, shape,
          "uint4")  # fmt: skip


def test_without_a_config_nothing_is_taken_for_sdnq(folder):
    tensors, _, _ = golden("uint4")
    with open_source(folder(tensors, {"quant_method": "other"})) as source:
        assert set(bind(source).tensors) == set(tensors)


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"modules_dtype_dict": {"uint4": ["l.weight"]}}, "uint4"),
        ({"modules_dtype_dict": {"int8": ["m"], "uint4": "l"}}, "uint4"),
        ({"modules_dtype_dict": {"minimum_4bit": ["l.*"]}}, "uint4"),
        ({"modules_dtype_dict": {"minimum_uint3": ["l"], "uint4": [".l"]}}, "uint4"),
        ({"modules_quant_config": {"l": {"weights_dtype": "uint4"}}}, "uint4"),
        ({"weights_dtype": "uint4", "modules_dtype_dict": {"2bits": ["l"]}}, "uint4"),
    ],
)
def test_each_layer_has_its_own_dtype(folder, fields, dtype):
    tensors, expected, shape = golden(dtype)
    config = {"quant_method": "sdnq", "weights_dtype": "uint3", **fields}
    if "minimum_uint3" in str(fields):
        config["weights_dtype"] = "uint3"  # no fewer bits than asked for: the next name decides
    check(folder(tensors, config), expected, shape, dtype)


@pytest.mark.parametrize(
    ("name", "pattern", "fits"),
    [
        ("blocks.0.attn.weight", "attn", True),
        ("blocks.0.attn.weight", "att", False),
        ("blocks.0.attn.weight", "blocks.0.attn.weight", True),
        ("blocks.0.attn.weight", ".blocks", True),
        ("blocks.0.attn.weight", ".attn", False),
        ("blocks.0.attn.weight", "blocks.*.attn", True),
        ("blocks.0.attn.weight", "attn*", False),
        ("blocks.0.attn.weight", "*attn", True),
        ("blocks.0.attn.weight", "*attm*", False),
        ("blocksX0", "blocks.*", False),
        ("blocks.0.attn.weight", "blocks.0.*.bias", False),
        ("a" * 4000, "*".join("a" * 400) + "*b", False),
    ],
)
def test_names_match_as_sdnq_matches_them(name, pattern, fits):
    assert names_match(name, (pattern,)) is fits


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(folder, name):
    kind, _, options, message = REFUSED[name]
    with open_source(GOLDEN) as source:
        keys = [key for key in source.specs if key.startswith(f"refused: {name}/")]
        tensors = {
            f"l.{key.partition('/')[2]}": (
                source.specs[key].dtype, np.array(source.read(key)), source.specs[key].shape,
            )
            for key in keys
        }  # fmt: skip
    assert tensors
    with open_source(folder(tensors, config_of(kind, options))) as source:
        logical = bind(source)
        assert list(logical.tensors) == ["l.weight"]
        assert logical.tensors["l.weight"].is_quantized
        with pytest.raises(UnsupportedDtype, match=rf"l\.weight: SDNQ.*{message}"):
            logical.read("l.weight")


def lie(**changes):
    tensors, _, _ = golden("uint4")
    for key, value in changes.items():
        if value is None:
            del tensors[f"l.{key}"]
        else:
            tensors[f"l.{key}"] = value
    return tensors


HALF = ("F32", np.zeros(4, np.float32), (4, 1))
LIES = {
    "no zero point": (lambda: lie(zero_point=None), r"l\.scale: expected a zero_point for unsig"),
    "other zero points": (lambda: lie(zero_point=HALF), r"l\.zero_point: expected F32 \(8, 1\)"),
    "scales of integers": (
        lambda: lie(scale=("I8", np.zeros(8, np.int8), (8, 1))), r"l\.scale: expected F32 or F16",
    ),
    "no scales": (
        lambda: lie(scale=("F32", np.zeros(0, np.float32), (0, 1))), r"l\.scale: expected F32",
    ),
    "scales of other rows": (
        lambda: lie(scale=("F32", np.zeros(7, np.float32), (7, 1)),
                    zero_point=("F32", np.zeros(7, np.float32), (7, 1))),
        r"l\.weight: expected whole units for scales of \(7, 1\)",
    ),
    "codes of another dtype": (
        lambda: lie(weight=("I8", np.zeros(128, np.int8), (128,))), r"l\.weight: expected U8",
    ),
    "half a low-rank part": (
        lambda: lie(svd_up=("F32", np.zeros((8, 2), np.float32), (8, 2))),
        "expected svd_up and svd_down together",
    ),
    "a low-rank part of another weight": (
        lambda: lie(svd_up=("F32", np.zeros((8, 2), np.float32), (8, 2)),
                    svd_down=("F32", np.zeros((3, 32), np.float32), (3, 32))),
        r"l\.svd_down: expected a product with \(8, 2\) that is \(8, 32\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_parts_that_contradict_each_other_are_malformed(folder, name):
    make, message = LIES[name]
    path = folder(make(), config_of("Linear", {"weights_dtype": "uint4"}))
    with open_source(path) as source, pytest.raises(MalformedFile, match=message):
        bind(source)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights_dtype", 4),
        ("use_hadamard", "yes"),
        ("hadamard_group_size", 1 << 40),
        ("hadamard_group_size", True),
        ("modules_dtype_dict", ["uint4"]),
        ("modules_dtype_dict", {"uint4": [3]}),
        ("modules_quant_config", {"l": 3}),
        ("modules_quant_config", {"l": {"use_codebook": "no"}}),
        ("modules_to_not_use_matmul", [{}]),
        ("modules_to_not_use_matmul", ["(a*)*b"]),
    ],
)
def test_a_damaged_config_is_malformed(field, value):
    config = {"config.json": {"quantization_config": {"quant_method": "sdnq", field: value}}}
    with pytest.raises(MalformedFile, match="quantization_config"):
        read_sdnq_config(config, "", Path("x"))


if __name__ == "__main__":
    from safetensors.torch import save_file

    data = {}
    for case, (layer_kind, size, torch_dtype, chosen) in CASES.items():
        tensors, decoded = made(case, layer_kind, size, torch_dtype, chosen)
        data |= {f"{case}/{key}": value for key, value in tensors.items()}
        data[f"{case}/expected"] = decoded
    for case, (layer_kind, size, chosen, _) in REFUSED.items():
        tensors, _ = made(case, layer_kind, size, "float32", chosen)
        data |= {f"refused: {case}/{key}": value for key, value in tensors.items()}
    save_file(data, GOLDEN)
