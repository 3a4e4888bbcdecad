"""Detection on the names and shapes of 118 real models, and on what files do to them."""

import functools
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.detect import (
    detect,
    detect_component,
    kind_of,
    to_canonical,
    to_diffusers,
)
from diffquant.core.errors import AmbiguousArchitecture, UnknownArchitecture
from diffquant.core.tensors import TensorSpec

DATA = Path(__file__).parents[1] / "data" / "manifests.json.xz"


@functools.cache
def _manifests():
    return json.loads(lzma.decompress(DATA.read_bytes()))


def shapes_of(name, prefix=""):
    return {prefix + key: tuple(shape) for key, shape in _manifests()[name].items()}


def specs_of(shapes):
    return {key: TensorSpec(key, "BF16", shape) for key, shape in shapes.items()}


def manifest(name, prefix=""):
    return specs_of(shapes_of(name, prefix))


SINGLE = {  # manifest: architecture, variant, {part: (kind, layout, keys)}
    "sd15.checkpoint.ldm-pruned-emaonly": ("sd15", "base", ("unet_ldm", "vae_kl", "clip_text")),
    "sd15.checkpoint.ldm-webui-fp16": ("sd15", "base", ("unet_ldm", "vae_kl", "clip_text")),
    "sd15-inpainting.checkpoint.ldm": ("sd15", "inpainting", ("unet_ldm", "vae_kl", "clip_text")),
    "sd15.unet.ldm": ("sd15", "base", ("unet_ldm",)),
    "sd15.unet.diffusers": ("sd15", "base", ("unet_ldm",)),
    "sd15-inpainting.unet.ldm": ("sd15", "inpainting", ("unet_ldm",)),
    "sd15-inpainting.unet.diffusers": ("sd15", "inpainting", ("unet_ldm",)),
    "bk-sdm-base.unet.diffusers": ("sd15", "bk_sdm_base", ("unet_ldm",)),
    "bk-sdm-tiny.unet.diffusers": ("sd15", "bk_sdm_tiny", ("unet_ldm",)),
    "segmind-small-sd.unet.diffusers": ("sd15", "bk_sdm_base", ("unet_ldm",)),
    "segmind-tiny-sd.unet.diffusers": ("sd15", "bk_sdm_tiny", ("unet_ldm",)),
    "sdxs-512.unet.ldm": ("sd15", "sdxs", ("unet_ldm",)),
    "sdxs-512.unet.diffusers": ("sd15", "sdxs", ("unet_ldm",)),
    "sd21.checkpoint.ldm": ("sd2", "base", ("unet_ldm", "vae_kl", "openclip_text")),
    "sd21.unet.ldm": ("sd2", "base", ("unet_ldm",)),
    "sd21.unet.diffusers": ("sd2", "base", ("unet_ldm",)),
    "sdxl-base.checkpoint.ldm": (
        "sdxl",
        "base",
        ("unet_ldm", "vae_kl", "clip_text", "openclip_text"),
    ),
    "sdxl-base.unet.ldm": ("sdxl", "base", ("unet_ldm",)),
    "sdxl-base.unet.diffusers": ("sdxl", "base", ("unet_ldm",)),
    "sdxl-inpainting.unet.ldm": ("sdxl", "inpainting", ("unet_ldm",)),
    "sdxl-inpainting.unet.diffusers": ("sdxl", "inpainting", ("unet_ldm",)),
    "sdxl-refiner.checkpoint.ldm": ("sdxl_refiner", "", ("unet_ldm", "vae_kl", "openclip_text")),
    "sdxl-refiner.unet.ldm": ("sdxl_refiner", "", ("unet_ldm",)),
    "sdxl-refiner.unet.diffusers": ("sdxl_refiner", "", ("unet_ldm",)),
    "flux-dev.checkpoint-comfy-fp8": (
        "flux1",
        "dev",
        ("flux", "vae_kl", "clip_text", "t5_encoder"),
    ),
    "flux-dev.transformer.comfy": ("flux1", "dev", ("flux",)),
    "flux-dev.transformer.original": ("flux1", "dev", ("flux",)),
    "flux-dev.transformer.diffusers": ("flux1", "dev", ("flux",)),
    "flux-kontext.transformer.original": ("flux1", "dev", ("flux",)),
    "flux-kontext.transformer.diffusers": ("flux1", "dev", ("flux",)),
    "flux-schnell.transformer.original": ("flux1", "schnell", ("flux",)),
    "flux-schnell.transformer.diffusers": ("flux1", "schnell", ("flux",)),
    "flux-fill.transformer.original": ("flux1", "fill", ("flux",)),
    "flux-fill.transformer.diffusers": ("flux1", "fill", ("flux",)),
    "qwen-image.transformer.comfy": ("qwen_image", "", ("qwen_image",)),
    "qwen-image.transformer.diffusers": ("qwen_image", "", ("qwen_image",)),
    "qwen-image-edit.transformer.diffusers": ("qwen_image", "", ("qwen_image",)),
    "qwen-image-edit-2509.transformer.diffusers": ("qwen_image", "", ("qwen_image",)),
    "auraflow-v0.3.transformer.diffusers": ("auraflow", "v0.3", ("auraflow",)),
    "auraflow.transformer.diffusers": ("auraflow", "", ("auraflow",)),
    "auraflow.transformer.original": ("auraflow", "", ("auraflow",)),
    "chroma.transformer.diffusers": ("chroma", "", ("chroma",)),
    "chroma.transformer.original": ("chroma", "", ("chroma",)),
    "flux2-dev.transformer.diffusers": ("flux2", "dev", ("flux2",)),
    "flux2-dev.transformer.original": ("flux2", "dev", ("flux2",)),
    "hidream-i1.transformer.diffusers": ("hidream", "i1", ("hidream",)),
    "hidream-i1.transformer.original": ("hidream", "i1", ("hidream",)),
    "kolors.unet.diffusers": ("kolors", "", ("unet_ldm",)),
    "lumina2.transformer.diffusers": ("lumina2", "", ("lumina2",)),
    "lumina2.transformer.original": ("lumina2", "", ("lumina2",)),
    "omnigen2.transformer.original": ("omnigen2", "", ("omnigen2",)),
    "pixart-sigma.transformer.diffusers": ("pixart", "sigma", ("pixart",)),
    "pixart-sigma.transformer.original": ("pixart", "sigma", ("pixart",)),
    "sd3-medium.checkpoint-incl-clips-t5": (
        "sd3",
        "medium",
        ("sd3", "vae_kl", "clip_text", "openclip_text", "t5_encoder"),
    ),
    "sd3-medium.checkpoint": ("sd3", "medium", ("sd3", "vae_kl")),
    "sd3-medium.transformer.diffusers": ("sd3", "medium", ("sd3",)),
    "sd3-medium.transformer.original": ("sd3", "medium", ("sd3",)),
    "sd3.5-large.transformer.diffusers": ("sd3", "3.5_large", ("sd3",)),
    "sd3.5-large.transformer.original": ("sd3", "3.5_large", ("sd3",)),
    "sd3.5-medium.transformer.diffusers": ("sd3", "3.5_medium", ("sd3",)),
    "sd3.5-medium.transformer.original": ("sd3", "3.5_medium", ("sd3",)),
    "wan21-t2v-1.3b.transformer.diffusers": ("wan", "t2v_1.3b", ("wan",)),
    "wan21-t2v-1.3b.transformer.original": ("wan", "t2v_1.3b", ("wan",)),
    "wan21-t2v-14b.transformer.diffusers": ("wan", "t2v_14b", ("wan",)),
    "wan21-t2v-14b.transformer.original": ("wan", "t2v_14b", ("wan",)),
    "z-image.transformer.comfy": ("z_image", "", ("z_image",)),
    "z-image.transformer.diffusers": ("z_image", "", ("z_image",)),
}
FOLDERS = {
    "sd15": {
        "unet/": "sd15.unet.diffusers",
        "vae/": "sd.vae-kl-f8.diffusers",
        "text_encoder/": "clip-l.hf",
    },
    "sd2": {
        "unet/": "sd21.unet.diffusers",
        "vae/": "sd.vae-kl-f8.diffusers",
        "text_encoder/": "openclip-h.hf",
    },
    "sdxl": {
        "unet/": "sdxl-base.unet.diffusers",
        "vae/": "sd.vae-kl-f8.diffusers",
        "text_encoder/": "clip-l.hf",
        "text_encoder_2/": "openclip-bigg.hf",
    },
    "sdxl_refiner": {
        "unet/": "sdxl-refiner.unet.diffusers",
        "vae/": "sd.vae-kl-f8.diffusers",
        "text_encoder_2/": "openclip-bigg.hf",
    },
    "flux1": {
        "transformer/": "flux-dev.transformer.diffusers",
        "vae/": "flux.vae.diffusers",
        "text_encoder/": "clip-l.hf",
        "text_encoder_2/": "t5-xxl-encoder.hf",
    },
    "qwen_image": {
        "transformer/": "qwen-image.transformer.diffusers",
        "vae/": "qwen-image.vae.diffusers",
        "text_encoder/": "qwen2.5-vl-7b.hf",
    },
}
COMPONENTS = {
    "flux.vae.diffusers": ("vae_kl", "diffusers"),
    "flux.vae.original": ("vae_kl", "canonical"),
    "sd.vae-kl-f8.diffusers-old-attn": ("vae_kl", "diffusers"),
    "sd.vae-kl-f8.diffusers": ("vae_kl", "diffusers"),
    "sd.vae-kl-f8.ldm": ("vae_kl", "canonical"),
    "sd3.vae.diffusers": ("vae_kl", "diffusers"),
    "qwen-image.vae.comfy": ("vae_qwen", "alternate"),
    "qwen-image.vae.diffusers": ("vae_qwen", "canonical"),
    "wan21.vae.original": ("vae_qwen", "alternate"),
    "wan21.vae.diffusers": ("vae_qwen", "canonical"),
    "clip-l.hf": ("clip_text", "canonical"),
    "clip-l.hf-transformers5": ("clip_text", "alternate"),
    "clip-g.comfy": ("openclip_text", "diffusers"),
    "openclip-bigg.hf": ("openclip_text", "diffusers"),
    "openclip-bigg.open_clip": ("openclip_text", "canonical"),
    "openclip-h.hf": ("clip_text", "canonical"),
    "openclip-h.open_clip": ("openclip_text", "canonical"),
    "t5-xxl-encoder.comfy": ("t5_encoder", "canonical"),
    "t5-xxl-encoder.hf": ("t5_encoder", "canonical"),
    "qwen2.5-vl-7b.hf": ("qwen2_vl_text", "canonical"),
    "qwen2.5-vl-7b.hf-transformers5": ("qwen2_vl_text", "alternate"),
    "flux2.vae.diffusers": ("vae_flux2", "diffusers"),
    "flux2.vae.original": ("vae_flux2", "canonical"),
    "gemma2-2b.hf": ("gemma2_text", "alternate"),
    "qwen3-4b.hf": ("qwen3_text", "canonical"),
    "taef1.decoder.original": ("vae_tiny_decoder", "canonical"),
    "taef1.encoder.original": ("vae_tiny_encoder", "canonical"),
    "taef1.vae.diffusers": ("vae_tiny", "diffusers"),
    "taef2.decoder.original": ("vae_tiny_decoder", "canonical"),
    "taef2.encoder.original": ("vae_tiny_encoder", "canonical"),
    "taesana.encoder.original": ("vae_tiny_encoder", "canonical"),
    "taesd.decoder.original": ("vae_tiny_decoder", "canonical"),
    "taesd.encoder.original": ("vae_tiny_encoder", "canonical"),
    "taesd.vae.diffusers": ("vae_tiny", "diffusers"),
}
STRANGERS = [name for name in _manifests() if name not in SINGLE and name not in COMPONENTS]
ONE_NAMING = ("qwen_image", "hidream")  # canonical names are Diffusers' own


def folder_of(slug):
    shapes = {}
    for prefix, name in FOLDERS[slug].items():
        shapes.update(shapes_of(name, prefix))
    return shapes


@pytest.mark.parametrize("name", SINGLE)
def test_known_models_are_recognised_in_every_layout(name):
    slug, variant, kinds = SINGLE[name]
    match = detect(manifest(name))
    assert (match.architecture, match.variant, match.layout) == (slug, variant, "single")
    assert tuple(part.kind for part in match.parts) == kinds
    assert match.warnings == ()
    diffusers = ".diffusers" in name and slug not in ONE_NAMING
    assert match.parts[0].layout == ("diffusers" if diffusers else "canonical")
    keys = [part.prefix + key for part in match.parts for key in part.shapes]
    keys += [key for key, reason in match.leftovers if reason]
    assert sorted(keys) == sorted(manifest(name))


@pytest.mark.parametrize("slug", FOLDERS)
def test_folders_are_recognised_with_all_their_parts(slug):
    match = detect(specs_of(folder_of(slug)))
    assert (match.architecture, match.layout) == (slug, "diffusers")
    assert {part.prefix for part in match.parts} == set(FOLDERS[slug])
    assert {part.layout for part in match.parts} == {"diffusers"}
    assert match.leftovers == ()


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "model.", "net.", ""])
@pytest.mark.parametrize("name", ["flux-dev.transformer.original", "sdxl-base.unet.ldm"])
def test_a_bare_denoiser_is_recognised_below_any_prefix(name, prefix):
    match = detect(manifest(name, prefix))
    assert match.parts[0].prefix == prefix
    assert set(match.parts[0].shapes) == set(shapes_of(name))


@pytest.mark.parametrize("name", STRANGERS)
def test_adapters_are_not_claimed(name):
    with pytest.raises(UnknownArchitecture) as caught:
        detect(manifest(name))
    assert "adapter" in str(caught.value)
    assert detect_component(manifest(name)) is None


def test_adapters_alone_are_strangers():
    assert len(STRANGERS) == 17
    assert all(name.startswith("lora.") for name in STRANGERS)


@pytest.mark.parametrize("name", COMPONENTS)
def test_parts_in_files_of_their_own(name):
    with pytest.raises(UnknownArchitecture):
        detect(manifest(name))
    part = detect_component(manifest(name))
    assert part is not None
    assert (part.kind, part.layout) == COMPONENTS[name]
    assert to_canonical(part)


def test_unknown_names_the_nearest_candidate_and_what_it_lacks():
    shapes = shapes_of("flux-dev.transformer.original")
    del shapes["vector_in.in_layer.weight"]
    with pytest.raises(UnknownArchitecture, match="flux1 has 92% of its marks") as caught:
        detect(specs_of(shapes))
    assert caught.value.candidates[0] == ("flux1", ("vector_in.in_layer.weight",))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("flux-dev.transformer.original", "distilled_guidance_layer.norms.0.scale"),
        ("flux-dev.transformer.original", "double_stream_modulation_img.lin.weight"),
        ("lumina2.transformer.original", "cap_pad_token"),
        ("flux-dev.transformer.diffusers", "controlnet_blocks.0.weight"),
        ("sdxl-base.unet.diffusers", "encoder_hid_proj.image_projection_layers.0.weight"),
        ("sd15.unet.ldm", "input_hint_block.0.weight"),
    ],
)
def test_one_key_of_a_look_alike_is_enough_to_refuse(name, key):
    with pytest.raises(UnknownArchitecture, match=f"has {key}"):
        detect(specs_of({**shapes_of(name), key: (8, 8)}))


def test_an_empty_file_is_unknown():
    with pytest.raises(UnknownArchitecture, match="no tensors"):
        detect({})
    assert kind_of({}) == "unknown"


def test_two_denoisers_are_ambiguous():
    shapes = shapes_of("flux-dev.transformer.original", "model.diffusion_model.")
    with pytest.raises(AmbiguousArchitecture, match="flux1 and qwen_image"):
        detect(specs_of({**shapes, **shapes_of("qwen-image.transformer.comfy", "net.")}))


def test_leftovers_carry_their_reasons():
    match = detect(manifest("sd15.checkpoint.ldm-pruned-emaonly"))
    reasons = dict(match.leftovers)
    assert "schedule" in reasons["betas"]
    assert "EMA" in reasons["model_ema.decay"]
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert "builds it itself" in reasons[positions]
    shapes = {**shapes_of("sd15.unet.ldm", "model.diffusion_model."), "stray": (3,)}
    assert dict(detect(specs_of(shapes)).leftovers) == {
        "stray": "belongs to no part of this architecture"
    }


def test_a_second_copy_of_the_t5_embedding_is_a_leftover():
    shapes = {**folder_of("flux1"), **shapes_of("t5-xxl-encoder.comfy", "text_encoder_2/")}
    match = detect(specs_of(shapes))
    assert match.leftovers == (
        ("text_encoder_2/encoder.embed_tokens.weight", "copy of shared.weight"),
    )


def test_a_t5_file_without_shared_weight_gets_it_by_name():
    shapes = shapes_of("t5-xxl-encoder.hf")
    shapes["encoder.embed_tokens.weight"] = shapes.pop("shared.weight")
    part = detect_component(specs_of(shapes))
    assert part is not None
    assert {one.target for one in to_canonical(part)} == set(shapes_of("t5-xxl-encoder.hf"))


def test_evidence_says_what_headers_cannot_tell():
    assert "Kontext" in " ".join(detect(manifest("flux-kontext.transformer.original")).evidence)
    assert "Edit" in " ".join(detect(manifest("qwen-image.transformer.comfy")).evidence)
    assert "velocity" in " ".join(detect(manifest("sd21.unet.ldm")).evidence)


def test_model_index_names_what_tensors_cannot_tell():
    configs = {"model_index.json": {"_class_name": "FluxKontextPipeline"}}
    match = detect(specs_of(folder_of("flux1")), configs=configs)
    assert match.variant == "kontext"
    assert "FluxKontextPipeline" in " ".join(match.evidence)


def test_marker_keys_tell_variants_and_are_left_over():
    shapes = {**shapes_of("sdxl-base.checkpoint.ldm"), "edm_mean": (4,), "edm_std": (4,)}
    match = detect(specs_of(shapes))
    assert match.variant == "playground_v2.5"
    assert match.scheduler["sigma_max"].value == 80.0
    vae = match.part("vae")
    assert vae is not None
    assert vae.hyper["scaling_factor"].value == 0.5
    shapes = {**shapes_of("qwen-image.transformer.comfy"), "__index_timestep_zero__": (0,)}
    match = detect(specs_of(shapes))
    assert (match.variant, match.parts[0].hyper["zero_cond_t"].value) == ("edit_2511", True)


def test_hyperparameters_name_their_origin():
    configs = {"unet/config.json": {"attention_head_dim": 8, "in_channels": 4, "norm_eps": 1e-4}}
    match = detect(specs_of(folder_of("sd15")), configs=configs)
    hyper = match.parts[0].hyper
    assert (hyper["norm_eps"].value, hyper["norm_eps"].origin) == (1e-4, "config.json")
    assert (hyper["in_channels"].value, hyper["in_channels"].origin) == (4, "config.json")
    assert (hyper["norm_num_groups"].value, hyper["norm_num_groups"].origin) == (32, "default")
    assert hyper["cross_attention_dim"].value == 768
    assert hyper["cross_attention_dim"].origin == "shape"
    assert match.scheduler["beta_start"].origin == "default"


def test_nested_text_configs_are_spread_out():
    text = {"num_attention_heads": 2, "model_type": "qwen2_5_vl_text"}
    text["rope_parameters"] = {"rope_theta": 5e5, "mrope_section": [4, 6, 6]}
    configs = {"text_encoder/config.json": {"model_type": "qwen2_5_vl", "text_config": text}}
    part = detect(specs_of(folder_of("qwen_image")), configs=configs).part("text_encoder")
    assert part is not None
    assert part.hyper["num_attention_heads"].value == 2
    assert part.hyper["rope_theta"].value == 5e5
    assert part.hyper["rope_scaling"].value == {"mrope_section": [4, 6, 6]}
    assert part.hyper["model_type"].value == "qwen2_5_vl"
    assert part.hyper["num_key_value_heads"].origin == "default"


def test_configs_in_the_header_are_honoured():
    configs = {
        "transformer/config.json": {"axes_dims_rope": [4, 6, 6]},
        "scheduler/scheduler_config.json": {"shift": 1.5},
    }
    header = {"diffquant.config": json.dumps({"configs": configs})}
    match = detect(manifest("flux-dev.transformer.original"), header)
    axes = match.parts[0].hyper["axes_dims_rope"]
    assert (axes.value, axes.origin) == ((4, 6, 6), "diffquant.config")
    assert match.scheduler["shift"].value == 1.5
    assert match.scheduler["base_shift"].origin == "default"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"configs": 3}'])
def test_a_broken_config_in_the_header_is_no_config(text):
    match = detect(manifest("sd15.unet.ldm"), {"diffquant.config": text})
    assert match.parts[0].hyper["attention_head_dim"].origin == "default"


def test_tensors_win_over_a_config_that_contradicts_them():
    configs = {"unet/config.json": {"in_channels": 4}}
    shapes = folder_of("sd15") | shapes_of("sd15-inpainting.unet.diffusers", "unet/")
    match = detect(specs_of(shapes), configs=configs)
    assert match.parts[0].hyper["in_channels"].value == 9
    assert any("in_channels" in warning for warning in match.warnings)


def test_schnell_differs_from_dev_where_it_should():
    dev = detect(manifest("flux-dev.transformer.original"))
    schnell = detect(manifest("flux-schnell.transformer.original"))
    assert (dev.scheduler["shift"].value, schnell.scheduler["shift"].value) == (3.0, 1.0)
    assert dev.scheduler["use_dynamic_shifting"].value is True
    assert schnell.scheduler["use_dynamic_shifting"].value is False
    assert schnell.parts[0].hyper["guidance_embeds"].value is False
    sampling = ARCHITECTURES["flux1"].sampling_for
    assert (sampling("dev").guidance, sampling("schnell").guidance) == (3.5, None)


@pytest.mark.parametrize("name", SINGLE)
def test_assignments_read_full_source_keys_and_every_row_once(name):
    shapes = shapes_of(name)
    for part in detect(specs_of(shapes)).parts:
        for convert in (to_canonical, to_diffusers):
            rows = {}
            for one in convert(part):
                for piece in one.pieces:
                    rows.setdefault(piece.key, []).append((piece.start, piece.stop))
            for key, ranges in rows.items():
                at = 0
                for start, stop in sorted(ranges):
                    assert start == at
                    at = stop
                assert at == (shapes[key][0] if shapes[key] else 1)


KINDS = {
    "sd15.checkpoint.ldm-webui-fp16": "checkpoint",
    "sd3-medium.checkpoint": "checkpoint",
    "sd3-medium.transformer.diffusers": "diffusion_model",
    "flux-dev.transformer.original": "diffusion_model",
    "z-image.transformer.comfy": "diffusion_model",
    "wan21-t2v-1.3b.transformer.original": "diffusion_model",
    "hidream-i1.transformer.original": "diffusion_model",
    "pixart-sigma.transformer.original": "diffusion_model",
    "auraflow.transformer.original": "diffusion_model",
    "taesd.decoder.original": "vae",
    "taef2.encoder.original": "vae",
    "taesd.vae.diffusers": "vae",
    "flux2.vae.original": "vae",
    "gemma2-2b.hf": "text_encoder",
    "qwen3-4b.hf": "text_encoder",
}


def test_kinds_of_real_files():
    expected = {
        **KINDS,
        **{
            name: "vae" if "vae" in kind else "text_encoder"
            for name, (kind, _) in COMPONENTS.items()
        },
        **{name: "lora" for name in _manifests() if name.startswith("lora.")},
    }
    assert {name: kind_of(manifest(name)) for name in expected} == expected


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        ({"emb_params": (4, 768)}, "textual_inversion"),
        ({"string_to_param.*": (4, 768)}, "textual_inversion"),
        ({"<cat-toy>": (768,)}, "textual_inversion"),
        ({"clip_l": (8, 768), "clip_g": (8, 1280)}, "textual_inversion"),
        ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "controlnet"),
        ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "controlnet"),
        ({"lora_unet_mid.lokr_w1": (4, 4), "lora_unet_mid.lokr_w2": (4, 4)}, "lora"),
        ({"lora_unet_mid.hada_w1_a": (4, 4), "lora_unet_mid.alpha": ()}, "lora"),
        ({"weight": (4, 4)}, "unknown"),
    ],
)
def test_kinds_of_small_files(shapes, kind):
    assert kind_of(specs_of(shapes)) == kind


def test_importing_detection_loads_no_heavy_package():
    code = "import sys, diffquant.convert.detect; print({'torch', 'numba'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
