"""One matcher for check, convert and merge: the same layers fit in all of them."""

import numpy as np
import pytest

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.lora.conversion import convert_lora
from diffquant.convert.lora.extraction import extract_lora
from diffquant.convert.lora.match import match_lora
from diffquant.convert.lora.merge import LoraInput, merging
from diffquant.convert.lora.parse import parse_lora
from diffquant.convert.lora.ranks import Keep
from diffquant.convert.request import Request
from diffquant.inspect.lora_check import check_lora
from diffquant.inspect.subject import open_subject
from diffquant.io import open_source

PROJECTION = "conditioner.embedders.1.model.text_projection"
NAME = "lora_te2_text_projection"
ATTN = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1"


def pair(name, rows, columns, rank=2, seed=0):
    rng = np.random.default_rng(seed)
    down = rng.standard_normal((rank, columns)).astype(np.float32)
    up = rng.standard_normal((rows, rank)).astype(np.float32)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return {**tensors, f"{name}.alpha": np.array(rank / 2, np.float32)}, up @ down / 2


def array(path, key):
    with open_source(path) as source:
        assert source.specs[key].dtype == "F32"
        return source.read(key).view("<f4").reshape(source.specs[key].shape)


@pytest.fixture(scope="module")
def sdxl(examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdxl") / "sdxl.safetensors"
    run_job(examples / "sdxl-shapes", out, Request(container="safetensors", dtype="f32"))
    return out


def checked(lora, base):
    with open_subject(lora) as one, open_subject(base) as two:
        return check_lora(one, two)


def merged(base, out, lora, **rest):
    with merging(base, (LoraInput(lora),), **rest) as found:
        run_job(base, out, found.into(Request(container=container_for(out))), beside=found.paths)
    return found


def test_check_convert_merge_and_generate_agree_on_every_layer(sdxl, write, tmp_path):
    tensors = {}
    for index, (name, rows, columns) in enumerate(
        [
            (f"{ATTN}_to_q", 96, 96),
            (f"{ATTN}_to_k", 320, 320),
            (NAME, *array(sdxl, PROJECTION).shape),
            ("lora_te2_text_model_encoder_layers_0_self_attn_k_proj", 8, 8),
            ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 8, 8),
            ("lora_unet_nowhere", 8, 8),
        ]
    ):
        tensors |= pair(name, rows, columns, seed=index)[0]
    lora = write(tmp_path / "a.safetensors", tensors)
    check = checked(lora, sdxl)
    fits = {one.name for one in check.layers if one.verdict == "matched"}
    reasons = {one.name: one.reason for one in check.layers if one.reason}
    assert NAME in fits
    found = merged(sdxl, tmp_path / "m.safetensors", lora, allow_missing=True)
    [file] = found.found
    assert {one.adapter.name for one in file.match.targets} == fits
    skipped = dict((*file.match.unmatched, *file.match.mismatched))
    absent = {name: f"the model has no {part}" for name, part in file.match.absent}
    assert {**skipped, **absent} == reasons
    report = convert_lora(
        lora, tmp_path / "c.safetensors", to="comfy", base=sdxl, allow_missing=True
    )
    assert dict(report.left_out) == reasons


def test_clip_g_projection_is_merged_into_its_transpose(sdxl, write, tmp_path, examples):
    before = array(sdxl, PROJECTION)
    tensors, delta = pair(NAME, *before.shape[::-1])
    lora = write(tmp_path / "a.safetensors", tensors)
    assert checked(lora, sdxl).verdict == "applies"
    for base in (sdxl, examples / "sdxl-shapes"):
        out = tmp_path / f"{base.stem}.safetensors"
        with merging(base, (LoraInput(lora),)) as found:
            request = found.into(Request(container="safetensors", dtype="f32"))
            run_job(base, out, request, beside=found.paths)
        np.testing.assert_allclose(array(out, PROJECTION), before + delta.T, atol=1e-5)


def test_clip_g_projection_is_converted_and_extracted(sdxl, write, tmp_path):
    before = array(sdxl, PROJECTION)
    tensors, delta = pair(NAME, *before.shape[::-1])
    lora = write(tmp_path / "a.safetensors", tensors)
    convert_lora(lora, tmp_path / "b.safetensors", to="diffusers", base=sdxl)
    key = "text_encoder_2.text_projection.lora_{}.weight"
    up, down = (array(tmp_path / "b.safetensors", key.format(one)) for one in "BA")
    np.testing.assert_allclose(up @ down, delta, atol=1e-6)
    merged(sdxl, tmp_path / "m.safetensors", lora)
    out = tmp_path / "x.safetensors"
    extract_lora(tmp_path / "m.safetensors", sdxl, out, Keep(2), dtype="f32")
    up, down = (array(out, f"{NAME}.lora_{one}.weight") for one in ("up", "down"))
    np.testing.assert_allclose(up @ down, delta, atol=1e-4)


def test_generate_is_given_the_transpose(sdxl, write, tmp_path):
    shape = array(sdxl, PROJECTION).shape
    lora = write(tmp_path / "a.safetensors", pair(NAME, *shape[::-1])[0])
    parts = {"denoiser": {}, "text_encoder_2": {"text_projection": shape}}
    with open_source(lora) as source:
        [target] = match_lora(parse_lora(source).layers, ARCHITECTURES["sdxl"], parts).targets
    assert (target.key, target.transposed, target.rows) == ("text_projection", True, None)
