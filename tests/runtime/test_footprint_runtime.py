"""Memory arithmetic against the runtime's own models, where they differ from other programs'.

Every live tensor of a run at full width is counted on torch's meta device; test_footprint.py does
the same for models that the runtime shares with them.
"""

import importlib.util
import json
import lzma
import re
from pathlib import Path

import pytest
import torch

from diffquant.convert.footprint.encoders import encoder_moment, sizes_of
from diffquant.convert.footprint.moments import peak
from diffquant.convert.footprint.transformer import row_for, transformer_moments
from diffquant.convert.footprint.vae_runtime import encode_moments, still_moments
from diffquant.runtime.models import (
    clip,
    flux2,
    qwen_image,
    qwen_text,
    t5,
    taesd,
    vae_kl,
    vae_qwen,
    z_image,
)

_spec = importlib.util.spec_from_file_location(
    "counting_live_tensors", Path(__file__).with_name("test_footprint.py")
)
counting = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(counting)
peak_of, meta, built = counting.peak_of, counting.meta, counting.built
TOKENS = 4096  # a picture of 1024 x 1024 in patches of 16 pixels
TEXT = 512
HALF_HEAD = 64


def shapes_of(name, dropped=r"$^"):
    found = {}
    for file in ("manifests", "more_manifests"):
        found |= json.loads(lzma.decompress((counting.DATA / f"{file}.json.xz").read_bytes()))
    return {key: tuple(shape) for key, shape in found[name].items() if not re.search(dropped, key)}


@pytest.fixture
def counted(peak_of, monkeypatch):
    """peak_of, with attention and rotary tables as the models here import them."""
    for module in (qwen_text, t5, clip):
        monkeypatch.setattr(module, "scaled_dot_product_attention", counting.tiled_attention)

    def tables(ids, _axes, _theta, _device):
        shape = (*ids.shape[:-1], HALF_HEAD)
        return tuple(meta(*shape, dtype=torch.float32) for _ in range(2))

    for module in (z_image, qwen_image, flux2):
        monkeypatch.setattr(module, "rotary", tables)  # made on the CPU, and small
    return peak_of


def _z_image(model):
    given = meta(1, 16, 128, 128), meta(1, dtype=torch.float32), meta(1, TEXT, 2560)
    return given, lambda: model(*given)


def _qwen_image(model):
    given = meta(1, TOKENS, 64), meta(1, dtype=torch.float32), meta(1, TEXT, 3584)
    return given, lambda: model(*given, [(1, 64, 64)])


def _flux2(model):
    time = meta(1, dtype=torch.float32)
    given = meta(1, 128, 64, 64), time, meta(1, TEXT, model.config.context)
    return given, lambda: model(*given, time if model.config.guidance else None)


# Kind, manifest, blocks beyond the first ones, module, model, call.
DENOISERS = [
    ("z_image", "z-image.transformer.comfy", z_image, z_image.ZImage, _z_image),
    ("qwen_image", "qwen-image.transformer.comfy", qwen_image, qwen_image.QwenImage, _qwen_image),
    ("flux2", "flux2-klein-4b.transformer.original", flux2, flux2.Flux2, _flux2),
    ("flux2", "flux2-dev.transformer.original", flux2, flux2.Flux2, _flux2),
]
_LATER = (
    r"^(layers|noise_refiner|context_refiner|double_blocks|single_blocks)\.[1-9]"
    r"|^transformer_blocks\.([2-9]|\d\d)"
)


@pytest.mark.parametrize(("kind", "name", "module", "model", "call"), DENOISERS)
def test_denoisers_take_what_their_runtime_rows_say(counted, kind, name, module, model, call):
    shapes = shapes_of(name, _LATER)
    made = built(lambda: model(module.config_from(shapes, {})))
    given, run = call(made)
    row = row_for(kind, shapes, ours=True)
    found = peak(
        transformer_moments(row, shapes, image_tokens=TOKENS, text_tokens=TEXT, batch=1, itemsize=2)
    )
    assert found.nbytes == pytest.approx(counted(made, given, run), rel=0.02)
    assert not row.joined


ENCODERS = [
    ("qwen2_vl_text", "qwen2.5-vl-7b.hf", qwen_text, qwen_text.QwenText),
    ("qwen3_text", "qwen3-4b.hf", qwen_text, qwen_text.QwenText),
    ("t5_encoder", "t5-xxl-encoder.hf", t5, t5.T5Encoder),
    ("clip_text", "clip-l.hf", clip, clip.ClipText),
    ("clip_text", "openclip-bigg.hf", clip, clip.ClipText),
]


@pytest.mark.parametrize(("kind", "name", "module", "model"), ENCODERS)
def test_text_encoders_take_what_is_counted(counted, kind, name, module, model):
    shapes = shapes_of(name, r"^lm_head|^visual|position_ids|^encoder\.embed_tokens")
    made = built(lambda: model(module.config_from(shapes, {})))
    tokens, batch = (77, 2) if kind == "clip_text" else (TEXT, 1)
    ids = meta(batch, tokens, dtype=torch.int64)
    found = encoder_moment(
        sizes_of(shapes, kind), text_tokens=tokens, batch=batch, itemsize=2, ours=True
    )
    assert found.nbytes == pytest.approx(counted(made, (ids,), lambda: made(ids)), rel=0.05)


VAES = [
    ("vae_kl", "sd.vae-kl-f8.ldm", vae_kl, vae_kl.AutoencoderKL),
    ("vae_qwen", "qwen-image.vae.diffusers", vae_qwen, vae_qwen.QwenVae),
    ("vae_tiny", "taesd.vae.diffusers", taesd, taesd.Taesd),
]
SIZE = (768, 1344)


@pytest.mark.parametrize(("kind", "name", "module", "model"), VAES)
def test_encoding_a_picture_takes_what_is_counted(counted, kind, name, module, model):
    shapes = shapes_of(name, "time_conv")
    made = built(lambda: model(module.config_from(shapes, {})))
    x = meta(1, 3, *SIZE)
    found = peak(encode_moments(kind, shapes, height=SIZE[0], width=SIZE[1], itemsize=2))
    assert found.nbytes == pytest.approx(counted(made, (x,), lambda: made.encode(x)), rel=0.02)


def test_qwen_image_decodes_a_still_picture_without_frames(counted):
    shapes = shapes_of("qwen-image.vae.diffusers", "time_conv")
    made = built(lambda: vae_qwen.QwenVae(vae_qwen.config_from(shapes, {})))
    height, width = SIZE[0] // 8, SIZE[1] // 8
    z = meta(1, 16, height, width)
    found = peak(still_moments(shapes, height=height, width=width, itemsize=2))
    assert found.nbytes == pytest.approx(counted(made, (z,), lambda: made.decode(z)), rel=0.02)
