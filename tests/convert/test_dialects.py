"""What a dialect writes, `bind` finds again; the programs that define dialects read it too."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from diffquant.convert.binding import bind
from diffquant.convert.dialects import DIALECTS, pack
from diffquant.convert.dialects.bnb import skip_conflicts
from diffquant.core.errors import PolicyError, UnsupportedShape
from diffquant.io import open_source
from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import TYPES

CASES = sorted({(dialect, row.base) for row in TYPES.values() for dialect in row.dialects.values()})
SHAPES = ((96, 256), (256, 128), (7, 512), (50, 37), (3, 4, 3, 3), (1, 64))


def encoded(dialect, fmt, shape, write, path):
    """A file that holds one weight, and the float32 values it decodes to."""
    rng = np.random.default_rng(9)
    n = shape[0]
    weight = rng.standard_normal((n, int(np.prod(shape)) // n), np.float32)
    codec = FORMATS[fmt].codec
    needs = FORMATS[fmt].importance == "required"
    extra = {"importance": np.ones(weight.shape[1], np.float32)} if needs else {}
    if FORMATS[fmt].passes == 2:
        extra["stats"] = backend(codec, "reduce")(weight, fmt=fmt)
    parts = backend(codec, "encode")(weight, fmt=fmt, **extra)
    decoded = backend(codec, "decode")(parts, weight.shape, fmt=fmt)
    tensors = {}
    for one in pack(dialect, "l.weight", fmt, shape, "bf16"):
        data = one.data(parts[one.part] if one.part else None)
        assert data.nbytes == one.spec.nbytes
        tensors[one.spec.key] = (one.spec.dtype, data, one.spec.shape)
    write(path, tensors, {"general.architecture": "flux"} if path.suffix == ".gguf" else {})
    return decoded


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dialect", "fmt"), CASES)
def test_what_is_packed_is_bound_again(tmp_path, write, dialect, fmt, shape):
    path = tmp_path / ("w.gguf" if dialect == "gguf" else "w.safetensors")
    if FORMATS[fmt].check(shape):
        with pytest.raises(UnsupportedShape):
            FORMATS[fmt].demand(shape)
        return
    decoded = encoded(dialect, fmt, shape, write, path)
    with open_source(path) as source:
        logical = bind(source)
        assert list(logical.tensors) == ["l.weight"]
        tensor = logical.tensors["l.weight"]
        assert (tensor.format, tensor.shape) == (fmt, shape)
        assert set(logical.consumed) == set(source.specs) - {"l.weight"}
        assert np.array_equal(logical.read("l.weight"), decoded)
        assert logical.warnings == ()


@pytest.mark.parametrize(
    ("dialect", "fmt"),
    [("comfy", "nf4"), ("plain", "nf4"), ("gguf", "nf4"), ("bnb", "int8_rowwise")],
)
def test_a_format_is_refused_where_its_scales_have_no_place(dialect, fmt):
    with pytest.raises(PolicyError, match=f"no place for the (absmax|scale) of {fmt}"):
        pack(dialect, "l.weight", fmt, (4, 64), "f16")


@pytest.mark.parametrize("dialect", ["comfy", "bnb"])
def test_only_layer_weights_are_packed(dialect):
    fmt = "nf4" if dialect == "bnb" else "int8_rowwise"
    with pytest.raises(PolicyError, match=f"pos_embed: the {dialect} dialect packs layer weights"):
        pack(dialect, "pos_embed", fmt, (4, 64), "f16")
    assert len(pack(dialect, "pos_embed", "f16", (4, 64), "f16")) == 1


def test_every_types_dialect_exists():
    assert {name for row in TYPES.values() for name in row.dialects.values()} <= set(DIALECTS)


@pytest.mark.parametrize(
    ("kept", "packed", "found"),
    [
        (["proj_out"], ["blocks.0.proj_out"], {"proj_out": "blocks.0.proj_out"}),
        (["a.proj_out"], ["blocks.0.proj_out"], {}),
        (["x"], ["x.linear"], {"x": "x.linear"}),
        (["x"], ["max.linear"], {"x": "max.linear"}),
        (["x"], ["xy.linear"], {}),
        (["norm_out.linear"], ["blocks.0.norm.linear"], {}),
        ([], ["a"], {}),
    ],
)
def test_skip_conflicts_follow_diffusers_matching(kept, packed, found):
    assert skip_conflicts(kept, packed) == found


def peers(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.mark.oracle
@pytest.mark.parametrize("kept", [["proj_out"], ["block.0"], ["ock"], ["norm_out"], ["deep.x"]])
def test_skip_conflicts_are_what_diffusers_would_skip(kept):
    torch = peers("torch")
    utils = peers("diffusers.quantizers.bitsandbytes.utils")
    config = peers("diffusers").BitsAndBytesConfig(load_in_4bit=True)
    nn = torch.nn

    def net():
        linear = lambda: nn.Linear(2, 2)  # noqa: E731
        block = nn.ModuleDict({"proj_out": linear(), "fc": linear()})
        return nn.ModuleDict(
            {
                "proj_out": linear(),
                "block": nn.ModuleList([block, linear()]),
                "deep": nn.ModuleDict({"x": linear(), "ax": nn.ModuleDict({"y": linear()})}),
                "norm_out": nn.ModuleDict({"linear": linear()}),
            }
        )

    model = net()
    linears = {k for k, m in model.named_modules() if isinstance(m, nn.Linear)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = utils._replace_with_bnb_linear(model, list(kept), quantization_config=config)[0]
    left = {k for k, m in packed.named_modules() if type(m) is nn.Linear}
    wanted = sorted(linears - set(kept))
    conflict = skip_conflicts(kept, wanted)
    assert bool(conflict) == bool(left - set(kept))
    assert set(conflict.values()) <= left


@pytest.mark.oracle
@pytest.mark.parametrize("shape", [(96, 256), (50, 37), (7, 5)])
def test_bitsandbytes_loads_what_we_write(tmp_path, write, shape):
    torch = peers("torch")
    functional = peers("bitsandbytes.functional")
    load_file = peers("safetensors.torch").load_file
    path = tmp_path / "w.safetensors"
    decoded = encoded("bnb", "nf4", shape, write, path)
    tensors = load_file(path)
    packed = tensors.pop("l.weight")
    state = functional.QuantState.from_dict(tensors, device=torch.device("cpu"))
    assert (state.quant_type, state.blocksize, tuple(state.shape)) == ("nf4", 64, shape)
    assert state.dtype == torch.bfloat16
    state.dtype = torch.float32  # decode without the rounding that is the loader's choice
    found = functional.dequantize_4bit(packed, state)
    assert np.array_equal(found.numpy(), decoded)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("fmt", "kind"),
    [("fp8_e4m3_scaled", "TensorCoreFP8Layout"), ("int8_rowwise", "TensorWiseINT8Layout")],
)
def test_comfy_kitchen_decodes_what_we_write(tmp_path, write, fmt, kind):
    torch = peers("torch")
    layout = getattr(peers("comfy_kitchen.tensor"), kind)
    load_file = peers("safetensors.torch").load_file
    path = tmp_path / "w.safetensors"
    shape = (96, 256)
    decoded = encoded("comfy", fmt, shape, write, path)
    tensors = load_file(path)
    marker = json.loads(bytes(tensors["l.comfy_quant"].numpy()))
    assert marker == {
        "format": {"fp8_e4m3_scaled": "float8_e4m3fn", "int8_rowwise": "int8_tensorwise"}[fmt]
    }
    params = layout.Params(
        scale=tensors["l.weight_scale"], orig_dtype=torch.float32, orig_shape=shape
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = layout.dequantize(tensors["l.weight"], params)
    assert np.array_equal(found.numpy(), decoded)
    names = set(layout.state_dict_tensors(tensors["l.weight"], params))
    assert {f"l.weight{suffix}" for suffix in names} == set(tensors) - {"l.comfy_quant"}
