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
    more = DATA.with_name("more_manifests.json.xz")
    return {
        **json.loads(lzma.decompress(DATA.read_bytes())),
        **json.loads(lzma.decompress(more.read_bytes())),
    }


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
    ("sd3", "sd3", "sd3-medium.transformer.diffusers", "sd3-medium.transformer.original"),
    ("sd3", "sd3", "sd3.5-medium.transformer.diffusers", "sd3.5-medium.transformer.original"),
    ("sd3", "sd3", "sd3.5-large.transformer.diffusers", "sd3.5-large.transformer.original"),
    ("flux2", "flux2", "flux2-dev.transformer.diffusers", "flux2-dev.transformer.original"),
    ("vae_flux2", "flux2", "flux2.vae.diffusers", "flux2.vae.original"),
    ("chroma", "chroma", "chroma.transformer.diffusers", "chroma.transformer.original"),
    ("z_image", "z_image", "z-image.transformer.diffusers", "z-image.transformer.comfy"),
    ("auraflow", "auraflow", "auraflow.transformer.diffusers", "auraflow.transformer.original"),
    ("wan", "wan", "wan21-t2v-1.3b.transformer.diffusers", "wan21-t2v-1.3b.transformer.original"),
    ("wan", "wan", "wan21-t2v-14b.transformer.diffusers", "wan21-t2v-14b.transformer.original"),
    (
        "hidream",
        "hidream",
        "hidream-i1.transformer.diffusers",
        "hidream-i1.transformer.original",
    ),
    ("clip_text", "sd15", "clip-l.hf", "clip-l.hf"),
    ("t5_encoder", "flux1", "t5-xxl-encoder.hf", "t5-xxl-encoder.hf"),
]
ONE_WAY = [  # no canonical manifest: the round trip alone
    ("unet_ldm", "sd15", "bk-sdm-base.unet.diffusers"),
    ("unet_ldm", "sd15", "bk-sdm-tiny.unet.diffusers"),
    ("unet_ldm", "sd15", "segmind-small-sd.unet.diffusers"),
    ("openclip_text", "sdxl", "openclip-bigg.hf"),
    ("unet_ldm", "kolors", "kolors.unet.diffusers"),
    ("lumina2", "lumina2", "lumina2.transformer.diffusers"),
    ("pixart", "pixart", "pixart-sigma.transformer.diffusers"),
]
DROPPED = [  # canonical keys without a counterpart in Diffusers
    (
        "lumina2",
        "lumina2.transformer.diffusers",
        "lumina2.transformer.original",
        {"norm_final.weight"},
    ),
    (
        "pixart",
        "pixart-sigma.transformer.diffusers",
        "pixart-sigma.transformer.original",
        {"y_embedder.y_embedding"},
    ),
]


def after(rules, shapes):
    return {one.target: one.shape for one in apply_rules(rules, shapes)}


@pytest.mark.parametrize(("kind", "slug", "theirs", "ours"), PAIRS)
def test_diffusers_names_become_the_real_canonical_header_and_back(kind, slug, theirs, ours):
    component = component_of(kind, slug)
    source, expected = shapes_of(theirs), shapes_of(ours)
    forward = component.rules(source, "diffusers", "canonical")
    assert after(forward, source) == expected
    backward = component.rules(expected, "canonical", "diffusers")
    assert after(backward, expected) == source


@pytest.mark.parametrize(("slug", "theirs", "ours", "dropped"), DROPPED)
def test_what_diffusers_has_no_place_for_is_dropped(slug, theirs, ours, dropped):
    component = component_of(slug, slug)
    source, expected = shapes_of(theirs), shapes_of(ours)
    assert after(component.rules(expected, "canonical", "diffusers"), expected) == source
    kept = {key: shape for key, shape in expected.items() if key not in dropped}
    assert after(component.rules(source, "diffusers", "canonical"), source) == kept


@pytest.mark.parametrize(
    ("kind", "slug", "theirs"), [*((k, s, t) for k, s, t, _ in PAIRS), *ONE_WAY]
)
def test_both_directions_are_each_other_s_inverse(kind, slug, theirs):
    component, source = component_of(kind, slug), shapes_of(theirs)
    forward = component.rules(source, "diffusers", "canonical")
    canonical = after(forward, source)
    backward = component.rules(canonical, "canonical", "diffusers")

    def by_target(rules):
        return sorted(rules, key=lambda rule: rule.targets)

    assert by_target(invert(forward, source)) == by_target(backward)
    assert by_target(invert(backward, canonical)) == by_target(forward)


def test_openclip_names_become_transformers_names_but_for_the_loss_scale():
    component = component_of("openclip_text", "sdxl")
    source = shapes_of("openclip-bigg.open_clip")
    rules = component.rules(source, "canonical", "diffusers")
    assert after(rules, source) == shapes_of("openclip-bigg.hf")
    back = after(
        component.rules(shapes_of("openclip-bigg.hf"), "diffusers", "canonical"),
        after(rules, source),
    )
    assert back == {key: shape for key, shape in source.items() if key != "logit_scale"}
    with pytest.raises(NotInvertible, match="logit_scale"):
        invert(rules, source)


def test_sd2_drops_the_layer_that_is_not_read_once():
    component = component_of("openclip_text", "sd2")
    source = shapes_of("openclip-h.open_clip")
    folder = after(component.rules(source, "canonical", "diffusers"), source)
    assert folder == shapes_of("openclip-h.hf")
    single = after(component.rules(folder, "diffusers", "canonical"), folder)
    assert after(component.rules(single, "canonical", "diffusers"), single) == folder


def test_old_attention_names_of_the_vae_are_read():
    component, source = component_of("vae_kl"), shapes_of("sd.vae-kl-f8.diffusers-old-attn")
    assert after(component.rules(source, "diffusers", "canonical"), source) == shapes_of(
        "sd.vae-kl-f8.ldm"
    )


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
    assert canonical == after(component.rules(source, "diffusers", "canonical"), source)


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
    canonical = after(component.rules(source, "diffusers", "canonical"), source)
    assert after(component.rules(canonical, "canonical", "diffusers"), canonical) == source


def test_scale_and_shift_change_places():
    component, source = component_of("flux"), shapes_of("flux-dev.transformer.diffusers")
    rules = component.rules(source, "diffusers", "canonical")
    found = {one.target: one for one in apply_rules(rules, source)}
    pieces = found["final_layer.adaLN_modulation.1.bias"].pieces
    half = source["norm_out.linear.bias"][0] // 2
    assert [(piece.start, piece.stop) for piece in pieces] == [(half, 2 * half), (0, half)]


def test_linear1_is_query_key_value_and_mlp_in_this_order():
    component, source = component_of("flux"), shapes_of("flux-dev.transformer.diffusers")
    rules = component.rules(source, "diffusers", "canonical")
    found = {one.target: one for one in apply_rules(rules, source)}
    for leaf in ("weight", "bias"):
        keys = [piece.key for piece in found[f"single_blocks.3.linear1.{leaf}"].pieces]
        block = "single_transformer_blocks.3."
        names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        assert keys == [f"{block}{one}.{leaf}" for one in names]


def test_a_key_without_a_rule_is_named():
    component = component_of("unet_ldm", "sdxl")
    source = {**shapes_of("sdxl-base.unet.diffusers"), "stray.weight": (4, 4)}
    with pytest.raises(UnmappedKeys) as caught:
        apply_rules(component.rules(source, "diffusers", "canonical"), source)
    assert set(caught.value.keys) == {"stray.weight"}


def test_a_missing_member_of_a_fused_tensor_is_named():
    component, source = component_of("flux"), shapes_of("flux-dev.transformer.diffusers")
    del source["transformer_blocks.4.attn.to_q.weight"]
    with pytest.raises(MissingKeys) as caught:
        apply_rules(component.rules(source, "diffusers", "canonical"), source)
    assert caught.value.keys == ("transformer_blocks.4.attn.to_q.weight",)


CANONICAL = {
    "sd15": "sd15.unet.ldm",
    "sd2": "sd21.unet.ldm",
    "sdxl": "sdxl-base.unet.ldm",
    "sdxl_refiner": "sdxl-refiner.unet.ldm",
    "flux1": "flux-dev.transformer.original",
    "qwen_image": "qwen-image.transformer.comfy",
    "sd3": "sd3-medium.transformer.original",
    "flux2": "flux2-dev.transformer.original",
    "chroma": "chroma.transformer.original",
    "z_image": "z-image.transformer.comfy",
    "lumina2": "lumina2.transformer.original",
    "omnigen2": "omnigen2.transformer.original",
    "hidream": "hidream-i1.transformer.original",
    "pixart": "pixart-sigma.transformer.original",
    "auraflow": "auraflow.transformer.original",
    "kolors": "kolors.unet.diffusers",
    "wan": "wan21-t2v-1.3b.transformer.original",
    "hunyuan": "hunyuan-video.transformer.original",
    "ltx": "ltx-2b.transformer.original",
    "krea2": "krea2.transformer.original",
    "anima": "anima.transformer.original",
    "ideogram4": "ideogram4.transformer.original",
}
KEPT = {  # weights of two and more dimensions that llama-quantize, as patched, leaves alone
    "sd15": 4,
    "sd2": 4,
    "sdxl": 6,
    "sdxl_refiner": 6,
    "flux1": 10,
    "qwen_image": 6,
    "sd3": 9,
    "flux2": 11,
    "chroma": 15,
    "z_image": 30,
    "lumina2": 28,
    "omnigen2": 8,
    "hidream": 104,
    "pixart": 37,
    "auraflow": 8,
    "kolors": 7,
    "wan": 38,
    "hunyuan": 24,
    "ltx": 11,
    "krea2": 41,
    "anima": 68,
    "ideogram4": 9,
}
FAMILIES = {
    "sd15": {"v": 32, "ffn_down": 16},
    "sd2": {"v": 32, "ffn_down": 16},
    "sdxl": {"v": 140, "ffn_down": 70},
    "sdxl_refiner": {"v": 88, "ffn_down": 44},
    "flux1": {"qkv": 38},
    "qwen_image": {"v": 120, "ffn_down": 120},
    "sd3": {"qkv": 48},
    "flux2": {"qkv": 16},
    "chroma": {"qkv": 38},
    "z_image": {"qkv": 30, "ffn_down": 30},
    "lumina2": {"qkv": 26, "ffn_down": 26},
    "omnigen2": {"v": 38, "ffn_down": 38},
    "hidream": {"v": 48, "ffn_down": 240},
    "pixart": {"qkv": 28, "ffn_down": 28},
    "auraflow": {"v": 40},
    "kolors": {"v": 140, "ffn_down": 70},
    "wan": {"v": 60, "ffn_down": 30},
    "hunyuan": {"qkv": 6},
    "ltx": {"v": 6, "ffn_down": 3},
    "krea2": {"v": 3, "ffn_down": 3},
    "anima": {"v": 6, "ffn_down": 6},
    "ideogram4": {"qkv": 3, "ffn_down": 3},
}


RARE = {  # of members that CANONICAL does not name; `test_rare_keys_are_kept` has them
    r"^label_emb\.",
    r"^img_in_patch\.",
    r"^nerf_(blocks|image_embedder|final_layer\w*)\.",
    r"^__x0__$",
    r"^siglip_(embedder|refiner)\.",
    r"(^|\.)(patch_embed|lm_head)\.",
    r"^(csize|ar)_embedder\.",
    r"^img_emb\.",
    r"^(cond_encoder|frame_packer|audio_injector|casual_audio_encoder|trainable_cond_mask)",
    r"^av_ca_\w+_adaln_single\.",
    r"^(video|audio)_embeddings_connector\.",
    r"^(vision_in|image_embedder|byt5_in|context_embedder_2)\.",
    r"^(norm_out|proj_out)\.",
    r"^(t_embedder|extra_embedder|mlp_t5|pooler|text_embedder)\.",
    r"^time_extra_emb\.",
    r"^pos_embed\.",
}


def canonical_shapes(slug):
    """Names as the policy sees them: without a prefix, and Kolors' rewritten."""
    shapes = {key.removeprefix("net."): shape for key, shape in shapes_of(CANONICAL[slug]).items()}
    return (
        after(component_of("unet_ldm", slug).rules(shapes, "diffusers", "canonical"), shapes)
        if (slug == "kolors")
        else shapes
    )


@pytest.mark.parametrize("slug", ARCHITECTURES)
def test_keep_and_families_meet_the_real_keys(slug):
    row, keys = ARCHITECTURES[slug], canonical_shapes(slug)
    matrices = [key for key, shape in keys.items() if len(shape) > 1]
    kept = {k for k in matrices if any(re.search(one.pattern, k) for one in row.keep)}
    assert len(kept) == KEPT[slug]
    for one in row.keep:
        assert one.reason
        assert "@" in one.source
        optional = one.pattern in RARE or one.table  # Layered alone, and other single members
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
    # city96/ComfyUI-GGUF@795e451:loader.py:12 and 4dfc025 for qwen_image; others say who reads them
    read = {"flux", "sd1", "sdxl", "sd3", "aura", "hidream", "cosmos", "ltxv", "hyvid", "wan"}
    assert row.gguf_architecture in {*read, "lumina2", "qwen_image"} or row.gguf_note
    with pytest.raises(KeyError):
        row.component("image_encoder")


def test_variant_overrides_replace_single_fields():
    row = ARCHITECTURES["flux1"]
    assert row.defaults("scheduler")["shift"] == 3.0
    assert row.defaults("scheduler", "schnell")["shift"] == 1.0
    assert row.defaults("scheduler", "schnell")["num_train_timesteps"] == 1000
