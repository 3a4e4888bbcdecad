"""An error LoRA attached: the layers come closer to the source's, by our loader and diffusers'."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffquant.convert.jobs import run_job
from diffquant.convert.lora.written import lora_keys
from diffquant.convert.plan import Request
from diffquant.io import open_source
from diffquant.quant.types import type_named
from diffquant.runtime.compare import ImageSettings, compare_pictures, make_reference
from diffquant.runtime.lora import attach
from diffquant.runtime.opening import open_pipeline

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = ("a small red circle on a blue background at the left",)


def make(source, tmp_path, kind, container, suffix, rank=32):
    out, lora = tmp_path / f"out{suffix}", tmp_path / "error.safetensors"
    request = Request(container, type=type_named(kind), lora_rank=rank)
    return out, lora, run_job(source, out, request, error_lora=lora, verify="none")


def weights(denoiser):
    """Layer -> its weight with adapters added, float64."""
    found = {}
    for name, layer in denoiser.named_modules():
        if hasattr(layer, "bound") and hasattr(layer, "adapters"):
            weight = layer.bound().dequantize(torch.float64)
            for one in layer.adapters:
                rows = slice(*one.rows) if one.rows else slice(None)
                delta = one.scale * (one.up.double() @ one.down.double().flatten(1))
                weight[rows] += delta.reshape(weight[rows].shape)
            found[name] = weight
    return found


@pytest.mark.parametrize(
    ("model", "kind", "container", "suffix"),
    [
        ("sd15-shapes", "nf4", "safetensors", ".safetensors"),
        ("sd15-shapes", "q4_0", "gguf", ".gguf"),
        ("flux1-shapes", "nvfp4", "safetensors", ".safetensors"),
    ],
)
def test_attached_it_brings_every_layer_closer(tmp_path, model, kind, container, suffix):
    source = EXAMPLES / model
    out, lora, report = make(source, tmp_path, kind, container, suffix, rank=8)
    exact = weights(
        open_pipeline(source, dtype=torch.float32, device="cpu").pipeline.parts.denoiser
    )
    side = open_pipeline(out, base=source, dtype=torch.float32, device="cpu")
    before = weights(side.pipeline.parts.denoiser)
    [use] = attach(side, ((lora, 1.0),))
    assert (use.matched, use.unmatched, use.warnings) == (report.error_lora.layers, (), ())
    after = weights(side.pipeline.parts.denoiser)
    changed = 0
    for name, wanted in exact.items():
        errors = [float(((one[name] - wanted) ** 2).sum()) for one in (before, after)]
        changed += errors[0] != errors[1]
        assert errors[1] <= errors[0], name
    assert changed == use.matched


def test_pictures_come_closer(tmp_path):
    """nf4 with rank 32 gains 5 dB on average; one prompt must show 1."""
    source = EXAMPLES / "sd15-shapes"
    out, lora, _ = make(source, tmp_path, "nf4", "safetensors", ".safetensors")
    settings = ImageSettings(prompts=PROMPTS, seeds=(0, 1), steps=4)
    reference = make_reference(source, settings)
    found = []
    for loras in ((), ((lora, 1.0),)):
        one = replace(settings, loras=loras)
        report, _, _ = compare_pictures(out, source, one, reference=reference)
        found.append(report.psnr_db or math.inf)
    assert found[1] > found[0] + 1


def decoded_weights(folder, wanted):
    """The denoiser of a float32 folder as diffusers keeps it."""
    with open_source(folder) as source:
        found = {
            key.partition("/")[2]: torch.from_numpy(source.read(key).view("<f4").copy())
            for key in source.specs
            if key.startswith(("unet/", "transformer/"))
        }
    return {key: found[key].reshape(value.shape) for key, value in wanted.items()}


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("model", "container", "suffix", "kind"),
    [
        ("sd15-shapes", "safetensors", ".safetensors", "nf4"),
        ("sdxl-shapes", "safetensors", ".safetensors", "nf4"),
        ("qwen-image-shapes", "safetensors", ".safetensors", "nvfp4"),
        ("sd15-shapes", "folder", "", "nf4"),
        ("flux1-shapes", "folder", "", "nf4"),
    ],
)
def test_diffusers_adds_every_layer(oracle, tmp_path, model, container, suffix, kind):
    """Fused by diffusers onto the decoded weights, a LoRA of full rank gives the source's.

    Up to what float16 leaves: a wrong scale or row would leave all of the error.
    """
    pytest.importorskip("peft")
    out, lora, report = make(EXAMPLES / model, tmp_path, kind, container, suffix, rank=1024)
    plain = tmp_path / "decoded"
    run_job(out, plain, Request("folder", dtype="f32"), base=EXAMPLES / model, verify="none")

    def weights_in(denoiser):
        return {key: value.detach().clone() for key, value in denoiser.state_dict().items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = oracle.diffusers.DiffusionPipeline.from_pretrained(
            EXAMPLES / model, dtype=torch.float32
        )
        denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        source = weights_in(denoiser)
        denoiser.load_state_dict(decoded_weights(plain, source))
        before = weights_in(denoiser)
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        fused = weights_in(denoiser)
    moved = 0
    for name, wanted in source.items():
        if float((fused[name] - before[name]).norm()):
            moved += 1
            error = float((before[name] - wanted).norm())
            assert float((fused[name] - wanted).norm()) < 0.05 * error, name
    assert moved >= report.error_lora.layers


@pytest.mark.oracle
def test_diffusers_reads_the_names_of_a_flux_file(oracle):
    """Its reader has the widths of the real model in it, so one block of those is tried."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    shapes = {
        "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
        "double_blocks.0.txt_mlp.2.weight": (3072, 12288),
        "double_blocks.0.img_mod.lin.weight": (18432, 3072),
        "single_blocks.0.linear1.weight": (21504, 3072),
        "single_blocks.0.linear2.weight": (3072, 15360),
        "single_blocks.0.modulation.lin.weight": (9216, 3072),
    }
    tensors, total = {}, 0.0
    for number, (key, (rows, columns)) in enumerate(shapes.items(), 1):
        keys = lora_keys(key, folder=False, modules={}, key=key)
        tensors[keys.down] = torch.full((1, columns), float(number))
        tensors[keys.up] = torch.ones(rows, 1)
        tensors[keys.alpha] = torch.tensor(1.0)
        total += rows * columns * number
    found = _convert_kohya_flux_lora_to_diffusers(tensors)
    downs = {key: value for key, value in found.items() if key.endswith("lora_A.weight")}
    assert len(downs) == 3 + 1 + 1 + 4 + 1 + 1
    read = sum(
        float(found[key.replace("lora_A", "lora_B")].sum() * value.sum())
        for key, value in downs.items()
    )
    assert read == pytest.approx(total, rel=1e-5)
