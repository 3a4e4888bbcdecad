"""Key sets of real files bind completely: nothing missing, nothing left over, no number needed.

Models stand on torch's meta device, at full width and depth.
"""

import functools
import json
import lzma
import re
from pathlib import Path

import pytest
import torch

from diffquant.convert.detect import detect, detect_component
from diffquant.convert.match import to_canonical
from diffquant.core.errors import ArchitectureError
from diffquant.core.tensors import TensorSpec
from diffquant.runtime.layers import PackedWeight, Segment
from diffquant.runtime.loading import build, model_for

DATA = Path(__file__).parents[1] / "data"

# manifest -> what its config counts: channels it takes and makes, or latents and factor of a VAE
NAMES = {
    "flux-dev.transformer.diffusers": {"in_channels": 64, "guidance": True},
    "flux-dev.transformer.original": {"double_depth": 19, "single_depth": 38},
    "flux-fill.transformer.diffusers": {"in_channels": 384, "out_channels": 64},
    "flux-fill.transformer.original": {"in_channels": 384, "out_channels": 64},
    "flux-kontext.transformer.original": {"in_channels": 64},
    "flux-schnell.transformer.original": {"guidance": False},
    "flux2-dev.transformer.diffusers": {"width": 6144, "hidden": 18432, "guidance": True},
    "flux2-dev.transformer.original": {"double_depth": 8, "single_depth": 48, "context": 15360},
    "flux2-klein-4b.transformer.diffusers": {"width": 3072, "guidance": False, "context": 7680},
    "flux2-klein-4b.transformer.original": {"width": 3072, "guidance": False},
    "flux2-klein-9b.transformer.diffusers": {"width": 4096, "guidance": False, "context": 12288},
    "flux2-klein-9b.transformer.original": {"width": 4096, "guidance": False},
    "z-image.transformer.comfy": {"width": 3840, "layers": 30, "context_refiners": 2},
    "z-image.transformer.diffusers": {"width": 3840, "in_channels": 16, "caption": 2560},
    "flux.vae.diffusers": {"latents": 16, "factor": 8},
    "flux.vae.original": {"latents": 16, "factor": 8},
    "sd3.vae.diffusers": {"latents": 16, "factor": 8},
    "sd.vae-kl-f8.ldm": {"latents": 4, "factor": 8},
    "sd.vae-kl-f8.diffusers": {"latents": 4, "factor": 8},
    "sd.vae-kl-f8.diffusers-old-attn": {"latents": 4, "factor": 8},
    "flux2.vae.diffusers": {"latents": 128, "factor": 16},
    "flux2.vae.original": {"latents": 128, "factor": 16},
    "taesd.encoder.original": {"latents": 4, "factor": 8},
    "taesd.decoder.original": {"latents": 4, "factor": 8},
    "taesd.vae.diffusers": {"latents": 4, "factor": 8},
    "taef1.encoder.original": {"latents": 16, "factor": 8},
    "taef1.decoder.original": {"latents": 16, "factor": 8},
    "taef1.vae.diffusers": {"latents": 16, "factor": 8},
    "taef2.encoder.original": {"latents": 128, "factor": 16},
    "taef2.decoder.original": {"latents": 128, "factor": 16},
    "taesana.encoder.original": {"latents": 32, "factor": 32},
}


@functools.cache
def manifests():
    found = {}
    for name in ("manifests", "more_manifests"):
        found |= json.loads(lzma.decompress((DATA / f"{name}.json.xz").read_bytes()))
    return found


def specs_of(name):
    """Specs of a manifest; those with blocks 0, 1 and the last alone become two blocks deep."""
    shapes = manifests()[name]
    blocks = {int(n) for key in shapes for n in re.findall(r"^single\w*\.(\d+)\.", key)}
    last = max(blocks) if blocks and len(blocks) <= max(blocks) else 0
    return {
        key: TensorSpec(key, "BF16", tuple(shape))
        for key, shape in shapes.items()
        if not last or all(int(n) < 2 for n in re.findall(r"blocks\.(\d+)\.", key))
    }


def part_of(name):
    """The one part of the file, recognised as every command does."""
    specs = specs_of(name)
    part = detect_component(specs)
    return part or detect(specs, {}, {}).part("denoiser")


def weights_of(part):
    return {
        one.target: PackedWeight(
            (Segment("f32", one.shape, {"weight": torch.empty(one.shape, device="meta")}),)
        )
        for one in to_canonical(part)
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_key_has_its_place(name):
    part = part_of(name)
    hyper = {key: one.value for key, one in part.hyper.items()}
    with torch.device("meta"):  # `build` refuses a key too many or too few, or of another shape
        model = build(model_for(part.kind), weights_of(part), hyper, device="meta")
    assert {key: getattr(model.config, key) for key in NAMES[name]} == NAMES[name]


def test_what_reads_pictures_too_is_refused_by_name():
    part = part_of("z-image-omni.transformer.original")
    with pytest.raises(ArchitectureError, match="SigLIP"):
        build("z_image", weights_of(part), {})
