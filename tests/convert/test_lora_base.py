"""The base model of a LoRA by names and shapes: of every known model, in every naming."""

import functools
import gzip
import importlib.util
import json
import lzma
import re
from pathlib import Path

import pytest

from diffquant.convert.detect import detect
from diffquant.convert.lora.base import guess_base
from diffquant.convert.lora.bases import bases
from diffquant.convert.lora.claims import claims_of, denied
from diffquant.convert.lora.distilled import DISTILLED, distilled_of
from diffquant.convert.lora.group import group_adapters
from diffquant.convert.templates import template
from diffquant.core.errors import ArchitectureError
from diffquant.core.tensors import TensorSpec

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT.parent / "shared" / "data" / "manifests"


class Header:
    """Keys and shapes of a file."""

    path = Path("some.safetensors")
    container = "safetensors"

    def __init__(self, shapes, metadata=None):
        self.specs = {key: TensorSpec(key, "F16", tuple(shape)) for key, shape in shapes.items()}
        self.metadata, self.configs = metadata or {}, {}

    def read(self, key, rows=None):
        raise AssertionError("names and shapes are enough")


@functools.cache
def manifests():
    found = {}
    for name in ("manifests.json.xz", "more_manifests.json.xz"):
        found.update(json.loads(lzma.decompress((ROOT / "tests/data" / name).read_bytes())))
    return found


@functools.cache
def modules_of(name):
    """Architecture, variant, and module -> shape of every matrix and kernel."""
    shapes = {key: tuple(shape) for key, shape in manifests()[name].items()}
    match = detect({key: TensorSpec(key, "BF16", shape) for key, shape in shapes.items()})
    part = match.parts[0]
    modules = {
        key.removesuffix(".weight"): shape
        for key, shape in part.shapes.items()
        if key.endswith(".weight") and len(shape) > 1
    }
    return match.architecture, match.variant, modules


STYLES = {  # prefix, dots kept, endings
    "kohya": ("lora_unet_", False, (".lora_down.weight", ".lora_up.weight")),
    "onetrainer": ("lora_transformer_", False, (".lora_down.weight", ".lora_up.weight")),
    "comfy": ("diffusion_model.", True, (".lora_A.weight", ".lora_B.weight")),
    "peft": ("base_model.model.", True, (".lora_A.default.weight", ".lora_B.default.weight")),
    "bare": ("", True, (".lora_down.weight", ".lora_up.weight")),
}


def lora_keys(modules, style, rank=4):
    prefix, dotted, (down, up) = STYLES[style]
    found = {}
    for module, shape in modules.items():
        name = prefix + (module if dotted else module.replace(".", "_"))
        found[name + down] = (rank, *shape[1:])
        found[name + up] = (shape[0], rank, *(1 for _ in shape[2:]))
    return found


def guess(shapes, claimed=(), metadata=None):
    return guess_base(group_adapters(Header(shapes, metadata)).adapters, claimed)


def in_blocks(modules):
    return {name: shape for name, shape in modules.items() if re.search(r"\.\d+\.", name)}


def attention(modules):
    pattern = r"attn|attention|to_[qkv]$|qkv|\.w[12][qkvo]$"
    return {name: shape for name, shape in in_blocks(modules).items() if re.search(pattern, name)}


def _is_denoiser(name):
    if not re.search(r"\.(transformer|unet)\.", name):
        return False
    try:
        return bool(modules_of(name)[2])
    except ArchitectureError:
        return False


DENOISERS = [name for name in manifests() if _is_denoiser(name)]
# Members whose LoRAs no header tells from their sibling's: said in `also`, or not known here.
TWINS = {"kolors": "sdxl", "chroma": "flux1"}
UNTOLD = ("lcm", "v0.3")  # one embedder more, another table of positions


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", DENOISERS)
def test_a_lora_of_every_layer_of_the_blocks_tells_its_base(name, style):
    slug, variant, modules = modules_of(name)
    found = guess(lora_keys(in_blocks(modules), style))
    assert found.architecture in (slug, TWINS.get(slug))
    assert slug in (found.architecture, *found.also)
    assert slug == "kolors" or variant in (*found.variants, *UNTOLD)
    assert found.fit.fitting == found.fit.named == len(in_blocks(modules))


@pytest.mark.parametrize("name", DENOISERS)
def test_a_lora_of_attention_alone_tells_its_base_or_the_twin(name):
    slug, _, modules = modules_of(name)
    found = guess(lora_keys(attention(modules), "comfy"))
    assert slug in (found.architecture, *found.also)
    assert found.architecture in (slug, TWINS.get(slug))


def test_every_architecture_has_a_base():
    from diffquant.convert.architectures import ARCHITECTURES

    assert {base.architecture for base in bases() if base.is_denoiser} == set(ARCHITECTURES)


def test_the_file_of_bases_is_what_its_script_writes():
    path = ROOT / "scripts" / "lora_bases.py"
    spec = importlib.util.spec_from_file_location("lora_bases", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.TARGET.read_text(encoding="utf-8") == script.written()


@pytest.mark.parametrize(
    ("name", "text", "numbers"),
    [
        ("double_blocks.3.img_mlp.0", "double_blocks.#.img_mlp.#", (3, 0)),
        ("double_blocks_13_img_mlp_0", "double_blocks_#_img_mlp_#", (13, 0)),
        ("all_x_embedder.2-1", "all_x_embedder.2-1", ()),
        ("single_blocks.1.linear1", "single_blocks.#.linear1", (1,)),
    ],
)
def test_templates(name, text, numbers):
    assert template(name) == (text, numbers)


def test_text_width_decides_between_unets():
    for name, slug in (("sd15", "sd15"), ("sd21", "sd2"), ("sdxl-base", "sdxl")):
        modules = modules_of(f"{name}.unet.ldm")[2]
        only = {k: s for k, s in modules.items() if k.endswith("attn2.to_k")}
        assert guess(lora_keys(only, "kohya")).architecture == slug


def test_self_attention_alone_does_not_tell_sd15_from_sd2():
    modules = modules_of("sd15.unet.ldm")[2]
    only = {k: s for k, s in modules.items() if "attn1" in k}
    found = guess(lora_keys(only, "kohya"))
    assert (found.architecture, found.also) == ("sd15", ("sd2",))
    assert any("sd2" in line and "cannot tell" in line for line in found.evidence)


def test_the_header_chooses_among_what_fits_alike_and_nothing_else():
    modules = attention(modules_of("chroma.transformer.original")[2])
    keys = lora_keys(modules, "kohya")
    assert guess(keys).architecture == "flux1"
    assert guess(keys, ("chroma",)).architecture == "chroma"
    assert guess(keys, ("sdxl",)).architecture == "flux1"


def test_chroma_is_told_where_all_its_layers_and_no_modulation_are_adapted():
    modules = in_blocks(modules_of("chroma.transformer.original")[2])
    found = guess(lora_keys(modules, "kohya"))
    assert (found.architecture, found.also) == ("chroma", ())


def test_other_widths_are_recognised_by_names_and_said():
    modules = {
        k: (s[0] // 8, s[1] // 8)
        for k, s in modules_of("qwen-image.transformer.diffusers")[2].items()
    }
    found = guess(lora_keys(in_blocks(modules), "comfy"))
    assert found.architecture == "qwen_image"
    assert any("other widths" in line for line in found.evidence)


def test_more_blocks_than_a_model_has_are_not_its():
    modules = in_blocks(modules_of("wan21-t2v-14b.transformer.original")[2])
    small = in_blocks(modules_of("wan21-t2v-1.3b.transformer.original")[2])
    assert guess(lora_keys(modules, "kohya")).variants[0] == "t2v_14b"
    assert guess(lora_keys(small, "kohya")).variants == ("t2v_1.3b", "vace_1.3b")


def test_strangers_are_unknown_with_the_nearest():
    found = guess(lora_keys({f"tower.{n}.thing": (8, 8) for n in range(5)}, "comfy"))
    assert (found.architecture, found.candidates) == ("unknown", {})
    mixed = {f"double_blocks.{n}.img_attn.qkv": (9216, 3072) for n in range(4)}
    mixed |= {f"tower.{n}.thing": (8, 8) for n in range(5)}
    assert "flux1" in guess(lora_keys(mixed, "comfy")).candidates


ENCODERS = {
    "clip-l.hf": ("clip_l", "lora_te_", "sd15"),
    "openclip-h.hf": ("openclip_h", "lora_te_", "sd2"),
    "openclip-bigg.hf": ("openclip_g", "lora_te2_", "sdxl"),
    "t5-xxl-encoder.hf": ("t5_xxl", "lora_te3_", "flux1"),
    "umt5-xxl.hf": ("umt5_xxl", "text_encoder.", "wan"),
    "qwen2.5-vl-7b.hf": ("qwen2_vl_7b", "text_encoder.", "qwen_image"),
    "qwen3-4b.hf": ("qwen3_4b", "text_encoder.", "z_image"),
    "gemma2-2b.hf": ("gemma2_2b", "text_encoder.", "lumina2"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_text_encoders_alone_are_named_and_tell_a_family(name):
    kind, prefix, slug = ENCODERS[name]
    modules = {
        k.removesuffix(".weight"): s
        for k, s in manifests()[name].items()
        if len(s) == 2 and re.search(r"\.\d+\.", k) and k.endswith(".weight")
    }
    flat = prefix.endswith("_")
    shapes = {}
    for module, shape in modules.items():
        stem = prefix + (module.replace(".", "_") if flat else module)
        shapes[f"{stem}.lora_down.weight"] = (4, shape[1])
        shapes[f"{stem}.lora_up.weight"] = (shape[0], 4)
    found = guess(shapes)
    [encoder] = found.encoders.values()
    assert (encoder.kind, found.architecture) == (kind, slug)


def test_kronecker_factors_are_multiplied():
    shapes = {}
    for module, (rows, columns, *kernel) in in_blocks(modules_of("sdxl-base.unet.ldm")[2]).items():
        stem = f"lora_unet_{module.replace('.', '_')}"
        shapes[f"{stem}.lokr_w1"] = (4, 4)
        shapes[f"{stem}.lokr_w2"] = (rows // 4, columns // 4, *kernel)
    assert guess(shapes).architecture == "sdxl"


def test_xlabs_and_uso_names_are_flux():
    xlabs = {}
    for block in range(19):
        for stream in "12":
            stem = f"double_blocks.{block}.processor.qkv_lora{stream}"
            xlabs |= {f"{stem}.down.weight": (16, 3072), f"{stem}.up.weight": (9216, 16)}
    assert guess(xlabs).architecture == "flux1"
    for block in range(38):
        stem = f"single_blocks.{block}.processor"
        xlabs |= {
            f"{stem}.qkv_lora.down.weight": (16, 3072),
            f"{stem}.qkv_lora.up.weight": (9216, 16),
        }
        xlabs |= {
            f"{stem}.proj_lora.down.weight": (16, 15360),
            f"{stem}.proj_lora.up.weight": (3072, 16),
        }
    file = group_adapters(Header(xlabs))
    found = guess_base(file.adapters)
    assert (file.naming.slug, found.architecture, found.fit.named) == ("uso", "flux1", 114)


NAMINGS = {
    "kohya": "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    "wan_fun": "lora_unet__blocks_0_cross_attn_k.lora_down.weight",
    "onetrainer": "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight",
    "simpletuner": "lycoris_transformer_blocks_0_attn_to_q.lokr_w1",
    "fal_kontext": "base_model.model.double_blocks.0.img_attn.proj.lora_A.weight",
    "peft": "base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight",
    "diffusers": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    "diffusers_old": "unet.down_blocks.0.attentions.0.attn1.processor.to_q_lora.down.weight",
    "comfy": "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
    "bare": "transformer_blocks.0.attn.to_q.lora_down.weight",
    "cloneofsimo": "unet:0:down",
    "xlabs": "double_blocks.0.processor.qkv_lora1.down.weight",
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_the_naming_is_said(naming):
    assert group_adapters(Header({NAMINGS[naming]: (4, 8)})).naming.slug == naming


def test_bfl_control_loras_replace_norms_and_widen_the_input():
    keys = {"img_in.lora_A.weight": (128, 128), "img_in.lora_B.weight": (3072, 128)}
    keys |= {"img_in.lora_B.bias": (3072,)}
    for block in range(19):
        stem = f"double_blocks.{block}.img_attn"
        keys |= {f"{stem}.qkv.lora_A.weight": (128, 3072), f"{stem}.qkv.lora_B.weight": (9216, 128)}
        keys |= {f"{stem}.norm.key_norm.scale": (128,)}
    file = group_adapters(Header(keys))
    found = guess_base(file.adapters)
    assert (file.naming.slug, found.architecture, found.variant) == (
        "bfl_control",
        "flux1",
        "control",
    )


CLAIMS = [
    ({"ss_base_model_version": "sd_v1"}, "sd15"),
    ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
    ({"ss_base_model_version": "flux1"}, "flux1"),
    ({"ss_v2": "True"}, "sd2"),
    ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
    ({"modelspec.implementation": "https://github.com/black-forest-labs/flux"}, "flux1"),
]


@pytest.mark.parametrize(("metadata", "slug"), CLAIMS)
def test_claims_are_read_and_denied_by_the_layers(metadata, slug):
    claims = claims_of(metadata)
    assert slug in claims[0].architectures
    assert denied(claims, slug) == ()
    [text] = denied(claims, "wan")
    assert next(iter(metadata)) in text
    assert "the layers are followed" in text


def test_claims_of_other_types_are_ignored():
    assert (
        claims_of({"ss_v2": 5, "ss_base_model_version": None, "modelspec.architecture": [1]}) == ()
    )


@pytest.mark.parametrize(
    ("name", "slug", "recipe"),
    [
        ("Hyper-FLUX.1-dev-8steps-lora", "flux1", "hyper_flux"),
        ("Hyper-SDXL-8steps-lora", "sdxl", "hyper_sd"),
        ("sdxl_lightning_4step_lora", "sdxl", "sdxl_lightning"),
        ("Qwen-Image-Lightning-8steps-V1.0", "qwen_image", "qwen_lightning"),
        ("lcm-lora-sdv1-5", "sd15", "lcm"),
        ("dmd2_sdxl_4step_lora", "sdxl", "dmd2"),
        ("FLUX.1-Turbo-Alpha", "flux1", "turbo_alpha"),
        ("pcm_sdxl_normalcfg_4step", "sdxl", "pcm"),
        ("sdxl-tcd-lora", "sdxl", "tcd"),
        ("my lightning storm style", "flux1", ""),
        ("welcome", "sd15", ""),
    ],
)
def test_distilled_recipes_are_hints_of_a_name(name, slug, recipe):
    found = distilled_of([name], slug)
    assert (found.slug if found else "") == recipe


def test_recipes_are_for_known_architectures():
    known = {base.architecture for base in bases()}
    assert all(set(row.bases) <= known for row in DISTILLED)


REAL = {  # naming, base, rank, layers
    "lora.dmd2-sdxl-like-r64": ("kohya", "sdxl", 64, 788),
    "lora.flux-diffusers-peft-r16": ("diffusers", "flux1", 16, 190),
    "lora.flux-kohya-r16": ("kohya", "flux1", 16, 376),
    "lora.flux-xlabs-r16": ("xlabs", "flux1", 16, 76),
    "lora.hyper-sdxl-like-r64": ("kohya", "sdxl", 64, 788),
    "lora.lcm-sd15-r64": ("kohya", "sd15", 64, 278),
    "lora.lcm-sdxl-r64": ("kohya", "sdxl", 64, 788),
    "lora.qwen-image-lightning-r64": ("bare", "qwen_image", 64, 720),
    "lora.qwen-image-peft-r16": ("diffusers", "qwen_image", 16, 480),
    "lora.real.catundchat_sd15": ("diffusers_old", "sd15", 4, 128),
    "lora.real.cloneofsimo_analog_svd_rank4": ("cloneofsimo", "sd15", 4, 192),
    "lora.real.cloneofsimo_lora_disney": ("cloneofsimo", "sd15", 1, 192),
    "lora.sd15-diffusers-peft-r4": ("diffusers_old", "sd15", 4, 128),
    "lora.sd15-kohya-locon-r16-conv8": ("kohya", "sd15", 16, 350),
    "lora.sd15-kohya-r16": ("kohya", "sd15", 16, 264),
    "lora.sdxl-diffusers-peft-r16": ("diffusers_old", "sdxl", 16, 560),
    "lora.sdxl-kohya-r16": ("kohya", "sdxl", 16, 1014),
}


@pytest.mark.parametrize("name", REAL)
def test_manifests_of_real_loras(name):
    shapes = {k: s for k, s in manifests()[name].items() if not k.endswith(".alpha")}
    file = group_adapters(Header(shapes))
    found = guess_base(file.adapters)
    naming, slug, rank, layers = REAL[name]
    assert (file.naming.slug, found.architecture) == (naming, slug)
    assert (file.adapters[-1].rank, len(file.adapters)) == (rank, layers)
    assert (file.broken, file.ignored) == ((), ())


@pytest.mark.oracle
@pytest.mark.skipif(not MANIFESTS.is_dir(), reason="the reference data is not here")
def test_every_lora_manifest_is_listed():
    names = {path.name.removesuffix(".json.gz") for path in MANIFESTS.glob("lora.*")}
    assert names == set(REAL)
    for name in names:
        with gzip.open(MANIFESTS / f"{name}.json.gz") as file:
            assert json.load(file)["tensors"].keys() == manifests()[name].keys()
