"""Parts that each come from a file of their own, described as the runtime will load them."""

import functools
import json
import lzma
from math import prod
from pathlib import Path

import pytest
import torch

from diffquant.convert.binding import bind
from diffquant.convert.detect import detect, detect_component
from diffquant.convert.footprint import Picture, footprint, needs, parts_footprint
from diffquant.convert.footprint.weights import part_weights
from diffquant.convert.match import to_layout
from diffquant.core.errors import ArchitectureError
from diffquant.core.tensors import TensorSpec
from diffquant.runtime.kernels import best
from diffquant.runtime.layers import PackedLayer, QuantEmbedding
from diffquant.runtime.loading import MODELS
from diffquant.runtime.memory.parts import part_source

DATA = Path(__file__).parents[1] / "data"


@functools.cache
def manifests():
    return json.loads(lzma.decompress((DATA / "manifests.json.xz").read_bytes()))


class Header:
    """A source of which nothing can be read."""

    container, path, metadata, configs = "safetensors", Path("header"), {}, {}

    def __init__(self, shapes, dtype):
        self.specs = {key: TensorSpec(key, dtype, tuple(shape)) for key, shape in shapes.items()}


def one(name, *, dtype="BF16", compute=torch.bfloat16, device="cpu", whole=False):
    logical = bind(Header(manifests()[name], dtype))
    specs = logical.specs()
    part = detect(specs).part("denoiser") if whole else detect_component(specs)
    return part_source(logical, part, dtype=compute, device=device)


def flux(**denoiser):
    return {
        "denoiser": one("flux-dev.transformer.original", whole=True, **denoiser),
        "vae": one("flux.vae.original"),
        "text_encoder": one("clip-l.hf"),
        "text_encoder_2": one("t5-xxl-encoder.hf"),
    }


def planned(parts, **asked):
    given = {"architecture": "flux1", "variant": "dev", "guided": False, **asked}
    return parts_footprint(parts, Picture(1024, 1024), **given)


def stage(found, name, part=""):
    return next(s for s in found.stages if s.name == name and part in ("", s.part))


def test_parts_of_four_files_are_counted_like_those_of_one():
    found = planned(flux())
    logical = bind(Header(manifests()["flux-dev.transformer.original"], "BF16"))
    whole = footprint(logical, detect(logical.specs()), Picture(1024, 1024), ours=True)
    assert [(s.name, s.in_file) for s in found.stages] == [
        ("encode", True),
        ("encode", True),
        ("denoise", True),
        ("decode", True),
    ]
    assert found.notes == ()
    for there, guessed in zip(found.stages, whole.stages, strict=True):
        assert there.activations.nbytes == pytest.approx(guessed.activations.nbytes, rel=0.01)
        assert there.weights.nbytes == pytest.approx(guessed.weights.nbytes, rel=0.01)


def test_a_part_that_is_missing_is_not_estimated():
    parts = flux()
    del parts["text_encoder_2"]
    assert [s.part for s in planned(parts).stages] == ["text_encoder", "denoiser", "vae"]


def test_each_part_computes_in_its_own_dtype():
    half, single = planned(flux()), planned(flux(compute=torch.float32))
    wide, narrow = stage(single, "denoise"), stage(half, "denoise")
    assert wide.activations.nbytes > 1.9 * narrow.activations.nbytes
    assert wide.scratch > narrow.scratch == 0
    assert stage(single, "decode") == stage(half, "decode")


def test_a_run_that_starts_from_a_picture_encodes_it_with_the_same_autoencoder():
    plain, found = planned(flux()), planned(flux(), from_picture=True)
    assert [s.name for s in found.stages] == [
        "encode",
        "encode",
        "encode picture",
        "denoise",
        "decode",
    ]
    encode, decode = stage(found, "encode picture"), stage(found, "decode")
    assert encode.weights == decode.weights
    assert 0 < encode.activations.nbytes < decode.activations.nbytes
    for before, after in zip(needs(plain), needs(found), strict=True):
        assert before.tiled or before.nbytes == after.nbytes  # its weights count once


def test_weights_that_the_loader_leaves_in_the_file_are_not_counted():
    read = one("qwen2.5-vl-7b.hf")
    found = planned({"text_encoder": read}, architecture="qwen_image")
    assert [s.name for s in found.stages] == ["encode"]
    shapes = manifests()["qwen2.5-vl-7b.hf"]
    loaded = sum(
        2 * prod(shape)
        for key, shape in shapes.items()
        if not key.startswith(("lm_head.", "visual."))
    )
    assert found.stages[0].weights.nbytes == loaded


@pytest.mark.parametrize("fmt", ["q4_k", "nf4", "bf16", "f32"])
def test_decoding_is_counted_by_what_serves_the_format_here(fmt):
    source = one("clip-l.hf")
    assert source.serving.backend(fmt) == best(fmt, "cpu", torch.bfloat16).backend
    assert source.serving.backend("") == "torch"


def test_a_part_the_runtime_has_no_model_for_is_refused():
    logical = bind(Header(manifests()["gemma2-2b.hf"], "BF16"))
    part = detect_component(logical.specs())
    with pytest.raises(ArchitectureError, match="no gemma2_text"):
        part_source(logical, part, dtype=torch.bfloat16, device="cpu")


KINDS = [
    ("unet", "sd15.unet.ldm", {}, True),
    ("flux", "flux-dev.transformer.original", {}, True),
    ("z_image", "z-image.transformer.comfy", {}, True),
    ("qwen_image", "qwen-image.transformer.comfy", {}, True),
    ("clip", "clip-l.hf", {}, False),
    ("open_clip", "openclip-bigg.open_clip", {}, False),
    ("t5", "t5-xxl-encoder.hf", {}, False),
    ("vae_kl", "sd.vae-kl-f8.ldm", {}, False),
    ("vae_qwen", "qwen-image.vae.diffusers", {}, False),
    ("taesd", "taesd.vae.diffusers", {}, False),
]


@pytest.mark.parametrize(("kind", "name", "hyper", "whole"), KINDS)
def test_small_parameters_tables_and_layers_are_those_of_the_model(kind, name, hyper, whole):
    """The split by names and shapes, against the modules of the built model."""
    source = one(name, whole=whole)
    row = MODELS[kind]
    assert row.layout == source.layout
    weights = part_weights(source, compute="BF16")
    shapes = _loaded_shapes(source)
    with torch.device("meta"):
        model = row.module(row.config_from(shapes, hyper)).to(torch.bfloat16)
    layers = [m for m in model.modules() if isinstance(m, PackedLayer)]
    tables = [m for m in layers if isinstance(m, QuantEmbedding)]
    packed = [m for m in layers if m not in tables]
    assert weights.small == sum(2 * p.numel() for p in model.parameters())
    assert weights.tables == sum(2 * prod(m.logical_shape) for m in tables)
    turned = 2 * 1280 * 1280 if kind == "open_clip" else 0  # a projection, held in float32
    assert weights.layers == turned + sum(2 * prod(m.logical_shape) for m in packed)
    assert weights.layer.nbytes == max(2 * prod(m.logical_shape) for m in packed)


def _loaded_shapes(source):
    return {
        a.target: a.shape for a in to_layout(source.part, source.layout) if source.reads(a.target)
    }
