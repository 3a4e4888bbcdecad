"""Memory arithmetic: sums of named tensors, weights as stored, and what each level leaves out."""

import json
import lzma
from math import prod
from pathlib import Path

import pytest

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.spaces import SPACES
from diffquant.convert.binding import bind
from diffquant.convert.footprint import LEVELS, Picture, footprint, needs, with_denoiser
from diffquant.convert.footprint.companions import COMPANIONS, companions_of
from diffquant.convert.footprint.decode import decode_nbytes
from diffquant.convert.footprint.levels import block_count
from diffquant.convert.footprint.moments import Buffer, Moment, largest_buffer, peak
from diffquant.convert.footprint.reach import STRIP_NBYTES
from diffquant.convert.footprint.strips import strip_moments
from diffquant.convert.footprint.transformer_rows import TRANSFORMERS
from diffquant.convert.footprint.vae import decode_moments
from diffquant.convert.footprint.weights import plan_weights
from diffquant.convert.plan import Request, make_plan
from diffquant.convert.recognise import recognise
from diffquant.core.tensors import TensorSpec
from diffquant.quant.types import type_named

DATA = Path(__file__).parents[1] / "data"
MIB = 1 << 20


def manifests():
    found = {}
    for name in ("manifests", "more_manifests"):
        found.update(json.loads(lzma.decompress((DATA / f"{name}.json.xz").read_bytes())))
    return found


MANIFESTS = manifests()


class Header:
    """A source of which nothing can be read."""

    container, path, metadata, configs = "safetensors", Path("header"), {}, {}

    def __init__(self, shapes, dtype):
        self.specs = {key: TensorSpec(key, dtype, tuple(shape)) for key, shape in shapes.items()}


def opened(shapes, dtype="BF16"):
    logical = bind(Header(shapes, dtype))
    return logical, recognise(logical.specs())


def estimate(name, *, dtype="BF16", **picture):
    logical, match = opened(MANIFESTS[name], dtype)
    given = {"width": 1024, "height": 1024, "copied": False, **picture}  # what models ask for alone
    return footprint(logical, match, Picture(**given))


def stage(found, name):
    return next(one for one in found.stages if one.name == name)


def test_the_peak_is_the_largest_sum_and_its_line_names_every_part_of_it():
    moments = [
        Moment("early", (Buffer("a", 5 * MIB),)),
        Moment("late", (Buffer("a", MIB), Buffer("pair", 6 * MIB, 2))),
    ]
    assert peak(moments).where == "late"
    assert peak(moments).derivation == "late: pair 6.0 + a 1.0 MiB"
    assert largest_buffer(moments) == Buffer("a", 5 * MIB)


def test_nothing_to_walk_is_no_memory():
    assert peak([]).nbytes == 0
    assert largest_buffer([]).nbytes == 0


def test_sdxl_decodes_through_three_maps_of_256_channels():
    found = stage(estimate("sdxl-base.checkpoint.ldm"), "decode")
    assert found.activations.nbytes == 3 * 256 * 1024 * 1024 * 2
    assert found.weights.nbytes == 2 * 83_653_863


def test_in_strips_a_block_s_two_maps_decide_and_from_the_host_strips_alone():
    found = stage(estimate("sdxl-base.checkpoint.ldm"), "decode")
    maps = (256 + 128) * 1024 * 1024 * 2
    assert maps < found.tiled.nbytes < maps + 6 * STRIP_NBYTES
    assert found.tiled.where.startswith("decoder.up.0.block.0.conv2")
    assert 3 * STRIP_NBYTES < found.host.nbytes < 9 * STRIP_NBYTES


def test_a_picture_of_four_times_the_pixels_takes_no_wider_strips():
    shapes = MANIFESTS["sd.vae-kl-f8.ldm"]
    small, large = (
        peak(
            one
            for one in strip_moments(
                "vae_kl", shapes, height=side, width=side, itemsize=2, host=True
            )
            if "attn" not in one.where  # keys and values are of all pixels
        )
        for side in (128, 256)
    )
    assert large.nbytes < 1.2 * small.nbytes


def test_convolutions_that_copy_hold_their_input_and_output_twice():
    found = stage(estimate("sdxl-base.checkpoint.ldm", copied=True), "decode").activations
    assert found.where == "decoder.up.1.upsample: doubling"
    assert found.nbytes == 256 * (512 * 512 + 4 * 1024 * 1024) * 2


def test_weights_count_as_they_are_stored():
    for dtype, each in (("F32", 4), ("BF16", 2), ("F8_E4M3", 1)):
        found = stage(estimate("flux-dev.transformer.original", dtype=dtype), "denoise")
        assert found.weights.nbytes == 11_901_408_320 * each


def test_the_blocks_of_both_namings_are_those_that_are_streamed():
    ours = stage(estimate("flux-dev.transformer.original"), "denoise").weights
    theirs = stage(estimate("flux-dev.transformer.diffusers"), "denoise").weights
    assert len(ours.blocks) == 19 + 38
    assert sorted(ours.blocks) == sorted(theirs.blocks)
    assert ours.nbytes == sum(ours.blocks) + ours.rest
    assert 0 < ours.rest < ours.nbytes / 100


@pytest.mark.parametrize(
    "name",
    [
        "sd15.unet.ldm",
        "sdxl-base.unet.ldm",
        "flux-dev.transformer.original",
        "sd3.5-medium.transformer.original",
        "qwen-image.transformer.comfy",
        "z-image.transformer.comfy",
        "hidream-i1.transformer.original",
    ],
)
def test_activations_grow_with_the_picture_and_the_batch(name):
    def denoise(**picture):
        return stage(estimate(name, **picture), "denoise").activations.nbytes

    small, wide, two = denoise(), denoise(width=2048), denoise(batch=2)
    assert 1.7 * small < wide <= 2.0 * small
    assert two == pytest.approx(2 * small)
    assert denoise(compute="F32") > 1.4 * small


def test_guidance_doubles_the_batch_only_where_predictions_run_together():
    unet = estimate("sd15.unet.ldm")
    assert unet.guided
    assert any("one batch" in note for note in unet.notes)
    qwen = estimate("qwen-image.transformer.comfy")
    assert any("one after the other" in note for note in qwen.notes)
    assert not estimate("flux-dev.transformer.original").guided


def test_parts_the_file_lacks_are_estimated_and_marked():
    bare = estimate("flux-dev.transformer.original")
    assert [(one.title, one.in_file) for one in bare.stages] == [
        ("CLIP-L", False),
        ("T5-XXL encoder", False),
        ("Flux.1", True),
        ("autoencoder of Flux.1", False),
    ]
    whole = estimate("flux-dev.checkpoint-comfy-fp8")
    assert all(one.in_file for one in whole.stages)
    for there, guessed in zip(whole.stages, bare.stages, strict=True):
        assert there.weights.nbytes == pytest.approx(guessed.weights.nbytes, rel=0.001)
        assert there.activations.nbytes == pytest.approx(guessed.activations.nbytes, rel=0.001)


@pytest.mark.parametrize(
    ("name", "manifest"),
    [
        ("clip_l", "clip-l.hf"),
        ("clip_g", "openclip-bigg.hf"),
        ("clip_h", "openclip-h.open_clip"),
        ("t5_xxl", "t5-xxl-encoder.hf"),
        ("gemma2_2b", "gemma2-2b.hf"),
        ("qwen2_5_vl_7b", "qwen2.5-vl-7b.hf"),
    ],
)
def test_companions_are_as_large_as_the_models_they_stand_for(name, manifest):
    assert COMPANIONS[name].parameters == sum(prod(shape) for shape in MANIFESTS[manifest].values())


@pytest.mark.parametrize("slug", ARCHITECTURES)
def test_every_architecture_names_known_companions_and_spaces(slug):
    row = ARCHITECTURES[slug]
    for variant in row.variants:
        assert set(companions_of(slug, variant.name) or ()) <= set(COMPANIONS)
        assert row.space_for(variant.name) in ("", *SPACES)
    space = SPACES[row.latent.space]
    assert (space.channels, space.downscale) == (row.latent.channels, row.latent.downscale)
    assert row.latent.scaling_factor in (None, space.scaling_factor)
    assert row.latent.shift_factor in (None, space.shift_factor)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_every_row_of_transformers_finds_its_widths_in_a_model_of_that_kind(kind):
    sizes = TRANSFORMERS[kind].sizes
    assert any(all(key in shapes for key, _ in sizes.values()) for shapes in MANIFESTS.values())


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_widths_are_read_off_the_blocks_where_two_namings_have_no_link(naming):
    found = stage(estimate(f"krea2.transformer.{naming}"), "denoise").activations
    assert found.where == "block: gated MLP"
    assert found.nbytes == pytest.approx(2 * (4608 * (3 * 16384 + 4 * 6144) + 512 * 6144), rel=0.01)


def test_a_kind_nobody_measured_says_so():
    found = estimate("hidream-i1.transformer.original")
    assert stage(found, "denoise").activations.nbytes > 0
    assert any("rule of thumb" in note for note in found.notes)


def test_an_unknown_latent_space_leaves_activations_out_and_says_so():
    found = estimate("hunyuan-dit-1.2.transformer.diffusers")
    assert stage(found, "denoise").activations.nbytes == 0
    assert any("latent space is not stated" in note for note in found.notes)
    assert not any(one.name == "decode" for one in found.stages)


def test_a_model_without_a_layer_its_kin_have_is_noted_and_does_not_stop_the_rest():
    shapes = dict(MANIFESTS["sd15.checkpoint.ldm-webui-fp16"])
    for key in [key for key in shapes if "ff.net.2.weight" in key]:
        del shapes[key]
    logical, match = opened(shapes)
    found = footprint(logical, match, Picture(512, 512))
    assert stage(found, "denoise").activations.nbytes == 0
    assert any("its activations are not estimated" in note for note in found.notes)
    assert stage(found, "decode").activations.nbytes > 0


def test_float16_decodes_sdxl_in_float32():
    found = estimate("sdxl-base.checkpoint.ldm", dtype="F16", compute="F16")
    assert stage(found, "decode").activations.nbytes == 3 * 256 * 1024 * 1024 * 4
    assert any("float32" in note for note in found.notes)


def test_each_level_needs_no_more_than_the_one_before_and_strips_never_cost():
    for name in ("sdxl-base.checkpoint.ldm", "flux-dev.transformer.original"):
        found = needs(estimate(name))
        by_level = {(one.level, one.tiled): one.nbytes for one in found}
        assert [one.level for one in found[::2]] == list(LEVELS)
        for level in LEVELS:
            assert by_level[level, True] <= by_level[level, False]
        for faster, slower in zip(list(LEVELS), list(LEVELS)[1:], strict=False):
            assert by_level[slower, False] <= by_level[faster, False]


def test_model_level_holds_the_largest_part_alone():
    found = estimate("flux-dev.transformer.original")
    need = {one.level: one for one in needs(found) if not one.tiled}
    denoise = stage(found, "denoise")
    assert need["model"].nbytes == denoise.weights.nbytes + denoise.activations.nbytes
    everything = sum(one.weights.nbytes for one in found.stages)
    assert need["none"].nbytes == everything + max(
        one.activations.nbytes + one.scratch for one in found.stages
    )


def test_blocks_level_holds_two_blocks_and_what_is_no_block():
    denoise = stage(estimate("sdxl-base.unet.ldm"), "denoise")
    weights = denoise.weights
    assert LEVELS["blocks"]((), denoise) == weights.rest + 2 * max(weights.blocks)
    assert weights.rest > 0


def test_decoders_are_never_streamed():
    decode = stage(estimate("sdxl-base.checkpoint.ldm"), "decode")
    assert decode.weights.blocks == ()
    assert LEVELS["blocks"]((), decode) == LEVELS["sequential"]((), decode) == decode.weights.nbytes


def test_blocks_that_stay_are_what_the_budget_leaves():
    denoise = stage(estimate("flux-dev.transformer.original"), "denoise")
    fixed = denoise.weights.rest + denoise.activations.nbytes + denoise.scratch
    small, large = min(denoise.weights.blocks), max(denoise.weights.blocks)
    assert block_count(denoise, fixed + 2 * large + 3 * small) == 3
    assert block_count(denoise, fixed + 2 * large + 3 * small - 1) == 2
    assert block_count(denoise, fixed + sum(denoise.weights.blocks)) == 57
    assert block_count(denoise, 0) == 0


def test_a_planned_type_replaces_the_weights_of_the_denoiser_alone():
    logical, match = opened(MANIFESTS["flux-dev.transformer.original"])
    before = footprint(logical, match, Picture(1024, 1024))
    plan = make_plan(logical, match, Request("gguf", type=type_named("q4_k_s")))
    weights = plan_weights(plan.part_steps("denoiser"), compute="BF16")
    after = with_denoiser(before, weights)
    assert weights.nbytes == plan.nbytes
    assert len(weights.blocks) == 57
    assert weights.scratch.nbytes > 0
    assert [one.activations for one in after.stages] == [one.activations for one in before.stages]
    assert stage(after, "encode") == stage(before, "encode")


@pytest.mark.parametrize(
    ("fmt", "compute", "each"),
    [("bf16", "BF16", 0), ("f16", "BF16", 2), ("fp8_e4m3", "F32", 4), ("q4_k", "BF16", 9.28)],
)
def test_decoding_takes_nothing_for_what_is_stored_as_computed(fmt, compute, each):
    assert decode_nbytes(fmt, 1000, compute=compute) == 1000 * each


@pytest.mark.parametrize("name", ["taesd.decoder.original", "taef1.decoder.original"])
def test_tiny_decoders_hold_three_maps(name):
    shapes = {key: tuple(shape) for key, shape in MANIFESTS[name].items()}
    found = peak(decode_moments("vae_tiny_decoder", shapes, height=64, width=64, itemsize=2))
    assert found.nbytes == 3 * 64 * 512 * 512 * 2
