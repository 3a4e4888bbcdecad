"""Recognition beyond the common models: rarer members, strangers, packed files, header claims."""

import functools
import gzip
import json
import lzma
import re
import struct
import time
from math import prod
from pathlib import Path

import pytest

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.generic import GENERIC
from diffquant.convert.detect import detect, detect_part, kind_of, to_canonical, to_diffusers
from diffquant.convert.generic import generic_match, structure
from diffquant.convert.jobs import run_job
from diffquant.convert.recognise import ARCHITECTURE_NAMES, recognise
from diffquant.convert.request import Request
from diffquant.core.errors import NotInvertible, UnknownArchitecture, UnknownFormat
from diffquant.core.tensors import TensorSpec
from diffquant.inspect.describe import describe
from diffquant.quant.types import type_named

DATA = Path(__file__).parents[1] / "data"
FOLDER = Path(__file__).parents[3] / "shared" / "data" / "manifests"


@functools.cache
def manifests():
    """Names and shapes: of 118 real files, and of rarer models with blocks 0, 1 and the last."""
    files = (DATA / "manifests.json.xz", DATA / "more_manifests.json.xz")
    found = {}
    for file in files:
        found.update(json.loads(lzma.decompress(file.read_bytes())))
    return found


def specs_of(name, prefix=""):
    return {
        prefix + key: TensorSpec(prefix + key, "BF16", tuple(shape))
        for key, shape in manifests()[name].items()
    }


# diffusers 0.42.1 and transformers classes on torch's meta device; "original" names follow from
# ours, which diffusers' converters judge in test_rules_diffusers_oracle.py, or from the makers'
# classes (anima, hidream-o1, krea2, chroma-radiance).
MORE = {
    "anima.transformer.original": ("anima", "", "canonical"),
    "bk-sdm-small.unet.diffusers": ("sd15", "bk_sdm_small", "diffusers"),
    "bk-sdm-small.unet.original": ("sd15", "bk_sdm_small", "canonical"),
    "bk-sdm-v2-base.unet.diffusers": ("sd2", "bk_sdm_base", "diffusers"),
    "bk-sdm-v2-base.unet.original": ("sd2", "bk_sdm_base", "canonical"),
    "bk-sdm-v2-small.unet.diffusers": ("sd2", "bk_sdm_small", "diffusers"),
    "bk-sdm-v2-small.unet.original": ("sd2", "bk_sdm_small", "canonical"),
    "bk-sdm-v2-tiny.unet.diffusers": ("sd2", "bk_sdm_tiny", "diffusers"),
    "bk-sdm-v2-tiny.unet.original": ("sd2", "bk_sdm_tiny", "canonical"),
    "chroma-radiance.transformer.original": ("chroma", "radiance", "canonical"),
    "flux2-klein-4b.transformer.diffusers": ("flux2", "klein_4b", "diffusers"),
    "flux2-klein-4b.transformer.original": ("flux2", "klein_4b", "canonical"),
    "flux2-klein-9b.transformer.diffusers": ("flux2", "klein_9b", "diffusers"),
    "flux2-klein-9b.transformer.original": ("flux2", "klein_9b", "canonical"),
    "hidream-o1.transformer.original": ("hidream", "o1", "canonical"),
    "hunyuan-dit-1.1.transformer.diffusers": ("hunyuan", "dit_v1.1", "diffusers"),
    "hunyuan-dit-1.2.transformer.diffusers": ("hunyuan", "dit", "diffusers"),
    "hunyuan-image-2.1.transformer.diffusers": ("hunyuan", "image", "diffusers"),
    "hunyuan-video-1.5.transformer.diffusers": ("hunyuan", "video_1.5", "diffusers"),
    "hunyuan-video-i2v.transformer.diffusers": ("hunyuan", "video_i2v", "diffusers"),
    "hunyuan-video-i2v.transformer.original": ("hunyuan", "video_i2v", "canonical"),
    "hunyuan-video.transformer.diffusers": ("hunyuan", "video", "diffusers"),
    "hunyuan-video.transformer.original": ("hunyuan", "video", "canonical"),
    "ideogram4.transformer.diffusers": ("ideogram4", "", "diffusers"),
    "ideogram4.transformer.original": ("ideogram4", "", "canonical"),
    "instruct-pix2pix.unet.diffusers": ("sd15", "ip2p", "diffusers"),
    "instruct-pix2pix.unet.original": ("sd15", "ip2p", "canonical"),
    "koala-1b.unet.diffusers": ("sdxl", "koala_1b", "diffusers"),
    "koala-1b.unet.original": ("sdxl", "koala_1b", "canonical"),
    "koala-700m.unet.diffusers": ("sdxl", "koala_700m", "diffusers"),
    "koala-700m.unet.original": ("sdxl", "koala_700m", "canonical"),
    "krea2.transformer.diffusers": ("krea2", "", "diffusers"),
    "krea2.transformer.original": ("krea2", "", "canonical"),
    "lcm-dreamshaper.unet.diffusers": ("sd15", "lcm", "diffusers"),
    "lcm-dreamshaper.unet.original": ("sd15", "lcm", "canonical"),
    "lcm-sdxl.unet.diffusers": ("sdxl", "lcm", "diffusers"),
    "lcm-sdxl.unet.original": ("sdxl", "lcm", "canonical"),
    "ltx-13b.transformer.diffusers": ("ltx", "13b", "diffusers"),
    "ltx-13b.transformer.original": ("ltx", "13b", "canonical"),
    "ltx-2.transformer.diffusers": ("ltx", "2", "diffusers"),
    "ltx-2.transformer.original": ("ltx", "2", "canonical"),
    "ltx-2b.transformer.diffusers": ("ltx", "2b", "diffusers"),
    "ltx-2b.transformer.original": ("ltx", "2b", "canonical"),
    "pixart-alpha-1024.transformer.diffusers": ("pixart", "alpha", "diffusers"),
    "pixart-alpha-1024.transformer.original": ("pixart", "alpha", "canonical"),
    "sdxs-0.9.unet.diffusers": ("sd2", "sdxs", "diffusers"),
    "ssd-1b.unet.diffusers": ("sdxl", "ssd_1b", "diffusers"),
    "ssd-1b.unet.original": ("sdxl", "ssd_1b", "canonical"),
    "vega.unet.diffusers": ("sdxl", "vega", "diffusers"),
    "vega.unet.original": ("sdxl", "vega", "canonical"),
    "wan21-i2v-14b.transformer.diffusers": ("wan", "i2v_14b", "diffusers"),
    "wan21-i2v-14b.transformer.original": ("wan", "i2v_14b", "canonical"),
    "wan21-vace-1.3b.transformer.diffusers": ("wan", "vace_1.3b", "diffusers"),
    "wan21-vace-1.3b.transformer.original": ("wan", "vace_1.3b", "canonical"),
    "wan21-vace-14b.transformer.diffusers": ("wan", "vace_14b", "diffusers"),
    "wan21-vace-14b.transformer.original": ("wan", "vace_14b", "canonical"),
    "wan22-i2v-a14b.transformer.diffusers": ("wan", "i2v_a14b", "diffusers"),
    "wan22-i2v-a14b.transformer.original": ("wan", "i2v_a14b", "canonical"),
    "wan22-ti2v-5b.transformer.diffusers": ("wan", "ti2v_5b", "diffusers"),
    "wan22-ti2v-5b.transformer.original": ("wan", "ti2v_5b", "canonical"),
    "z-image-omni.transformer.diffusers": ("z_image", "omni", "diffusers"),
    "z-image-omni.transformer.original": ("z_image", "omni", "canonical"),
}
PARTS = {
    "umt5-xxl.hf": ("t5_encoder", "umt5_xxl"),
    "t5-xxl-encoder.hf": ("t5_encoder", "t5_xxl"),
    "qwen3-8b.hf": ("qwen3_text", "8b"),
    "qwen3-4b.hf": ("qwen3_text", "4b"),
    "mistral-small-24b.hf": ("mistral_text", "24b"),
    "gemma2-2b.hf": ("gemma2_text", "2b"),
    "qwen2.5-vl-7b.hf": ("qwen2_vl_text", "7b"),
    "clip-l.hf": ("clip_text", "clip_l"),
    "clip-g.comfy": ("openclip_text", "openclip_g"),
    "openclip-h.open_clip": ("openclip_text", "openclip_h"),
    "openclip-h.hf": ("clip_text", "openclip_h"),
    "sd.vae-kl-f8.ldm": ("vae_kl", "4_channels"),
    "flux.vae.original": ("vae_kl", "16_channels"),
    "flux2.vae.original": ("vae_flux2", "32_channels"),
    "flux2.vae.diffusers": ("vae_flux2", "32_channels"),
    "wan21.vae.original": ("vae_qwen", "16_channels"),
    "taesd.decoder.original": ("vae_tiny_decoder", "taesd"),
    "taesd.encoder.original": ("vae_tiny_encoder", "taesd"),
    "taef1.vae.diffusers": ("vae_tiny", "taef1"),
    "taef2.encoder.original": ("vae_tiny_encoder", "taef2"),
    "taef2.decoder.original": ("vae_tiny_decoder", "taef2"),
    "taesana.encoder.original": ("vae_tiny_encoder", "taesana"),
}
NO_CONVERTER = ("krea2", "hunyuan-dit", "hunyuan-image", "hunyuan-video-1.5", "anima", "hidream-o1")


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_rarer_members_are_recognised(name, prefix):
    if name.startswith(("anima", "hidream-o1")) and prefix:
        pytest.skip("has a prefix of its own")
    slug, variant, layout = MORE[name]
    match = detect(specs_of(name, prefix))
    assert (match.architecture, match.variant) == (slug, variant)
    assert match.parts[0].layout == layout
    assert match.leftovers == ()
    assert len(to_canonical(match.parts[0])) > 0


@pytest.mark.parametrize("name", PARTS)
def test_parts_tell_their_size(name):
    with pytest.raises(UnknownArchitecture):
        detect(specs_of(name))
    match = detect_part(specs_of(name))
    assert match is not None
    assert (match.architecture, match.variant) == PARTS[name]
    assert len(match.evidence) == 2


@pytest.mark.parametrize("name", MORE)
def test_names_without_a_converter_say_so(name):
    part = detect(specs_of(name)).parts[0]
    if part.layout != "canonical" or not name.startswith((*NO_CONVERTER, "chroma-radiance")):
        assert to_diffusers(part)
        return
    with pytest.raises(NotInvertible, match="not known here; write a file that keeps the names"):
        to_diffusers(part)


def test_lcm_and_distilled_members_by_structure_at_any_width():
    shapes = {
        key: tuple(n // 10 if n in (320, 640, 1280) else n for n in shape)
        for key, shape in manifests()["koala-700m.unet.diffusers"].items()
    }
    match = detect({key: TensorSpec(key, "F16", shape) for key, shape in shapes.items()})
    assert (match.architecture, match.variant) == ("sdxl", "koala_700m")


@pytest.mark.parametrize("slug", ARCHITECTURES)
def test_what_a_header_cannot_tell_is_in_the_evidence(slug):
    said = " ".join(one.evidence for one in ARCHITECTURES[slug].variants)
    silent = {"sdxl_refiner", "kolors", "lumina2", "omnigen2", "anima", "ltx", "pixart", "hunyuan"}
    assert bool(re.search("told|velocity|structure of", said)) != (slug in silent)


CLAIMS = [
    ("modelspec.architecture", "stable-diffusion-xl-v1-base", "sd15.unet.ldm", True),
    ("modelspec.architecture", "stable-diffusion-v1", "sd15.unet.ldm", False),
    ("modelspec.architecture", "flux-1-dev", "chroma.transformer.original", True),
    ("modelspec.architecture", "somebody's own", "sd15.unet.ldm", False),
    ("general.architecture", "sd1", "flux-dev.transformer.original", True),
    ("general.architecture", "flux", "chroma.transformer.original", False),
    ("general.architecture", "pig", "flux-dev.transformer.original", False),
]


@pytest.mark.parametrize(("key", "value", "name", "denied"), CLAIMS)
def test_a_header_that_the_tensors_deny_is_a_warning(key, value, name, denied):
    match = recognise(specs_of(name), {key: value})
    assert any(key in one and "followed" in one for one in match.warnings) is denied


def sparse(path, shapes, metadata=None, dtype="BF16"):
    """A full-size file that takes no room: a header, and a hole."""
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for key, shape in shapes.items():
        size = prod(shape) * 2
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


FULL = {
    "sd3": "sd3.5-large.transformer.original",
    "flux2": "flux2-dev.transformer.diffusers",
    "chroma": "chroma.transformer.original",
    "z_image": "z-image.transformer.diffusers",
    "lumina2": "lumina2.transformer.original",
    "omnigen2": "omnigen2.transformer.original",
    "hidream": "hidream-i1.transformer.original",
    "pixart": "pixart-sigma.transformer.diffusers",
    "auraflow": "auraflow.transformer.original",
    "kolors": "kolors.unet.diffusers",
    "wan": "wan21-t2v-14b.transformer.original",
    "hunyuan": "hunyuan-video.transformer.original",
    "ltx": "ltx-2b.transformer.diffusers",
    "krea2": "krea2.transformer.original",
    "anima": "anima.transformer.original",
    "ideogram4": "ideogram4.transformer.original",
}


def dry_run(path, out, type_name, **request):
    container = "gguf" if out.suffix == ".gguf" else "safetensors"
    asked = Request(container=container, type=type_named(type_name), **request)
    return run_job(path, out, asked, dry_run=True, verify="none")


@pytest.mark.parametrize("slug", FULL)
@pytest.mark.parametrize(
    ("suffix", "type_name"), [(".gguf", "q4_k_m"), (".safetensors", "fp8_scaled")]
)
def test_plans_of_full_size_models_pack_most_and_keep_the_list(slug, suffix, type_name, tmp_path):
    name = FULL[slug]
    path = sparse(tmp_path / f"{name}.safetensors", manifests()[name])
    report = dry_run(path, tmp_path / f"out{suffix}", type_name)
    assert report.architecture == slug
    row = ARCHITECTURES[slug]
    kinds = {"f16", "bf16", "f32"}
    for one in report.tensors:
        if any(re.search(keep.pattern, one.key) for keep in row.keep):
            assert one.stored in kinds, one.key
    packed = sum(one.parameters for one in report.tensors if one.stored not in kinds)
    whole = sum(one.parameters for one in report.tensors)
    # OmniGen2 is 2520 wide, which no block of 32 divides: two thirds stay F16 in GGUF. Manifests of
    # rarer models hold three blocks and all of the inputs.
    most = {("omnigen2", ".gguf"): 0.3, ("anima", suffix): 0.3, ("krea2", suffix): 0.5}
    least = most.get((slug, suffix), 0.6 if slug in ("hunyuan", "ideogram4", "ltx") else 0.84)
    assert packed / whole > least
    if suffix == ".gguf":
        assert (row.gguf_note in report.notes) == bool(row.gguf_note)


def test_hunyuan_dit_has_an_architecture_of_its_own_in_gguf():
    row = ARCHITECTURES["hunyuan"]
    assert row.gguf_architecture_for("video") == "hyvid"
    assert row.gguf_architecture_for("dit") == "hydit"


PACKED = {  # narrow, with blocks 0 and 1: zeros are enough to be packed
    "wan": "wan21-t2v-1.3b.transformer.original",
    "z_image": "z-image.transformer.comfy",
    "flux2": "flux2-klein-4b.transformer.original",
    "sd3": "sd3.5-large.transformer.original",
    "chroma": "chroma.transformer.original",
}
FORMS = (
    ("q4_k_m", ".gguf"),
    ("fp8_scaled", ".safetensors"),
    ("nf4", ".safetensors"),
    ("nvfp4", ".safetensors"),
)


def narrow(name, factor=16):
    found = {}
    for key, shape in manifests()[name].items():
        block = re.match(r"^(.*?)\.(\d+)\.", key)
        if block is None or int(block[2]) < 2:
            found[key] = tuple(n // factor if n >= 64 * factor else n for n in shape)
    return found


@pytest.mark.parametrize("slug", PACKED)
def test_packed_files_are_recognised_as_their_source(slug, tmp_path):
    path = sparse(tmp_path / "a.safetensors", narrow(PACKED[slug]))
    source = describe(path)
    assert source.architecture == slug
    for type_name, suffix in FORMS:
        out = tmp_path / f"{type_name}{suffix}"
        container = suffix[1:]
        run_job(path, out, Request(container=container, type=type_named(type_name)), verify="load")
        report = describe(out)
        assert (report.architecture, report.variant) == (slug, source.variant)
        assert report.warnings == ()
        assert set(report.parts[0].formats) - {"bf16", "f32", "f16"}


COSMOS = "cosmos.transformer.diffusers"


def test_an_unknown_transformer_is_described(tmp_path):
    report = describe(sparse(tmp_path / "a.safetensors", manifests()[COSMOS]))
    assert (report.kind, report.architecture) == ("diffusion_model", "unknown")
    said = " ".join(report.evidence)
    assert "transformer_blocks x" in said
    assert "4096" in said
    assert "--arch generic" in said
    assert report.candidates


def test_an_unknown_transformer_is_packed_on_request(tmp_path):
    path = sparse(tmp_path / "a.safetensors", manifests()[COSMOS])
    with pytest.raises(UnknownArchitecture, match="--arch generic"):
        dry_run(path, tmp_path / "b.safetensors", "fp8_scaled")
    report = dry_run(path, tmp_path / "b.safetensors", "fp8_scaled", arch="generic")
    assert report.architecture == "generic"
    stored = {one.key: (one.stored, one.reason) for one in report.tensors}
    assert stored["transformer_blocks.1.attn1.to_q.weight"][0].startswith("fp8_")
    assert stored["transformer_blocks.1.norm1.linear_1.weight"][0].startswith("fp8_")
    for kept in ("patch_embed.proj.weight", "proj_out.weight", "norm_out.linear_1.weight"):
        assert stored[kept][0] == "bf16"
    assert any("generic policy" in one for one in report.warnings)
    assert set(stored) == set(manifests()[COSMOS])  # no name changes
    notes = dry_run(path, tmp_path / "b.gguf", "q8_0", arch="generic").notes
    assert GENERIC.gguf_note in notes


@pytest.mark.parametrize(
    "name", ["flux-dev.transformer.original", "wan21-t2v-1.3b.transformer.original"]
)
def test_the_generic_list_keeps_what_the_own_list_keeps(name):
    """It packs less than the architecture's own policy, and never what that one keeps."""
    row = ARCHITECTURES[detect(specs_of(name)).architecture]
    for key in manifests()[name]:
        own = any(re.search(one.pattern, key) for one in row.keep)
        generic = any(re.search(one.pattern, key) for one in GENERIC.keep)
        assert generic or not own, key


def test_generic_refuses_what_has_no_blocks():
    with pytest.raises(UnknownArchitecture, match="adapter"):
        generic_match(specs_of("lora.sd15-kohya-r16"))
    with pytest.raises(UnknownArchitecture, match="no stack of numbered blocks"):
        generic_match({"a.weight": TensorSpec("a.weight", "F32", (4, 4))})


def test_a_named_architecture_is_the_only_one_tried():
    specs = specs_of("flux-dev.transformer.original")
    assert recognise(specs, arch="flux1").architecture == "flux1"
    with pytest.raises(UnknownArchitecture, match="these tensors are those of flux1, not of flux2"):
        recognise(specs, arch="flux2")
    with pytest.raises(UnknownArchitecture, match=r"of flux1, not of sdxl; leave --arch out$"):
        recognise(specs, arch="sdxl")
    with pytest.raises(UnknownFormat, match="did you mean"):
        recognise(specs, arch="flux")
    assert "generic" in ARCHITECTURE_NAMES


def test_a_generic_output_is_known_again_by_its_header():
    specs = specs_of(COSMOS)
    with pytest.raises(UnknownArchitecture):
        recognise(specs)
    assert recognise(specs, {"diffquant.architecture": "generic"}).architecture == "generic"


def test_structure_of_nothing_is_silent():
    assert structure({}) == ()
    assert structure({"0.weight": (3,), "1.weight": (3,)}) == ()


def test_shared_folder_manifests_are_the_committed_ones():
    """The folder is the source of the committed names; where it is, nothing may have drifted."""
    if not FOLDER.is_dir():
        pytest.skip("no folder of manifests here")
    for file in FOLDER.glob("*.json.gz"):
        name = file.name.removesuffix(".json.gz")
        theirs = json.loads(gzip.decompress(file.read_bytes()))["tensors"]
        assert {key: shape for key, (_, shape) in theirs.items()} == manifests()[name], name


STRANGERS = 200
ENCODERS = {  # transformers model types that are what the part says
    "clip_text": ("clip_text_model",),
    "openclip_text": ("clip_text_model",),
    "t5_encoder": ("t5", "umt5", "mt5"),
    "qwen2_vl_text": ("qwen2_5_vl",),
    "qwen3_text": ("qwen3",),
    "gemma2_text": ("gemma2",),
    "clip_vision": ("clip_vision_model",),
    "siglip_vision": ("siglip_vision_model", "siglip2_vision_model"),
    "clip_towers": ("clip",),
}


@pytest.mark.oracle
def test_models_of_other_kinds_are_no_architecture():
    """Two hundred transformers classes, small, on the meta device: none is a diffusion model."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    import warnings

    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 64,
        "d_model": 32,
        "num_layers": 2,
    }
    seen = 0
    mapping = transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in mapping:
            if seen >= STRANGERS:
                break
            try:
                config = transformers.AutoConfig.for_model(kind, **small)
                with torch.device("meta"):
                    model = transformers.AutoModel.from_config(config)
            except Exception:  # a class that cannot be built this small; 200 others are
                continue
            specs = {
                key: TensorSpec(key, "F32", tuple(value.shape))
                for key, value in model.state_dict().items()
            }
            del model
            seen += 1
            begun = time.perf_counter()
            with pytest.raises(UnknownArchitecture):
                detect(specs)
            part = detect_part(specs)
            assert part is None or kind in ENCODERS[part.architecture], (kind, part)
            assert kind_of(specs) != "lora"
            assert time.perf_counter() - begun < 1.0, kind
    assert seen >= STRANGERS
