"""Recognition under what users' files go through: prefixes, packing, junk; relatives; controls."""

import functools
import json
import lzma
import re
from pathlib import Path

import numpy as np
import pytest

from diffquant.convert.controls import detect_control
from diffquant.convert.detect import detect, to_canonical
from diffquant.convert.dialects import pack
from diffquant.convert.recognise import recognise
from diffquant.convert.strangers import packing, stranger
from diffquant.core.errors import PolicyError, UnknownArchitecture
from diffquant.core.tensors import TensorSpec
from diffquant.inspect.describe import describe_subject
from diffquant.inspect.subject import subject_of

DATA = Path(__file__).parents[1] / "data"
STACK = re.compile(r"^((?:.*\.)?\w*(?:blocks|layers|double_layers|single_layers))\.(\d+)\.")
UNET = re.compile(r"input_blocks|output_blocks|down_blocks|up_blocks|middle|encoder\.layers")


@functools.cache
def further():
    """diffusers 0.42.1 and transformers classes on the meta device: blocks 0, 1 and the last."""
    return json.loads(lzma.decompress((DATA / "further_manifests.json.xz").read_bytes()))


@functools.cache
def denoisers():
    """Denoisers of the other two files, bare, thinned to blocks 0, 1 and the last."""
    found = {}
    for name in ("manifests", "more_manifests"):
        found |= json.loads(lzma.decompress((DATA / f"{name}.json.xz").read_bytes()))
    return {
        name: thin(_bare(shapes))
        for name, shapes in found.items()
        if ".unet." in name or (".transformer." in name and not name.startswith("cosmos"))
    }


def _bare(shapes):
    """Without the prefix that some makers' files have."""
    for prefix in ("net.", "model.diffusion_model.", "model."):
        if all(key.startswith(prefix) for key in shapes):
            return {key.removeprefix(prefix): shape for key, shape in shapes.items()}
    return shapes


def thin(shapes):
    places = {key: STACK.match(key) for key in shapes}
    last = {}
    for place in filter(None, places.values()):
        last[place[1]] = max(last.get(place[1], 0), int(place[2]))
    return {
        key: tuple(shape)
        for key, shape in shapes.items()
        if (place := places[key]) is None
        or UNET.search(place[1])
        or int(place[2]) in (0, 1, last[place[1]])
    }


def specs_of(shapes, dtype="BF16", prefix=""):
    return {prefix + k: TensorSpec(prefix + k, dtype, tuple(s)) for k, s in shapes.items()}


class Source:
    """An opened file that is a header alone; markers have bytes."""

    def __init__(self, specs, container="safetensors", data=None):
        self.path, self.container, self.specs = Path("x"), container, specs
        self.metadata, self.configs, self.nbytes = {}, {}, 0
        self._data = data or {}

    def read(self, key, rows=None):
        return self._data.get(key, np.zeros(self.specs[key].nbytes, np.uint8))

    def close(self):
        pass


def packed(fmt, dialect):
    """Every matrix packed, inputs and outputs too, as Forge and others do."""

    def make(shapes):
        specs, data = [], {}
        for key, shape in shapes.items():
            rows = ()
            if key.endswith(".weight") and len(shape) == 2 and shape[1] % 16 == 0:
                try:
                    rows = pack(dialect, key, fmt, shape, "bf16")
                except PolicyError:
                    rows = ()
            specs += [one.spec for one in rows] or [TensorSpec(key, "BF16", shape)]
            for one in rows:
                if one.constant:
                    data[one.spec.key] = one.data(np.float32(0) if one.part else None)
        return Source({one.key: one for one in specs}, data=data)

    return make


def scaled_fp8(shapes):
    specs = {"scaled_fp8": TensorSpec("scaled_fp8", "F8_E4M3", (2,))}
    for key, shape in shapes.items():
        is_matrix = key.endswith(".weight") and len(shape) == 2
        specs[key] = TensorSpec(key, "F8_E4M3" if is_matrix else "BF16", shape)
        if is_matrix:
            scale = key.removesuffix("weight") + "scale_weight"
            specs[scale] = TensorSpec(scale, "F32", ())
    return Source(specs)


def four_axes(shapes):
    """As stable-diffusion.cpp writes: five axes become four, leading ones are gone."""
    specs = {}
    for key, shape in shapes.items():
        new = (shape[0] * shape[1], *shape[2:]) if len(shape) == 5 else shape
        while len(new) > 1 and new[0] == 1:
            new = new[1:]
        blocks = len(new) > 1 and new[-1] % 32 == 0
        specs[key] = TensorSpec(key, "Q8_0" if blocks else "F16", new)
    return Source(specs, "gguf")


def junk(shapes):
    extra = {
        "global_step": (),
        "model_ema.decay": (),
        "model_ema.num_updates": (),
        "optimizer_states.0.step": (),
    }
    return Source({**specs_of(shapes, prefix="model.diffusion_model."), **specs_of(extra, "F32")})


def all_in_one(shapes):
    return Source({**specs_of(shapes, prefix="model.diffusion_model."), **specs_of(_T5), **_VAE})


_T5 = {
    f"text_encoders.t5xxl.transformer.{key}": shape
    for key, shape in {
        "shared.weight": (32128, 4096),
        "encoder.final_layer_norm.weight": (4096,),
        "encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
        "encoder.block.0.layer.1.DenseReluDense.wo.weight": (4096, 10240),
    }.items()
}
_VAE = specs_of(
    {
        "vae.encoder.conv_in.weight": (128, 3, 3, 3),
        "vae.decoder.conv_in.weight": (512, 16, 3, 3),
    }
)
VARIATIONS = {
    **{
        f"prefix {prefix or 'none'}": lambda s, prefix=prefix: Source(specs_of(s, prefix=prefix))
        for prefix in ("diffusion_model.", "net.", "model.", "model.model.", "transformer.")
    },
    "compiled": lambda s: Source(specs_of(s, prefix="_orig_mod.")),
    "junk": junk,
    "all in one": all_in_one,
    "F64": lambda s: Source(specs_of(s, "F64")),
    "plain fp8": lambda s: Source(specs_of(s, "F8_E5M2")),
    "scaled_fp8": scaled_fp8,
    "four axes": four_axes,
    "comfy fp8": packed("fp8_e4m3_scaled", "comfy"),
    "comfy int8": packed("int8_rowwise", "comfy"),
    "comfy nvfp4": packed("nvfp4_comfy", "comfy"),
    "bnb nf4": packed("nf4", "bnb"),
    "bnb fp4": packed("fp4", "bnb"),
}


@pytest.mark.parametrize("variation", VARIATIONS)
def test_what_happens_to_a_file_does_not_change_what_it_is(variation):
    """Each variation meets a third of the denoisers; together they meet every one."""
    number = list(VARIATIONS).index(variation)
    for name in list(denoisers())[number % 3 :: 3]:
        shapes = denoisers()[name]
        source = detect(specs_of(shapes))
        subject = subject_of(VARIATIONS[variation](shapes))
        assert subject.match is not None, name
        found = (subject.match.architecture, subject.match.variant)
        assert found == (source.architecture, source.variant), name
        assert subject.kind in ("diffusion_model", "checkpoint"), name


RELATIVES = {  # of members here, and none: never under their name
    "AllegroTransformer3DModel": "",
    "AudioLDM2UNet2DConditionModel": "",
    "DreamLiteUNetModel": "",
    "I2VGenXLUNet": "",
    "UNet2DModel": "",
    "UNet3DConditionModel": "",
    "UNetSpatioTemporalConditionModel": "",
    "UNetMotionModel": "",
    "Kandinsky3UNet": "",
    "sd-x4-upscaler.unet": "",
    "ldm-text2im.unet": "",
    "CogVideoXTransformer3DModel": "",
    "MochiTransformer3DModel": "",
    "SanaTransformer2DModel": "",
    "LongCatImageTransformer2DModel": "",
    "OvisImageTransformer2DModel": "",
    "QwenImage21Transformer2DModel": "",
    "Flux3Transformer2DModel": "",
    "StableCascadeUNet": "",
    "BriaTransformer2DModel": "",
    "AnyFlowTransformer3DModel": "wan anyflow",
    "sd21-unclip-l.unet": "sd2 unclip_l",
    "sd21-unclip-h.unet": "sd2 unclip_h",
    "marigold.unet": "sd2 marigold",
    "sdxl-pruned.unet": "sdxl ",
    "wan21-flf2v-14b.transformer": "wan flf2v_14b",
}


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_are_not_called_by_a_members_name(name):
    specs = specs_of(further()[name])
    if not RELATIVES[name]:
        with pytest.raises(UnknownArchitecture):
            detect(specs)
        assert subject_of(Source(specs)).kind == "diffusion_model"
        return
    match = detect(specs)
    assert f"{match.architecture} {match.variant}" == RELATIVES[name]


@pytest.mark.parametrize("name", ["sd21-unclip-l.unet", "marigold.unet", "sdxl-pruned.unet"])
def test_original_names_follow_and_are_recognised_alike(name):
    match = detect(specs_of(further()[name]))
    shapes = {one.target: one.shape for one in to_canonical(match.parts[0])}
    again = detect(specs_of(shapes, prefix="model.diffusion_model."))
    assert (again.architecture, again.variant) == (match.architecture, match.variant)
    assert again.parts[0].layout == "canonical"
    assert again.leftovers == ()


PARTS = {
    "AutoencoderDC": "vae vae_dc 32_channels",
    "dc-ae-f32c32-sana": "vae vae_dc 32_channels",
    "AutoencoderKLAllegro": "vae vae_allegro ",
    "AutoencoderKLCogVideoX": "vae vae_cogvideox 16_channels",
    "AutoencoderKLCosmos": "vae vae_cosmos ",
    "AutoencoderKLHunyuanVideo": "vae vae_hunyuan_video 16_channels",
    "AutoencoderKLHunyuanVideo15": "vae vae_hunyuan_15 32_channels",
    "AutoencoderKLLTXVideo": "vae vae_ltx 128_channels",
    "AutoencoderKLMochi": "vae vae_mochi 12_channels",
    "AutoencoderKLTemporalDecoder": "vae vae_svd 4_channels",
    "AutoencoderOobleck": "vae vae_oobleck ",
    "ConsistencyDecoderVAE": "vae vae_consistency ",
    "AutoencoderKLQwenImage21": "vae vae_wan22 64_channels",
    "wan22.vae": "vae vae_wan22 48_channels",
    "hunyuan-image.vae": "vae vae_hunyuan_image 64_channels",
    "llama-3.1-8b": "text_encoder llama3_text 8b",
    "llava-llama-3-8b": "text_encoder llava_llama3_text 8b",
    "gemma3-12b": "text_encoder gemma3_text 12b",
    "qwen3vl-8b": "text_encoder qwen3_vl_text 8b",
    "qwen2.5vl-3b": "text_encoder qwen2_vl_text 3b",
    "byt5-small": "text_encoder t5_encoder byt5_small",
    "mt5-xl": "text_encoder t5_encoder mt5_xl",
    "t5-base": "text_encoder t5_encoder t5_base",
    "clip-full-l": "text_encoder clip_towers clip_l",
    "clip-vision-h": "clip_vision clip_vision openclip_h",
    "clip-vision-l": "clip_vision clip_vision clip_l",
    "siglip-so400m": "clip_vision siglip_vision so400m_384",
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_parts_alone_are_known_by_kind_and_size(name, dtype):
    subject = subject_of(Source(specs_of(further()[name], dtype)))
    assert subject.match is not None
    found = (subject.kind, subject.match.architecture, subject.match.variant)
    assert " ".join(found) == PARTS[name]


def test_a_part_that_nothing_converts_says_what_it_is():
    with pytest.raises(UnknownArchitecture, match="Llama 3, in a file of its own: it is recogni"):
        recognise(specs_of(further()["llama-3.1-8b"]))
    with pytest.raises(UnknownArchitecture, match="this is a ControlNet for flux1"):
        recognise(specs_of(further()["FluxControlNetModel"]))


CONTROLS = {
    "sd15.controlnet": "sd15 controlnet",
    "sd2.controlnet": "sd2 controlnet",
    "sdxl.controlnet": "sdxl controlnet",
    "ControlNetXSAdapter": "sd2 controlnet_xs",
    "FluxControlNetModel": "flux1 controlnet",
    "QwenImageControlNetModel": "qwen_image controlnet",
    "SD3ControlNetModel": "sd3 controlnet",
    "SanaControlNetModel": "unknown controlnet",
    "SparseControlNetModel": "sd15 sparse_ctrl",
    "T2IAdapter": "sd15 t2i_adapter",
    "ReduxImageEncoder": "flux1 redux",
}


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_name_what_they_are_made_for(name):
    subject = subject_of(Source(specs_of(further()[name])))
    assert subject.kind == "controlnet"
    assert subject.match is not None
    assert f"{subject.match.architecture} {subject.match.variant}" == CONTROLS[name]


HINT, CONTEXT = (16, 3, 3, 3), "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
FEW_KEYS = {  # naming of their makers: (keys, architecture and variant)
    "LDM": (
        {
            "control_model.input_hint_block.0.weight": HINT,
            "control_model.zero_convs.0.0.weight": (320, 320, 1, 1),
            f"control_model.{CONTEXT}.weight": (640, 768),
        },
        "sd15 controlnet",
    ),
    "control LoRA": (
        {
            "lora_controlnet": (),
            f"{CONTEXT}.down": (128, 2048),
            f"{CONTEXT}.up": (640, 128),
            "input_hint_block.0.weight": HINT,
        },
        "sdxl control_lora",
    ),
    "XLabs": (
        {
            "controlnet_blocks.0.weight": (3072, 3072),
            "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
        },
        "flux1 controlnet",
    ),
    "Flux union": (
        {
            "controlnet_blocks.0.weight": (3072, 3072),
            "controlnet_x_embedder.weight": (3072, 64),
            "controlnet_mode_embedder.weight": (10, 3072),
        },
        "flux1 controlnet_union",
    ),
    "Qwen-Image blockwise": (
        {"controlnet_blocks.0.y_rms.weight": (3072,)},
        "qwen_image controlnet_blockwise",
    ),
    "Z-Image": ({"control_all_x_embedder.2-1.weight": (3840, 64)}, "z_image controlnet_fun"),
    "T2I for SDXL": (
        {
            "conv_in.weight": (320, 768, 3, 3),
            "body.0.block1.weight": (320, 320, 3, 3),
            "body.0.block2.weight": (320, 320, 1, 1),
        },
        "sdxl t2i_adapter",
    ),
    "IP-Adapter": (
        {"image_proj.proj.weight": (3072, 1024), "ip_adapter.1.to_k_ip.weight": (320, 768)},
        "sd15 ip_adapter",
    ),
    "IP-Adapter FaceID": (
        {
            "image_proj.proj.0.weight": (1024, 512),
            "ip_adapter.0.to_q_lora.down.weight": (128, 640),
            "ip_adapter.0.to_q_lora.up.weight": (640, 128),
            "ip_adapter.1.to_k_ip.weight": (640, 2048),
        },
        "sdxl ip_adapter",
    ),
}


@pytest.mark.parametrize("name", FEW_KEYS)
def test_controls_in_their_makers_names(name):
    shapes, expected = FEW_KEYS[name]
    match = detect_control(specs_of(shapes))
    assert match is not None
    assert f"{match.architecture} {match.variant}" == expected
    assert subject_of(Source(specs_of(shapes, "F16"))).kind == "controlnet"


STRANGERS = {
    "ESRGAN": ["params_ema.conv_first.weight", "params_ema.body.0.rdb1.conv1.weight"],
    "ESRGAN)": ["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"],
    "compact": ["params.body.0.weight", "params.body.1.weight"],
    "SwinIR": ["conv_first.weight", "layers.0.residual_group.blocks.0.norm1.weight"],
    "GFPGAN": ["toRGB.0.weight", "stylegan_decoder.style_mlp.1.weight"],
    "hypernetwork": ["768.0.linear.0.weight", "320.1.linear.0.weight"],
}


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_are_named_and_no_model(name):
    shapes = dict.fromkeys(STRANGERS[name], (4, 4))
    report = describe_subject(subject_of(Source(specs_of(shapes, "F16"))))
    assert (report.kind, report.architecture) == ("unknown", "unknown")
    assert name in report.evidence[0]
    with pytest.raises(UnknownArchitecture, match="no diffusion model"):
        recognise(specs_of(shapes))


def test_a_motion_module_is_no_denoiser():
    report = describe_subject(subject_of(Source(specs_of(further()["MotionAdapter"]))))
    assert report.kind == "unknown"
    assert "AnimateDiff" in report.evidence[0]


def test_foreign_packings_are_refused_by_name():
    shapes = {
        "transformer_blocks.0.qkv_proj.qweight": (9216, 1536),
        "transformer_blocks.0.qkv_proj.wscales": (48, 9216),
    }
    assert "SVDQuant" in packing(shapes)
    with pytest.raises(UnknownArchitecture, match="SVDQuant"):
        recognise(specs_of(shapes, "I8"))


def test_models_are_no_strangers():
    for name, shapes in {**denoisers(), **further()}.items():
        known = {key: tuple(shape) for key, shape in shapes.items()}
        assert not packing(known), name
        assert not stranger(known) or name == "MotionAdapter", name
        if name in denoisers():
            assert detect_control(specs_of(known)) is None, name


def test_two_experts_side_by_side_are_wan_2_2():
    shapes = denoisers()["wan21-t2v-14b.transformer.diffusers"]
    pair = {**specs_of(shapes, prefix="transformer/"), **specs_of(shapes, prefix="transformer_2/")}
    match = detect(pair)
    assert (match.architecture, match.variant, len(match.parts)) == ("wan", "t2v_a14b", 1)
    assert {why for _, why in match.leftovers} == {
        "second expert, a model of its own: convert its folder by itself"
    }
