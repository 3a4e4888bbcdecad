"""bitsandbytes and diffusers read our files: single ones as Forge does, and folders."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from diffquant.convert.binding import bind
from diffquant.convert.jobs import opened, run_job
from diffquant.convert.plan import Request
from diffquant.core.errors import PolicyError
from diffquant.io import open_source
from diffquant.quant.policy import Rule
from diffquant.quant.types import type_named

pytestmark = pytest.mark.oracle
FOUR = ("nf4", "nf4_dq", "fp4", "fp4_dq")
MODELS = {
    "sd15-shapes": ("unet", "UNet2DConditionModel"),
    "flux1-shapes": ("transformer", "FluxTransformer2DModel"),
}


def imported(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def quiet(call, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


def folder(examples, out, model, kind):
    run_job(examples / model, out, Request("folder", type=type_named(kind)))
    name, cls = MODELS[model]
    return name, getattr(imported("diffusers"), cls).from_pretrained


def ours(out, name, kind):
    """Module -> decoded weight, of the layers that the folder holds packed."""
    with opened(out) as (_, logical, _):
        return {
            key.removeprefix(f"{name}/").removesuffix(".weight"): logical.read(key)
            for key, tensor in logical.tensors.items()
            if tensor.format == kind
        }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", FOUR)
def test_diffusers_loads_our_4_bit_folders(examples, tmp_path, monkeypatch, model, kind):
    """With its GPU check patched out: bitsandbytes itself decodes on the CPU."""
    torch, functional = imported("torch"), imported("bitsandbytes.functional")
    quantizer = imported(
        "diffusers.quantizers.bitsandbytes.bnb_quantizer"
    ).BnB4BitDiffusersQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda *_: {"": "cpu"})
    name, load = folder(examples, tmp_path / "out", model, kind)
    net = quiet(load, tmp_path / "out", subfolder=name, torch_dtype=torch.float32)
    packed = {k: m.weight for k, m in net.named_modules() if type(m).__name__ == "Linear4bit"}
    mine = ours(tmp_path / "out", name, kind)
    assert packed.keys() == mine.keys()
    for key, weight in packed.items():
        decoded = functional.dequantize_4bit(weight.data, weight.quant_state)
        expected = torch.from_numpy(mine[key]).to(decoded.dtype)
        close = 0 if kind == "nf4" else 1e-2  # its fp4 differs by a rounding, of bfloat16 here
        assert torch.allclose(decoded, expected, rtol=close, atol=0), key


@pytest.mark.parametrize("model", MODELS)
def test_diffusers_loads_our_8_bit_folders(examples, tmp_path, monkeypatch, model):
    torch = imported("torch")
    quantizer = imported(
        "diffusers.quantizers.bitsandbytes.bnb_quantizer"
    ).BnB8BitDiffusersQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda *_: {"": "cpu"})
    name, load = folder(examples, tmp_path / "out", model, "int8_bnb")
    net = quiet(load, tmp_path / "out", subfolder=name, torch_dtype=torch.float32)
    packed = {k: m.weight for k, m in net.named_modules() if type(m).__name__ == "Linear8bitLt"}
    mine = ours(tmp_path / "out", name, "int8_bnb")
    assert packed.keys() == mine.keys()
    dequantize = imported("bitsandbytes.functional").int8_vectorwise_dequant
    for key, weight in packed.items():
        decoded = dequantize(weight.data, weight.SCB)
        assert torch.equal(decoded, torch.from_numpy(mine[key])), key


@pytest.mark.parametrize("kind", [*FOUR, "int8_bnb"])
def test_a_folders_config_says_what_its_layers_are(examples, tmp_path, kind):
    run_job(examples / "flux1-shapes", tmp_path / "out", Request("folder", type=type_named(kind)))
    text = (tmp_path / "out" / "transformer" / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)["quantization_config"]
    four = kind != "int8_bnb"
    assert config["quant_method"] == "bitsandbytes"
    assert [config["load_in_4bit"], config["load_in_8bit"]] == [four, not four]
    assert config["bnb_4bit_use_double_quant"] == kind.endswith("_dq")
    if four:
        assert config["bnb_4bit_quant_type"] == kind.removesuffix("_dq")
    diffusers = imported("diffusers")
    read = quiet(diffusers.BitsAndBytesConfig.from_dict, config)
    method = {"nf4": "nf4", "fp4": "fp4", "int": "llm_int8"}[kind[:3]]
    assert read.quantization_method() == method
    with opened(tmp_path / "out") as (source, logical, _):
        skipped = set(config["llm_int8_skip_modules"])
        for key, tensor in logical.tensors.items():
            if key.startswith("transformer/") and tensor.format == kind:
                assert key.removeprefix("transformer/").removesuffix(".weight") not in skipped
        names = {key.rpartition(".")[2] for key in logical.consumed}
        wanted = {
            "int8_bnb": {"SCB", "weight_format"},
            "nf4": {"absmax", "quant_map", "bitsandbytes__nf4"},
            "fp4": {"absmax", "quant_map", "bitsandbytes__fp4"},
        }[kind.removesuffix("_dq")]
        nested = {"nested_absmax", "nested_quant_map"} if kind.endswith("_dq") else set()
        assert names == wanted | nested
        assert source.specs


@pytest.mark.parametrize("kind", FOUR)
def test_bitsandbytes_takes_the_tensors_of_our_forge_file(examples, tmp_path, kind):
    """As lllyasviel/stable-diffusion-webui-forge@dfdcbab:backend/operations_bnb.py does."""
    torch, bnb = imported("torch"), imported("bitsandbytes")
    out = tmp_path / "out.safetensors"
    report = run_job(
        examples / "sd15-shapes", out, Request("safetensors", type=type_named(kind), target="forge")
    )
    stored = imported("safetensors.torch").load_file(out)
    rows = [row for row in report.tensors if row.stored == kind]
    assert rows
    with open_source(out) as source:
        logical = bind(source)
        for row in rows:
            assert row.target.startswith("model.diffusion_model.")
            state = {k: v for k, v in stored.items() if k.startswith(f"{row.target}.")}
            weight = bnb.nn.Params4bit.from_prequantized(
                data=stored[row.target], quantized_stats=state, device="cpu"
            )
            decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
            mine = torch.from_numpy(logical.read(row.target)).to(weight.quant_state.dtype).float()
            close = 0 if kind == "nf4" else 1e-2
            assert torch.allclose(decoded, mine, rtol=close, atol=0), row.target


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_every_state_that_bitsandbytes_writes_is_read(tmp_path, write, blocksize, nested, storage):
    torch, functional = imported("torch"), imported("bitsandbytes.functional")
    weight = torch.randn(40, 104, generator=torch.Generator().manual_seed(1))
    packed, state = functional.quantize_4bit(
        weight,
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type="nf4",
        quant_storage=getattr(torch, storage),
    )
    names = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}
    tensors = {"l.weight": packed} | {
        f"l.weight.{k}": v for k, v in state.as_dict(packed=True).items()
    }
    raw = {
        k: (names[v.dtype], v.contiguous().view(torch.uint8).reshape(-1).numpy(), tuple(v.shape))
        for k, v in tensors.items()
    }
    write(tmp_path / "w.safetensors", raw)
    expected = functional.dequantize_4bit(packed, state).numpy()
    with open_source(tmp_path / "w.safetensors") as source:
        logical = bind(source)
        tensor = logical.tensors["l.weight"]
        assert (tensor.shape, tensor.decodes_to, tensor.dialect) == ((40, 104), "f32", "bnb")
        usual = blocksize == 64 and storage == "uint8"
        name = "nf4_dq" if nested else "nf4"
        foreign = f"{name} in blocks of {blocksize}"
        assert (tensor.format, tensor.foreign) == ((name, "") if usual else ("", foreign))
        np.testing.assert_allclose(logical.read("l.weight"), expected, rtol=1e-6)
        np.testing.assert_allclose(logical.read("l.weight", (7, 9)), expected[7:9], rtol=1e-6)


def test_one_folder_has_room_for_one_of_its_formats(examples, tmp_path):
    rules = (Rule(r"img_attn\.proj", "fp4", "asked"),)
    wanted = Request("folder", type=type_named("nf4"), rules=rules)
    with pytest.raises(PolicyError, match="fp4 and nf4 side by side in transformer"):
        run_job(examples / "flux1-shapes", tmp_path / "out", wanted)
    assert not list(tmp_path.iterdir())
