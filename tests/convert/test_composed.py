"""Checkpoints with parts of other files in them, and with their EMA weights."""

from __future__ import annotations

import numpy as np
import pytest

from diffquant.convert.composed import AddedPart, composed
from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.request import Request
from diffquant.core.errors import UsageError
from diffquant.core.tensors import TensorSpec
from diffquant.inspect.describe import describe
from diffquant.io import open_sink, open_source

LDM = "model.diffusion_model."


def job(source, out, **asked):
    return run_job(source, out, Request(container=container_for(out), **asked))


@pytest.fixture(scope="module")
def checkpoint(examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "sd15.safetensors"
    job(examples / "sd15-shapes", out)
    return out


def values(path, key):
    with open_source(path) as source:
        return bytes(source.read(key))


def with_ema(path, out, *, shift=0, without=()):
    """A copy of a checkpoint, and averages that differ from the weights in every byte."""
    with open_source(path) as source:
        rows = {key: np.array(source.read(key)) for key in source.specs}
        specs = list(source.specs.values())
    for spec in list(specs):
        if spec.key.startswith(LDM) and spec.key not in without:
            key = "model_ema." + spec.key.removeprefix("model.").replace(".", "")
            specs.append(TensorSpec(key, spec.dtype, (*spec.shape[:1], *spec.shape[1:])))
            rows[key] = rows[spec.key] ^ 0x01
    with open_sink(out, specs, {}) as sink:
        for key, data in rows.items():
            sink.write(key, 0, data)
        sink.commit()
    return out


def test_a_vae_takes_the_place_of_the_old_one(checkpoint, examples, tmp_path):
    out = tmp_path / "other.safetensors"
    report = job(checkpoint, out, added=(AddedPart("vae", examples / "sdxl-shapes"),))
    assert any("vae is that of sdxl-shapes" in note for note in report.notes)
    key = "first_stage_model.decoder.conv_in.weight"
    with open_source(examples / "sdxl-shapes") as other:
        assert values(out, key) == bytes(other.read("vae/decoder.conv_in.weight"))
    same = f"{LDM}input_blocks.0.0.weight"
    assert values(out, same) == values(checkpoint, same)


def test_parts_make_a_checkpoint_of_a_bare_denoiser(checkpoint, examples, tmp_path):
    bare, out = tmp_path / "unet.safetensors", tmp_path / "all.safetensors"
    job(checkpoint, bare, parts=("denoiser",))
    vae, clip = tmp_path / "vae.safetensors", tmp_path / "clip.safetensors"
    job(checkpoint, vae, parts=("vae",))
    job(checkpoint, clip, parts=("text_encoder",))
    job(bare, out, added=(AddedPart("vae", vae), AddedPart("text_encoder", clip)))
    with open_source(checkpoint) as one, open_source(out) as two:
        assert dict(one.specs) == dict(two.specs)
        assert all(bytes(one.read(key)) == bytes(two.read(key)) for key in one.specs)


def test_a_folder_takes_the_config_of_its_new_part(examples, tmp_path):
    out = tmp_path / "folder"
    job(examples / "sd15-shapes", out, added=(AddedPart("vae", examples / "sdxl-shapes" / "vae"),))
    with open_source(out) as source:
        assert source.configs["vae/config.json"]["scaling_factor"] == 0.13025
    assert describe(out).architecture == "sd15"


def test_parts_of_another_kind_are_refused(checkpoint, examples, tmp_path):
    out = tmp_path / "no.safetensors"
    for name, folder, said in (
        ("vae", "flux1-shapes", "16 latent channels, sd15 needs 4"),
        ("vae", "sd15-shapes/unet", "expected vae_kl, found denoiser"),
        ("text_encoder_2", "sdxl-shapes", "sd15 has no part text_encoder_2"),
    ):
        with pytest.raises(UsageError, match=said):
            job(checkpoint, out, added=(AddedPart(name, examples / folder),))
    assert not out.exists()


def test_averages_stand_in_for_the_weights(checkpoint, tmp_path):
    kept = f"{LDM}out.0.bias"
    source = with_ema(checkpoint, tmp_path / "ema.safetensors", without=(kept,))
    out, plain = tmp_path / "out.safetensors", tmp_path / "plain.safetensors"
    report = job(source, out, use_ema=True)
    assert any("1 weights have no average" in note for note in report.notes)
    key = f"{LDM}input_blocks.0.0.weight"
    average = "model_ema.diffusion_modelinput_blocks00weight"
    assert values(out, key) == values(source, average) != values(source, key)
    assert values(out, kept) == values(source, kept)
    job(source, plain)
    assert values(plain, key) == values(source, key)
    for written in (out, plain):
        with open_source(written) as found:
            assert not any(one.startswith("model_ema.") for one in found.specs)


def test_a_checkpoint_without_averages_says_so(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="no EMA weights"):
        job(checkpoint, tmp_path / "out.safetensors", use_ema=True)


def test_a_composed_source_is_a_source(checkpoint, examples):
    part = AddedPart("vae", examples / "sdxl-shapes")
    with open_source(checkpoint) as base, composed(base, parts=(part,)) as source:
        key = "first_stage_model.decoder.conv_in.weight"
        rows = source.read(key, (0, 1))
        assert rows.size == source.specs[key].row_nbytes
        assert source.nbytes == sum(spec.nbytes for spec in source.specs.values())
        assert source.metadata == base.metadata


def test_header_pairs_are_written_and_removed(checkpoint, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    job(checkpoint, one, pairs={"modelspec.title": "Shapes"})
    job(one, two, pairs={"modelspec.title": "", "author": "me"})
    with open_source(one) as source:
        assert source.metadata["modelspec.title"] == "Shapes"
    with open_source(two) as source:
        assert "modelspec.title" not in source.metadata
        assert source.metadata["author"] == "me"


@pytest.mark.parametrize(("width", "taken"), [(1280, False), (96, True)])
def test_clip_and_openclip_of_published_widths_are_told_apart(
    write, examples, tmp_path, width, taken
):
    """With a projection, CLIP's names are OpenCLIP's: of a width of its own it is what is asked."""
    body = "text_model."
    keys = ("embeddings.position_embedding", "final_layer_norm")
    keys += ("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.mlp.fc1")
    shapes = {f"{body}{key}.weight": (2, 2) for key in keys}
    shapes |= {"text_projection.weight": (2, 2)}
    shapes |= {f"{body}embeddings.token_embedding.weight": (4, width)}
    file = write(tmp_path / "g.safetensors", {k: np.zeros(s, "<f4") for k, s in shapes.items()})
    wanted = AddedPart("text_encoder", file)
    bare = examples / "sd15-shapes" / "unet" / "diffusion_pytorch_model.safetensors"
    if not taken:
        with pytest.raises(UsageError, match=r"expected clip_text, found text_encoder_2"):
            job(bare, tmp_path / "no.safetensors", added=(wanted,))
        return
    job(bare, tmp_path / "out.safetensors", added=(wanted,))
    with open_source(tmp_path / "out.safetensors") as source:
        key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
        assert source.specs[key].shape == (4, width)
