"""Architectures: both namings of every component lead to each other, and the rows are sound."""

import functools
import json
import lzma
import re
from pathlib import Path

import pytest

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.rules import apply_rules, invert
from diffquant.core.errors import MissingKeys, NotInvertible, UnmappedKeys

DATA = Path(__file__).parents[1] / "data" / "manifests.json.xz"


@functools.cache
def _manifests():
    return json.loads(lzma.decompress(DATA.read_bytes()))


def shapes_of(name):
    return {key: tuple(shape) for key, shape in _manifests()[name].items()}


def component_of(kind, slug=None):
    rows = [ARCHITECTURES[slug]] if slug else ARCHITECTURES.values()
    return next(one for row in rows for one in row.components if one.kind == kind)


PAIRS = [  # kind, architecture, Diffusers manifest, canonical manifest
    ("unet_ldm", "sd15", "sd15.unet.diffusers", "sd15.unet.ldm"),
    ("unet_ldm", "sd15", "sd15-inpainting.unet.diffusers", "sd15-inpainting.unet.ldm"),
    ("unet_ldm", "sd15", "sdxs-512.unet.diffusers", "sdxs-512.unet.ldm"),
    ("unet_ldm", "sd2", "sd21.unet.diffusers", "sd21.unet.ldm"),
    ("unet_ldm", "sdxl", "sdxl-base.unet.diffusers", "sdxl-base.unet.ldm"),
    ("unet_ldm", "sdxl", "sdxl-inpainting.unet.diffusers", "sdxl-inpainting.unet.ldm"),
    ("unet_ldm", "sdxl_refiner", "sdxl-refiner.unet.diffusers", "sdxl-refiner.unet.ldm"),
    ("vae_kl", "sd15", "sd.vae-kl-f8.diffusers", "sd.vae-kl-f8.ldm"),
    ("vae_kl", "flux1", "flux.vae.diffusers", "flux.vae.original"),
    ("flux", "flux1", "flux-dev.transformer.diffusers", "flux-dev.transformer.original"),
    ("flux", "flux1", "flux-schnell.transformer.diffusers", "flux-schnell.transformer.original"),
    ("flux", "flux1", "flux-fill.transformer.diffusers", "flux-fill.transformer.original"),
    (
        "qwen_image",
        "qwen_image",
        "qwen-image.transformer.diffusers",
        "qwen-image.transformer.comfy",
    ),
    ("clip_text", "sd15", "clip-l.hf", "clip-l.hf"),
    ("t5_encoder", "flux1", "t5-xxl-encoder.hf", "t5-xxl-encoder.hf"),
]
ONE_WAY = [  # no canonical manifest: the round trip alone
    ("unet_ldm", "sd15", "bk-sdm-base.unet.diffusers"),
    ("unet_ldm", "sd15", "bk-sdm-tiny.unet.diffusers"),
    ("unet_ldm", "sd15", "segmind-small-sd.unet.diffusers"),
    ("openclip_text", "sdxl", "openclip-bigg.hf"),
]


def after(rules, shapes):
    return {one.target: one.shape for one in apply_rules(rules, shapes)}


@pytest.mark.parametrize(("kind", "slug", "theirs", "ours"), PAIRS)
def test_diffusers_names_become_the_real_canonical_header_and_back(kind, slug, theirs, ours):
    component = component_of(kind, slug)
    source, expected = shapes_of(theirs), shapes_of(ours)
    forward = component.diffusers_rules(source)
    assert after(forward, source) == expected
    backward = component.canonical_rules(expected)
    assert after(backward, expected) == source


@pytest.mark.parametrize(
    ("kind", "slug", "theirs"), [*((k, s, t) for k, s, t, _ in PAIRS), *ONE_WAY]
)
def test_both_directions_are_each_other_s_inverse(kind, slug, theirs):
    component, source = component_of(kind, slug), shapes_of(theirs)
    forward = component.diffusers_rules(source)
    canonical = after(forward, source)
    backward = component.canonical_rules(canonical)

    def by_target(rules):
        return sorted(rules, key=lambda rule: rule.targets)

    assert by_target(invert(forward, source)) == by_target(backward)
    assert by_target(invert(backward, canonical)) == by_target(forward)


def test_openclip_names_become_transformers_names_but_for_the_loss_scale():
    component = component_of("openclip_text", "sdxl")
    source = shapes_of("openclip-bigg.open_clip")
    rules = component.canonical_rules(source)
    assert after(rules, source) == shapes_of("openclip-bigg.hf")
    back = after(component.diffusers_rules(shapes_of("openclip-bigg.hf")), after(rules, source))
    assert back == {key: shape for key, shape in source.items() if key != "logit_scale"}
    with pytest.raises(NotInvertible, match="logit_scale"):
        invert(rules, source)


def test_sd2_drops_the_layer_that_is_not_read_once():
    component = component_of("openclip_text", "sd2")
    source = shapes_of("openclip-h.open_clip")
    folder = after(component.canonical_rules(source), source)
    assert folder == shapes_of("openclip-h.hf")
    single = after(component.diffusers_rules(folder), folder)
    assert after(component.canonical_rules(single), single) == folder


def test_old_attention_names_of_the_vae_are_read():
    component, source = component_of("vae_kl"), shapes_of("sd.vae-kl-f8.diffusers-old-attn")
    assert after(component.diffusers_rules(source), source) == shapes_of("sd.vae-kl-f8.ldm")


@pytest.mark.parametrize(
    ("kind", "alternate", "published"),
    [
        ("clip_text", "clip-l.hf-transformers5", "clip-l.hf"),
        ("vae_qwen", "qwen-image.vae.comfy", "qwen-image.vae.diffusers"),
        ("qwen2_vl_text", "qwen2.5-vl-7b.hf-transformers5", "qwen2.5-vl-7b.hf"),
    ],
)
def test_alternate_names_are_read_and_never_written(kind, alternate, published):
    component, source = component_of(kind), shapes_of(alternate)
    for target in ("canonical", "diffusers"):
        assert after(component.rules(source, "alternate", target), source) == shapes_of(published)
    with pytest.raises(NotInvertible):
        component.rules(shapes_of(published), "canonical", "alternate")


def test_openclip_without_its_prefix_reaches_both_layouts():
    component, source = component_of("openclip_text", "sdxl"), shapes_of("openclip-bigg.hf")
    bare = {key.removeprefix("text_model."): shape for key, shape in source.items()}
    assert after(component.rules(bare, "alternate", "diffusers"), bare) == source
    canonical = after(component.rules(bare, "alternate", "canonical"), bare)
    assert canonical == after(component.diffusers_rules(source), source)


def scaled(shapes, factor):
    """The same model, narrower: every size of at least `factor` divided by it."""
    return {k: tuple(n // factor if n >= factor else n for n in s) for k, s in shapes.items()}


@pytest.mark.parametrize(
    ("kind", "slug", "name", "factor", "keep"),
    [
        (
            "flux",
            "flux1",
            "flux-dev.transformer.diffusers",
            64,
            r"blocks\.[01]\.|^[a-z_]+embed|out",
        ),
        ("vae_kl", "sd15", "sd.vae-kl-f8.diffusers", 4, r""),
        ("unet_ldm", "sdxl", "sdxl-base.unet.diffusers", 10, r"^(?!.*transformer_blocks\.[1-9])"),
    ],
)
def test_other_widths_and_depths_need_no_other_rules(kind, slug, name, factor, keep):
    component = component_of(kind, slug)
    source = {k: s for k, s in scaled(shapes_of(name), factor).items() if re.search(keep, k)}
    canonical = after(component.diffusers_rules(source), source)
    assert after(component.canonical_rules(canonical), canonical) == source


def test_scale_and_shift_change_places():
    component, source = component_of("flux"), shapes_of("flux-dev.transformer.diffusers")
    rules = component.diffusers_rules(source)
    found = {one.target: one for one in apply_rules(rules, source)}
    pieces = found["final_layer.adaLN_modulation.1.bias"].pieces
    half = source["norm_out.linear.bias"][0] // 2
    assert [(piece.start, piece.stop) for piece in pieces] == [(half, 2 * half), (0, half)]


def test_linear1_is_query_key_value_and_mlp_in_this_order():
    component, source = component_of("flux"), shapes_of("flux-dev.transformer.diffusers")
    rules = component.diffusers_rules(source)
    found = {one.target: one for one in apply_rules(rules, source)}
    for leaf in ("weight", "bias"):
        keys = [piece.key for piece in found[f"single_blocks.3.linear1.{leaf}"].pieces]
        block = "single_transformer_blocks.3."
        names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        assert keys == [f"{block}{one}.{leaf}" for one in names]


def test_a_key_without_a_rule_is_named():
    component = component_of("unet_ldm", "sdxl")
    source = shapes_of("kolors.unet.diffusers")
    with pytest.raises(UnmappedKeys) as caught:
        apply_rules(component.diffusers_rules(source), source)
    assert set(caught.value.keys) == {"encoder_hid_proj.weight", "encoder_hid_proj.bias"}


def test_a_missing_member_of_a_fused_tensor_is_named():
    component, source = component_of("flux"), shapes_of("flux-dev.transformer.diffusers")
    del source["transformer_blocks.4.attn.to_q.weight"]
    with pytest.raises(MissingKeys) as caught:
        apply_rules(component.diffusers_rules(source), source)
    assert caught.value.keys == ("transformer_blocks.4.attn.to_q.weight",)


CANONICAL = {
    "sd15": "sd15.unet.ldm",
    "sd2": "sd21.unet.ldm",
    "sdxl": "sdxl-base.unet.ldm",
    "sdxl_refiner": "sdxl-refiner.unet.ldm",
    "flux1": "flux-dev.transformer.original",
    "qwen_image": "qwen-image.transformer.comfy",
}
KEPT = {  # weights of two and more dimensions that llama-quantize, as patched, leaves alone
    "sd15": 4,
    "sd2": 4,
    "sdxl": 6,
    "sdxl_refiner": 6,
    "flux1": 10,
    "qwen_image": 6,
}
FAMILIES = {
    "sd15": {"v": 32, "ffn_down": 16},
    "sd2": {"v": 32, "ffn_down": 16},
    "sdxl": {"v": 140, "ffn_down": 70},
    "sdxl_refiner": {"v": 88, "ffn_down": 44},
    "flux1": {"qkv": 38},
    "qwen_image": {"v": 120, "ffn_down": 120},
}


@pytest.mark.parametrize("slug", ARCHITECTURES)
def test_keep_and_families_meet_the_real_keys(slug):
    row, keys = ARCHITECTURES[slug], shapes_of(CANONICAL[slug])
    matrices = [key for key, shape in keys.items() if len(shape) > 1]
    kept = {k for k in matrices if any(re.search(one.pattern, k) for one in row.keep)}
    assert len(kept) == KEPT[slug]
    for one in row.keep:
        assert one.reason
        assert "@" in one.source
        optional = (slug != "sdxl" and "label_emb" in one.pattern) or one.table  # Layered alone
        assert optional or any(re.search(one.pattern, key) for key in keys)
    counts = {f.name: sum(bool(re.search(f.pattern, k)) for k in keys) for f in row.families}
    assert counts == FAMILIES[slug]
    assert not kept & {k for k in keys if any(re.search(f.pattern, k) for f in row.families)}


@pytest.mark.parametrize("slug", ARCHITECTURES)
def test_rows_are_complete(slug):
    row = ARCHITECTURES[slug]
    assert row.slug == slug
    assert row.components[0].name == "denoiser"
    assert row.variants[-1].when == {} or row.variants[-1].keys
    assert "" in row.sampling
    assert "scheduler" in row.hyper_defaults
    names = {one.name for one in row.components}
    assert names <= set(row.hyper_defaults)
    assert set(row.variant_defaults) <= {one.name for one in row.variants}
    assert row.gguf_architecture in {"sd1", "sdxl", "flux", "qwen_image"}
    assert row.component("vae").folder == "vae"
    with pytest.raises(KeyError):
        row.component("image_encoder")


def test_variant_overrides_replace_single_fields():
    row = ARCHITECTURES["flux1"]
    assert row.defaults("scheduler")["shift"] == 3.0
    assert row.defaults("scheduler", "schnell")["shift"] == 1.0
    assert row.defaults("scheduler", "schnell")["num_train_timesteps"] == 1000
