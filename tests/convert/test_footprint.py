"""Memory arithmetic: sums of named tensors, weights as stored, and what each level leaves out."""

import itertools
import json
import lzma
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.spaces import SPACES
from diffquant.convert.binding import bind
from diffquant.convert.footprint import LEVELS, Picture, footprint, needs, with_denoiser
from diffquant.convert.footprint.companions import COMPANIONS, companions_of
from diffquant.convert.footprint.decode import decode_nbytes, usually
from diffquant.convert.footprint.levels import block_count, blocks_nbytes, spread
from diffquant.convert.footprint.moments import Buffer, Moment, largest_buffer, peak
from diffquant.convert.footprint.reach import STRIP_NBYTES
from diffquant.convert.footprint.strips import strip_moments
from diffquant.convert.footprint.transformer_rows import TRANSFORMERS
from diffquant.convert.footprint.vae import decode_moments
from diffquant.convert.footprint.weights import PartSource, part_weights, plan_weights
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
    assert ours.nbytes == sum(ours.blocks) + ours.loose + ours.small
    assert 0 < ours.loose + ours.small < ours.nbytes / 100
    assert ours.tables == 0


def test_weights_are_split_by_what_is_streamed():
    found = estimate("sdxl-base.checkpoint.ldm")
    unet, clip = stage(found, "denoise").weights, stage(found, "encode").weights
    shapes = MANIFESTS["sdxl-base.checkpoint.ldm"]
    unet_keys = [key for key in shapes if key.startswith("model.diffusion_model.")]
    assert unet.small == sum(2 * prod(shapes[key]) for key in unet_keys if len(shapes[key]) == 1)
    assert clip.tables == 2 * (49408 + 77) * 768
    assert unet.nbytes == pytest.approx(unet.small + unet.loose + sum(unet.blocks), abs=1)
    assert unet.layer.nbytes == max(
        2 * prod(shapes[key]) for key in unet_keys if len(shapes[key]) > 1
    )


def test_groups_begin_each_tensor_at_256_bytes():
    shapes = {key: tuple(shape) for key, shape in MANIFESTS["t5-xxl-encoder.hf"].items()}
    logical, match = opened({**shapes, "encoder.block.0.layer.0.SelfAttention.q.weight": (3, 5)})
    weights = part_weights(PartSource(logical, match.parts[0]), compute="BF16")
    plain = sum(2 * prod(one) for key, one in shapes.items() if key.startswith("encoder.block.1."))
    norms = 2 * 2 * 4096
    assert weights.blocks[1] == plain - norms
    q = 2 * 4096 * 4096
    assert weights.blocks[0] == plain - norms - q + 256  # 15 numbers take 256 bytes


def test_a_layer_of_several_pieces_is_decoded_piece_by_piece_and_joined():
    shapes = MANIFESTS["flux-dev.transformer.diffusers"]
    logical, match = opened(shapes, "F8_E4M3")
    weights = part_weights(PartSource(logical, match.parts[0]), compute="BF16")
    largest = max(prod(shape) for shape in MANIFESTS["flux-dev.transformer.original"].values())
    assert weights.scratch.nbytes == 2 * 2 * largest  # the pieces, and the joined weight
    assert "linear1" in weights.scratch.label


def test_a_cpu_lays_the_kernels_of_convolutions_out_again():
    largest = 1280 * 2560 * 9
    logical, match = opened(MANIFESTS["sd15.unet.ldm"], "F32")
    gpu, cpu = (
        part_weights(PartSource(logical, match.parts[0], serving=usually(device)), compute="F32")
        for device in ("cuda", "cpu")
    )
    assert (gpu.scratch.nbytes, cpu.scratch.nbytes) == (0, 4 * largest)
    logical, match = opened(MANIFESTS["sd15.unet.ldm"])
    source = PartSource(logical, match.parts[0], serving=usually("cpu"))
    assert part_weights(source, compute="F32").scratch.nbytes == 2 * 4 * largest
    logical, match = opened(MANIFESTS["flux-dev.transformer.original"], "F32")
    source = PartSource(logical, match.parts[0], serving=usually("cpu"))
    assert part_weights(source, compute="F32").scratch.nbytes == 0  # matrices are not


def test_keys_that_a_loader_does_not_read_are_left_out():
    logical, match = opened(MANIFESTS["qwen2.5-vl-7b.hf"])
    every = PartSource(logical, match.parts[0])
    some = replace(every, reads=lambda key: not key.startswith(("lm_head.", "visual.")))
    whole, read = (part_weights(one, compute="BF16").nbytes for one in (every, some))
    vision = sum(
        2 * prod(shape)
        for key, shape in MANIFESTS["qwen2.5-vl-7b.hf"].items()
        if key.startswith("visual.") or key.startswith("lm_head.")
    )
    assert whole - read == vision > 2 << 30


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
    fixed = weights.small + weights.loose
    assert LEVELS["blocks"]((), denoise) == fixed + 2 * max(weights.blocks)
    assert fixed > 0


def test_decoders_are_whole_at_blocks_and_streamed_by_layer_at_sequential():
    weights = stage(estimate("sdxl-base.checkpoint.ldm"), "decode").weights
    decode = stage(estimate("sdxl-base.checkpoint.ldm"), "decode")
    assert weights.blocks == ()
    assert LEVELS["blocks"]((), decode) == weights.nbytes
    assert LEVELS["sequential"]((), decode) == weights.small + 2 * weights.layer.nbytes


def test_tables_of_tokens_are_on_the_device_only_where_nothing_is_streamed():
    found = estimate("sdxl-base.checkpoint.ldm")
    encode = stage(found, "encode")
    weights, alone = encode.weights, (encode,)
    assert LEVELS["model"](alone, encode) == weights.nbytes
    assert weights.tables == 2 * (49408 + 77) * 768
    assert blocks_nbytes(weights, len(weights.blocks)) == weights.nbytes - weights.tables


def test_small_parameters_of_every_part_stay():
    stages = estimate("sdxl-base.checkpoint.ldm").stages
    small = sum(one.weights.small for one in stages)
    for level in ("model", "blocks", "sequential"):
        for one in stages:
            others = small - one.weights.small
            assert LEVELS[level](stages, one) == LEVELS[level]((one,), one) + others
            assert others > 0


@pytest.mark.parametrize(("total", "kept"), [(57, 0), (57, 1), (57, 20), (57, 57), (2, 1)])
def test_blocks_that_stay_are_spread_evenly(total, kept):
    stay = sorted(spread(total, kept))
    assert len(stay) == kept
    assert all(0 <= index < total for index in stay)
    gaps = {after - before for before, after in itertools.pairwise(stay)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_blocks_that_stay_are_what_the_budget_leaves():
    found = estimate("flux-dev.transformer.original")
    denoise = stage(found, "denoise")
    weights = denoise.weights
    moment = denoise.activations.nbytes + denoise.scratch
    for kept in (0, 3, 30, 56, 57):
        budget = blocks_nbytes(weights, kept) + moment
        assert block_count(found, denoise, budget) >= kept
    assert block_count(found, denoise, 0) == 0
    exact = blocks_nbytes(weights, 57) + moment
    assert exact == weights.nbytes + moment
    assert block_count(found, denoise, exact - 1) < 57


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


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_kernels_that_write_the_result_at_once_take_the_result(backend):
    for compute, each in (("BF16", 2), ("F32", 4)):
        found = {
            decode_nbytes(fmt, 1000, compute=compute, backend=backend)
            for fmt in ("q4_k", "nf4_dq", "int8_convrot", "fp8_e4m3_scaled")
        }
        assert found == {1000 * each}
    assert decode_nbytes("", 1000, compute="BF16", backend=backend) == 12_000


@pytest.mark.parametrize("name", ["taesd.decoder.original", "taef1.decoder.original"])
def test_tiny_decoders_hold_three_maps(name):
    shapes = {key: tuple(shape) for key, shape in MANIFESTS[name].items()}
    found = peak(decode_moments("vae_tiny_decoder", shapes, height=64, width=64, itemsize=2))
    assert found.nbytes == 3 * 64 * 512 * 512 * 2
