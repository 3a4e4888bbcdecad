"""Every loader rule has a file on which it applies and one on which it does not.

Files are headers in memory: names and shapes of real models, with what a rule looks at changed.
What the programs themselves do with such files: tests/clients/test_loader_rules_*.py.
"""

import functools
import json
import lzma
import math
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from diffquant.convert.targets import TARGETS
from diffquant.core.errors import UnknownFormat
from diffquant.core.report import to_json
from diffquant.core.tensors import TensorSpec
from diffquant.inspect.loader_rules import LOADER_RULES, LOADERS, Case, LoaderRule
from diffquant.inspect.loader_rules.ours import SERVED
from diffquant.inspect.loaders import check_loader, judge, loader_report, matrix_report
from diffquant.inspect.subject import subject_of
from diffquant.io.gguf_values import GgufArray, GgufValue

DATA = Path(__file__).parents[1] / "data"
DOCS = Path(__file__).parents[2] / "docs"
LDM = "model.diffusion_model."


@dataclass
class Header:
    """A source that is all header: what is in `contents` can be read, nothing else."""

    specs: dict
    container: str = "safetensors"
    metadata: dict = field(default_factory=dict)
    typed_metadata: dict = field(default_factory=dict)
    configs: dict = field(default_factory=dict)
    contents: dict = field(default_factory=dict)
    path: Path = Path("model.safetensors")

    @property
    def nbytes(self):
        return sum(spec.nbytes for spec in self.specs.values())

    def read(self, key, rows=None):
        return np.frombuffer(self.contents[key], np.uint8)

    def close(self):
        pass


@functools.cache
def manifests():
    found = {}
    for file in ("manifests.json.xz", "more_manifests.json.xz"):
        found.update(json.loads(lzma.decompress((DATA / file).read_bytes())))
    return found


def names(manifest, prefix="", dtype="BF16"):
    """Key -> (dtype, shape) of a real model."""
    return {prefix + key: (dtype, tuple(shape)) for key, shape in manifests()[manifest].items()}


EXTENSIONS = {"safetensors": ".safetensors", "gguf": ".gguf", "torch_pickle": ".ckpt"}


def file(tensors, container="safetensors", *, said=None, contents=None, path="", configs=None):
    """A file of a container; `said` is its header, for GGUF key -> (type, value)."""
    specs = {key: TensorSpec(key, dtype, shape) for key, (dtype, shape) in tensors.items()}
    typed = {}
    if container == "gguf":
        typed = {key: GgufValue(kind, value) for key, (kind, value) in (said or {}).items()}
        said = {key: item.value for key, item in typed.items()}
    return Header(
        specs,
        container,
        said or {},
        typed,
        configs or {},
        contents or {},
        Path(path or f"model{EXTENSIONS.get(container, '')}"),
    )


def array(*values):
    return GgufArray("i32", len(values), np.array(values, "<i4").tobytes())


def gguf(manifest, name="flux", *, prefix="", said=None, add=None, **dtypes):
    """A GGUF denoiser in F16; `dtypes` are STORAGE name -> pattern of keys stored so."""
    tensors = {**names(manifest, prefix, "F16"), **(add or {})}
    for dtype, pattern in dtypes.items():
        for key, (_, shape) in tensors.items():
            if re.search(pattern, key):
                tensors[key] = (dtype, shape)
    head = {} if name is None else {"general.architecture": ("str", name)}
    return file(tensors, "gguf", said={**head, **(said or {})})


def shaped(manifest, name, key, shape, prefix="", dtype="Q4_K"):
    """A GGUF file with one tensor stored as rows of 256."""
    true = names(manifest, prefix)[key][1]
    said = {f"comfy.gguf.orig_shape.{key}": ("array", array(*true))}
    return gguf(manifest, name, prefix=prefix, said=said, add={key: (dtype, shape)})


def marked(tensors, key, marker, *, dtype="F8_E4M3", scale=("F32", ()), more=None, shape=None):
    """Tensors with one layer in ComfyUI's dialect, and the markers' bytes."""
    layer = key.removesuffix(".weight")
    text = json.dumps(marker).encode()
    found = dict(tensors)
    found[key] = (dtype, shape or tensors[key][1])
    found[f"{layer}.weight_scale"] = scale
    found[f"{layer}.comfy_quant"] = ("U8", (len(text),))
    for name, row in (more or {}).items():
        found[f"{layer}.{name}"] = row
    return found, {f"{layer}.comfy_quant": text}


def comfy(manifest, key, marker=None, **options):
    tensors, contents = marked(
        names(manifest), key, {"format": "float8_e4m3fn"} if marker is None else marker, **options
    )
    return file(tensors, contents=contents)


def scaled(manifest, key, prefix=""):
    """A file with the older marker of scaled fp8."""
    tensors = names(manifest, prefix)
    layer = key.removesuffix(".weight")
    tensors[key] = ("F8_E4M3", tensors[key][1])
    tensors[f"{layer}.scale_weight"] = ("F32", ())
    tensors[f"{prefix}scaled_fp8"] = ("F8_E4M3", (0,))
    return file(tensors, contents={f"{prefix}scaled_fp8": b""})


def bnb(manifest, *keys, prefix="", container="safetensors", configs=None, kind="nf4"):
    """A file with layers in bitsandbytes' nf4 or fp4."""
    tensors, contents = names(manifest, prefix), {}
    for key in keys:
        shape = tensors[key][1]
        state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
        text = json.dumps(state).encode()
        size = math.prod(shape)
        tensors[key] = ("U8", (size // 2, 1))
        tensors[f"{key}.absmax"] = ("F32", (size // 64,))
        tensors[f"{key}.quant_map"] = ("F32", (16,))
        tensors[f"{key}.quant_state.bitsandbytes__{kind}"] = ("U8", (len(text),))
        contents[f"{key}.quant_state.bitsandbytes__{kind}"] = text
    return file(tensors, container, contents=contents, configs=configs, path="folder")


def bnb_int8(manifest, key):
    tensors = names(manifest)
    shape = tensors[key][1]
    layer = key.removesuffix("weight")
    tensors[key] = ("I8", shape)
    tensors[f"{layer}SCB"] = ("F32", (shape[0],))
    tensors[f"{layer}weight_format"] = ("U8", ())
    return file(tensors, contents={f"{layer}weight_format": b"\0"})


def bfl(manifest, key):
    """A file of Black Forest Labs' own: rowwise scales and no marker."""
    tensors = names(manifest)
    shape = tensors[key][1]
    tensors[key] = ("F8_E4M3", shape)
    tensors[key.replace("weight", "weight_scale")] = ("F32", (shape[0],))
    return file(tensors)


def sdnq():
    """A component of SDNQ: int8 of one layer, and a config that says so."""
    tensors = names("flux-dev.transformer.diffusers")
    n, k = tensors[DLAYER][1]
    tensors[DLAYER] = ("I8", (n, k))
    tensors[DLAYER.replace("weight", "scale")] = ("F32", (n, 1))
    config = {
        "quant_method": "sdnq",
        "weights_dtype": "int8",
        "modules_to_not_convert": [],
        "group_size": -1,
    }
    configs = {"config.json": {"_class_name": "FluxTransformer2DModel"}}
    configs["config.json"]["quantization_config"] = config
    return file(tensors, "diffusers_folder", configs=configs, path="folder")


def header_marked(prefix):
    """Layers named in the header, with or without the prefix of their tensors."""
    tensors = names(FLUX, LDM)
    tensors[LDM + LAYER] = ("F8_E4M3", tensors[LDM + LAYER][1])
    tensors[LDM + LAYER.replace("weight", "weight_scale")] = ("F32", ())
    layers = {prefix + LAYER.removesuffix(".weight"): {"format": "float8_e4m3fn"}}
    said = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return file(tensors, said=said)


def narrow(manifest, by=5):
    """A UNet of a fifth of its widths, as demo models have."""
    small = {
        key: (dtype, tuple(max(n // by, 1) if n % 32 == 0 else n for n in shape))
        for key, (dtype, shape) in names(manifest, LDM).items()
    }
    return file(small)


def lora(*endings, dtype="F16", said=None):
    """A LoRA-like file with these endings on one layer."""
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    return file({layer + one: (dtype, (4, 320)) for one in endings}, said=said)


def folder(*parts, configs):
    tensors = {}
    for name, manifest in parts:
        tensors.update(names(manifest, f"{name}/"))
    return file(tensors, "diffusers_folder", configs=configs, path="folder")


FLUX, DFLUX = "flux-dev.transformer.original", "flux-dev.transformer.diffusers"
LAYER = "double_blocks.0.img_mlp.0.weight"
DLAYER = "transformer_blocks.0.attn.to_q.weight"
SD3 = "sd3-medium.transformer.original"
QWEN, ZIMAGE = "qwen-image.transformer.comfy", "z-image.transformer.comfy"
SD = "sd15.checkpoint.ldm-webui-fp16"
UNET, DUNET = "sd15.unet.ldm", "sd15.unet.diffusers"
TO_Q = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
CONV = "middle_block.0.in_layers.2.weight"
PLAIN_LORA = (".lora_down.weight", ".lora_up.weight", ".alpha")
INDEX = {"model_index.json": {"_class_name": "StableDiffusionPipeline"}}
UNET_CONFIG = {"_class_name": "UNet2DConditionModel"}
SD_PARTS = (("unet", DUNET), ("vae", "sd.vae-kl-f8.diffusers"), ("text_encoder", "clip-l.hf"))
SAID_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def component(manifest, config=UNET_CONFIG):
    configs = {"config.json": config}
    return file(names(manifest), "diffusers_folder", configs=configs, path="folder")


def bare_folder(manifest):
    """A folder of one file and no config, which is opened as that file."""
    found = file(names(manifest), path="folder/model.safetensors")
    return found, "folder"


def flat_tokens(container):
    """Z-Image with pad tokens that lost their leading 1."""
    add = dict.fromkeys(("x_pad_token", "cap_pad_token"), ("F16", (3840,)))
    if container == "gguf":
        return gguf(ZIMAGE, "lumina2", add=add)
    return file({**names(ZIMAGE), **add})


def model(manifest, prefix="", container="safetensors", **options):
    return file(names(manifest, prefix), container, **options)


def checkpoint(manifest=SD, container="safetensors"):
    return file(names(manifest), container)


def index(manifest, prefix=""):
    return file(names(manifest, prefix), "sharded", path="m.safetensors.index.json")


def t5_gguf(architecture="t5encoder", kind="model", container="gguf"):
    said = {"general.architecture": ("str", architecture), "general.type": ("str", kind)}
    tensors = names("t5-xxl-encoder.hf", dtype="F16")
    return file(tensors, container, said=said if container == "gguf" else None)


def vae_gguf():
    said = {"general.architecture": ("str", "vae")}
    return file(names("sd.vae-kl-f8.ldm", dtype="F16"), "gguf", said=said)


def matrix():
    said = {"general.type": ("str", "imatrix")}
    return file({"blk.in_sum2": ("F32", (1, 64)), "blk.counts": ("F32", (1, 1))}, "gguf", said=said)


EMBEDDING = {"emb_params": ("F32", (4, 768))}
FURTHER = Path(__file__).parents[1] / "data" / "further_manifests.json.xz"
CONTROL = {
    key: ("F16", tuple(shape))
    for key, shape in json.loads(lzma.decompress(FURTHER.read_bytes()))["sd15.controlnet"].items()
}
INDEXED = {"unet:0:up": ("F32", (4, 320)), "unet:0:down": ("F32", (320, 4))}
DEEP = {"deep.weight": ("F16", (2, 2, 2, 2, 2))}
BF16_CONV = "input_blocks.0.0.weight"


def unet_gguf(prefix=LDM, name="sd1", **dtypes):
    return gguf(UNET, name, prefix=prefix, **dtypes)


def odd_flux():
    """Flux of two heads."""
    small = {
        key: (dtype, tuple(n // 12 if n % 3072 == 0 else n for n in shape))
        for key, (dtype, shape) in names(FLUX).items()
    }
    return file(small)


def no_pooled():
    add = {"vector_in.in_layer.weight": ("BF16", (3072, 128))}
    return file({**names(FLUX), **add})


# Rule -> (a file on which it applies, a file on which it does not).
CASES = {
    # ComfyUI
    "comfyui.checkpoint": (checkpoint, lambda: model(UNET)),
    "comfyui.diffusion-model": (lambda: model(FLUX), checkpoint),
    "comfyui.vae": (lambda: model("flux.vae.original"), lambda: model("taesd.vae.diffusers")),
    "comfyui.tiny-vae": (
        lambda: model("taesd.decoder.original"),
        lambda: model("flux.vae.original"),
    ),
    "comfyui.tiny-vae-file": (
        lambda: model("taesd.decoder.original"),
        lambda: model("taesd.vae.diffusers"),
    ),
    "comfyui.text-encoder": (lambda: model("t5-xxl-encoder.comfy"), lambda: t5_gguf()),
    "comfyui.lora": (lambda: lora(*PLAIN_LORA), lambda: model(FLUX)),
    "comfyui.lora-indexed": (lambda: file(INDEXED), lambda: lora(*PLAIN_LORA)),
    "comfyui.textual-inversion": (lambda: file(EMBEDDING), lambda: file(CONTROL)),
    "comfyui.controlnet": (lambda: file(CONTROL), lambda: file(EMBEDDING)),
    "comfyui.gguf": (lambda: gguf(FLUX), lambda: model(FLUX)),
    "comfyui.folder": (lambda: folder(*SD_PARTS, configs=INDEX), lambda: component(DUNET)),
    "comfyui.component-folder": (lambda: component(DUNET), lambda: model(DUNET)),
    "comfyui.component-file": (lambda: component(DUNET), lambda: model(DUNET)),
    "comfyui.shards": (lambda: index(FLUX), lambda: model(FLUX)),
    "comfyui.extension": (lambda: model(FLUX, path="flux.gguf"), lambda: model(FLUX)),
    "comfyui.pickle": (lambda: checkpoint(container="torch_pickle"), checkpoint),
    "comfyui.parts": (lambda: model(FLUX), checkpoint),
    "comfyui.diffusers-unet": (
        lambda: model("segmind-tiny-sd.unet.diffusers"),
        lambda: model(DUNET),
    ),
    "comfyui.distilled-unet": (
        lambda: model("bk-sdm-small.unet.original"),
        lambda: model("bk-sdm-small.unet.diffusers"),
    ),
    "comfyui.diffusers-names": (
        lambda: model("flux2-dev.transformer.diffusers"),
        lambda: model(DFLUX),
    ),
    "comfyui.unet-width": (lambda: narrow(UNET), lambda: model(UNET)),
    "comfyui.clip-names": (lambda: model("clip-l.hf-transformers5"), lambda: model("clip-l.hf")),
    "comfyui.kolors": (lambda: model("kolors.unet.diffusers"), lambda: model("sdxl-base.unet.ldm")),
    "comfyui.pad-tokens": (lambda: flat_tokens("safetensors"), lambda: model(ZIMAGE)),
    "comfyui.bitsandbytes": (lambda: bnb(FLUX, LAYER), lambda: model(FLUX)),
    "comfyui.sdnq": (sdnq, lambda: component(DFLUX)),
    "comfyui.bfl": (lambda: bfl(FLUX, LAYER), lambda: comfy(FLUX, LAYER)),
    "comfyui.other-packing": (lambda: modelopt(), lambda: scaled(FLUX, LAYER)),
    "comfyui.quantops": (
        lambda: comfy(FLUX, LAYER, {"format": "float8_e4m3fn_rowwise"}, scale=("F32", (12288,))),
        lambda: comfy(FLUX, LAYER),
    ),
    "comfyui.unknown-format": (
        lambda: comfy(FLUX, LAYER, {"format": "int3_of_mine"}),
        lambda: comfy(FLUX, LAYER),
    ),
    "comfyui.no-format": (lambda: comfy(FLUX, LAYER, {}), lambda: comfy(FLUX, LAYER)),
    "comfyui.header-names": (lambda: header_marked(""), lambda: header_marked(LDM)),
    "comfyui.scale-dtype": (
        lambda: comfy(FLUX, LAYER, scale=("BF16", ())),
        lambda: comfy(FLUX, LAYER),
    ),
    "comfyui.not-linear": (lambda: comfy(UNET, CONV), lambda: comfy(UNET, TO_Q)),
    "comfyui.packed-detection": (
        lambda: w4a4("img_in.weight"),
        lambda: w4a4(LAYER),
    ),
    # ComfyUI-GGUF
    "comfyui-gguf.diffusion-model": (lambda: gguf(FLUX), lambda: gguf(FLUX, None)),
    "comfyui-gguf.compatibility": (lambda: gguf(FLUX, "pig"), lambda: gguf(FLUX)),
    "comfyui-gguf.guessed-model": (lambda: gguf(FLUX, None), lambda: gguf(FLUX)),
    "comfyui-gguf.text-encoder": (lambda: t5_gguf(), lambda: t5_gguf("clip")),
    "comfyui-gguf.image-tower": (lambda: t5_gguf("clip", "mmproj"), lambda: t5_gguf()),
    "comfyui-gguf.encoder-safetensors": (lambda: model("t5-xxl-encoder.comfy"), lambda: t5_gguf()),
    "comfyui-gguf.scaled-encoder": (
        lambda: scaled("t5-xxl-encoder.comfy", T5_LAYER),
        lambda: model("t5-xxl-encoder.comfy"),
    ),
    "comfyui-gguf.not-gguf": (lambda: model(FLUX), lambda: gguf(FLUX)),
    "comfyui-gguf.kind": (vae_gguf, lambda: gguf(FLUX)),
    "comfyui-gguf.extension": (
        lambda: (gguf(FLUX), "flux.safetensors"),
        lambda: gguf(FLUX),
    ),
    "comfyui-gguf.architecture": (lambda: gguf(FLUX, "fluxx"), lambda: gguf(FLUX, "flux")),
    "comfyui-gguf.architecture-type": (
        lambda: gguf(FLUX, None, said={"general.architecture": ("u32", 3)}),
        lambda: gguf(FLUX),
    ),
    "comfyui-gguf.not-guessed": (lambda: gguf(QWEN, None), lambda: gguf(FLUX, None)),
    "comfyui-gguf.encoder-architecture": (lambda: t5_gguf("gemma3"), lambda: t5_gguf("t5")),
    "comfyui-gguf.placement": (
        lambda: gguf(ZIMAGE, "lumina2", BF16="_pad_token$"),
        lambda: gguf(ZIMAGE, "lumina2", BF16=r"feed_forward\.w1\.weight$"),
    ),
    "comfyui-gguf.undecodable": (
        lambda: gguf(FLUX, Q8_1=re.escape(LAYER)),
        lambda: gguf(FLUX, Q8_0=re.escape(LAYER)),
    ),
    "comfyui-gguf.slow-type": (
        lambda: gguf(FLUX, IQ2_XS=re.escape(LAYER)),
        lambda: gguf(FLUX, IQ4_XS=re.escape(LAYER)),
    ),
    "comfyui-gguf.slow-reshaped": (
        lambda: shaped(UNET, "sd1", LDM + TO_Q, (400, 256), prefix=LDM, dtype="IQ2_XS"),
        lambda: shaped(UNET, "sd1", LDM + TO_Q, (400, 256), prefix=LDM, dtype="Q4_K"),
    ),
    "comfyui-gguf.diffusers-names": (lambda: gguf(DFLUX), lambda: gguf(FLUX)),
    "comfyui-gguf.pad-tokens": (lambda: flat_tokens("gguf"), lambda: gguf(ZIMAGE, "lumina2")),
    "comfyui-gguf.all-in-one": (lambda: gguf(SD, "sd1"), lambda: unet_gguf()),
    "comfyui-gguf.parts": (lambda: unet_gguf(), lambda: gguf(SD, "sd1")),
    # Forge
    "forge.model": (lambda: model(FLUX), lambda: model(QWEN)),
    "forge.vae": (lambda: model("flux.vae.original"), lambda: model("wan21.vae.original")),
    "forge.text-encoder": (lambda: model("clip-l.hf"), lambda: model("qwen3-4b.hf")),
    "forge.lora": (lambda: lora(*PLAIN_LORA), lambda: model(FLUX)),
    "forge.lora-metadata": (
        lambda: lora(*PLAIN_LORA),
        lambda: lora(*PLAIN_LORA, said={"ss_base_model_version": "sdxl_base_v1-0"}),
    ),
    "forge.textual-inversion": (lambda: file(EMBEDDING), lambda: file(CONTROL)),
    "forge.controlnet": (lambda: file(CONTROL), lambda: file(EMBEDDING)),
    "forge.engine": (lambda: model(QWEN), lambda: model(FLUX)),
    "forge.unet-width": (lambda: narrow(UNET), lambda: model(UNET)),
    "forge.sd3-medium": (
        lambda: model("sd3-medium.transformer.original"),
        lambda: model("sd3.5-large.transformer.original"),
    ),
    "forge.folder": (lambda: folder(*SD_PARTS, configs=INDEX), checkpoint),
    "forge.diffusers-names": (lambda: model(DFLUX), lambda: model(FLUX)),
    "forge.parts": (lambda: model(FLUX), checkpoint),
    "forge.gguf-types": (
        lambda: gguf(FLUX, IQ4_XS=re.escape(LAYER)),
        lambda: gguf(FLUX, Q4_K=re.escape(LAYER)),
    ),
    "forge.orig-shape": (
        lambda: shaped(UNET, "sd1", LDM + TO_Q, (400, 256), prefix=LDM),
        lambda: unet_gguf(),
    ),
    "forge.gguf-lora": (
        lambda: gguf(FLUX, Q4_K=re.escape(LAYER)),
        lambda: gguf(FLUX, Q8_0=re.escape(LAYER)),
    ),
    "forge.scaled-fp8": (lambda: scaled(FLUX, LAYER), lambda: model(FLUX)),
    "forge.comfy-quant": (lambda: comfy(FLUX, LAYER), lambda: scaled(FLUX, LAYER)),
    "forge.other-packing": (lambda: bnb_int8(FLUX, LAYER), lambda: bnb(FLUX, LAYER)),
    "forge.nf4-all": (lambda: bnb(FLUX, LAYER), lambda: model(FLUX)),
    # diffusers
    "diffusers.pipeline-file": (checkpoint, lambda: model(FLUX)),
    "diffusers.model-file": (lambda: gguf(FLUX), checkpoint),
    "diffusers.folder": (
        lambda: folder(*SD_PARTS, configs=INDEX),
        lambda: folder(*SD_PARTS, configs={}),
    ),
    "diffusers.no-config": (lambda: bare_folder(DUNET), lambda: component(DUNET)),
    "diffusers.shards": (lambda: index(DFLUX), lambda: model(DFLUX)),
    "diffusers.shards-folder": (lambda: index(DFLUX), lambda: model(DFLUX)),
    "diffusers.vae-file": (lambda: model("sd.vae-kl-f8.ldm"), lambda: model("taesd.vae.diffusers")),
    "diffusers.vae-classless": (
        lambda: model("taesd.vae.diffusers"),
        lambda: model("sd.vae-kl-f8.ldm"),
    ),
    "diffusers.encoder-file": (lambda: model("clip-l.hf"), lambda: component("clip-l.hf")),
    "diffusers.textual-inversion": (lambda: file(EMBEDDING), lambda: file(CONTROL)),
    "diffusers.controlnet": (lambda: file(CONTROL), lambda: file(EMBEDDING)),
    "diffusers.lora": (lambda: lora(*PLAIN_LORA), lambda: model(FLUX)),
    "diffusers.lora-lycoris": (
        lambda: lora(".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"),
        lambda: lora(*PLAIN_LORA),
    ),
    "diffusers.lora-indexed": (lambda: file(INDEXED), lambda: lora(*PLAIN_LORA)),
    "diffusers.lora-dora": (
        lambda: lora(*PLAIN_LORA, ".dora_scale"),
        lambda: lora(*PLAIN_LORA),
    ),
    "diffusers.gguf-kind": (vae_gguf, lambda: gguf(FLUX)),
    "diffusers.class": (lambda: model("omnigen2.transformer.original"), lambda: model(FLUX)),
    "diffusers.class-member": (
        lambda: model("hunyuan-video-1.5.transformer.diffusers"),
        lambda: model("hunyuan-video.transformer.original"),
    ),
    "diffusers.extension": (lambda: (gguf(FLUX), "flux.safetensors"), lambda: gguf(FLUX)),
    "diffusers.config": (lambda: model(DFLUX), lambda: model(FLUX)),
    "diffusers.unet-prefix": (lambda: unet_gguf(prefix=""), lambda: unet_gguf()),
    "diffusers.qwen-prefix": (
        lambda: gguf(QWEN, "qwen_image", prefix=LDM),
        lambda: gguf(QWEN, "qwen_image"),
    ),
    "diffusers.flux-width": (odd_flux, lambda: model(FLUX)),
    "diffusers.parts": (lambda: model(FLUX), checkpoint),
    "diffusers.gguf-all-in-one": (lambda: gguf(SD, "sd1"), lambda: unet_gguf()),
    "diffusers.gguf-types": (
        lambda: gguf(FLUX, MXFP4=re.escape(LAYER)),
        lambda: gguf(FLUX, IQ4_NL=re.escape(LAYER)),
    ),
    "diffusers.placement": (
        lambda: unet_gguf(BF16=re.escape(BF16_CONV)),
        lambda: unet_gguf(BF16=re.escape(TO_Q)),
    ),
    "diffusers.orig-shape": (
        lambda: shaped(UNET, "sd1", LDM + TO_Q, (400, 256), prefix=LDM),
        lambda: unet_gguf(),
    ),
    "diffusers.pad-tokens": (lambda: flat_tokens("gguf"), lambda: gguf(ZIMAGE, "lumina2")),
    "diffusers.file-scales": (lambda: comfy(FLUX, LAYER), lambda: model(FLUX)),
    "diffusers.file-bitsandbytes": (
        lambda: bnb(FLUX, LAYER),
        lambda: bnb(DFLUX, DLAYER, container="diffusers_folder"),
    ),
    "diffusers.file-bfl": (lambda: bfl(FLUX, LAYER), lambda: model(FLUX)),
    "diffusers.bitsandbytes-config": (
        lambda: bnb(DFLUX, DLAYER, container="diffusers_folder", configs={"config.json": {}}),
        lambda: bnb(
            DFLUX,
            DLAYER,
            container="diffusers_folder",
            configs={"config.json": {"quantization_config": SAID_BNB}},
        ),
    ),
    "diffusers.bitsandbytes-gpu": (
        lambda: bnb(DFLUX, DLAYER, container="diffusers_folder"),
        lambda: component(DFLUX),
    ),
    "diffusers.bitsandbytes-mixed": (
        lambda: mixed_bnb(),
        lambda: bnb(DFLUX, DLAYER, container="diffusers_folder"),
    ),
    "diffusers.sdnq": (sdnq, lambda: component(DFLUX)),
    # stable-diffusion.cpp
    "sdcpp.model": (lambda: gguf(FLUX), lambda: model("pixart-sigma.transformer.original")),
    "sdcpp.vae": (lambda: model("flux.vae.original"), lambda: model("taesd.vae.diffusers")),
    "sdcpp.tiny-vae": (
        lambda: model("taesd.vae.diffusers"),
        lambda: model("taesd.decoder.original"),
    ),
    "sdcpp.tiny-vae-half": (
        lambda: model("taesd.decoder.original"),
        lambda: model("taesd.vae.diffusers"),
    ),
    "sdcpp.text-encoder": (lambda: model("clip-l.hf"), lambda: model("qwen3-4b.hf")),
    "sdcpp.language-model": (lambda: model("qwen3-4b.hf"), lambda: model("clip-l.hf")),
    "sdcpp.lora": (lambda: lora(*PLAIN_LORA), lambda: model(FLUX)),
    "sdcpp.lora-dora": (lambda: lora(*PLAIN_LORA, ".dora_scale"), lambda: lora(*PLAIN_LORA)),
    "sdcpp.lora-kind": (lambda: lora(".oft_blocks"), lambda: lora(*PLAIN_LORA)),
    "sdcpp.textual-inversion": (lambda: file(EMBEDDING), lambda: file(CONTROL)),
    "sdcpp.controlnet": (lambda: file(CONTROL), lambda: file(EMBEDDING)),
    "sdcpp.folder": (lambda: folder(*SD_PARTS, configs=INDEX), checkpoint),
    "sdcpp.unet-folder": (lambda: folder(*SD_PARTS, configs=INDEX), checkpoint),
    "sdcpp.transformer-folder": (
        lambda: folder(("transformer", DFLUX), configs=INDEX),
        lambda: folder(*SD_PARTS, configs=INDEX),
    ),
    "sdcpp.component-folder": (lambda: component(DUNET), lambda: model(DUNET)),
    "sdcpp.architecture": (
        lambda: model("pixart-sigma.transformer.original"),
        lambda: model(FLUX),
    ),
    "sdcpp.parts": (lambda: model(FLUX), checkpoint),
    "sdcpp.orig-shape": (
        lambda: shaped(UNET, "sd1", LDM + TO_Q, (400, 256), prefix=LDM),
        lambda: unet_gguf(),
    ),
    "sdcpp.arrays-beside-5d": (
        lambda: gguf(FLUX, add=DEEP, said={"x.y": ("array", array(1, 2))}),
        lambda: gguf(FLUX, add=DEEP),
    ),
    "sdcpp.diffusers-names": (lambda: model(DUNET), lambda: model(UNET)),
    "sdcpp.clip-names": (lambda: model("clip-l.hf-transformers5"), lambda: model("clip-l.hf")),
    "sdcpp.unet-width": (lambda: narrow(UNET), lambda: model(UNET)),
    "sdcpp.flux-width": (no_pooled, lambda: model(FLUX)),
    "sdcpp.packing": (lambda: bnb(FLUX, LAYER), lambda: comfy(FLUX, LAYER)),
    "sdcpp.scaled-fp8": (lambda: comfy(FLUX, LAYER), lambda: model(FLUX)),
    "sdcpp.int8": (
        lambda: comfy(
            FLUX, LAYER, {"format": "int8_tensorwise"}, dtype="I8", scale=("F32", (12288, 1))
        ),
        lambda: comfy(FLUX, LAYER),
    ),
    # diffquant
    "diffquant.model": (lambda: model(FLUX), lambda: model("sd3-medium.transformer.original")),
    "diffquant.vae": (
        lambda: model("taesd.vae.diffusers"),
        lambda: model("taesd.encoder.original"),
    ),
    "diffquant.lora": (lambda: lora(*PLAIN_LORA), lambda: model(FLUX)),
    "diffquant.architecture": (
        lambda: model("sd3-medium.transformer.original"),
        lambda: model(FLUX),
    ),
    "diffquant.text": (lambda: model("flux2-dev.transformer.original"), lambda: model(FLUX)),
    "diffquant.conditioned": (
        lambda: file({**names(FLUX), "img_in.weight": ("BF16", (3072, 128))}),
        lambda: model("flux-fill.transformer.original"),
    ),
    "diffquant.part": (lambda: file(CONTROL), lambda: model(FLUX)),
    "diffquant.other-vae": (
        lambda: model("taesd.encoder.original"),
        lambda: model("flux.vae.original"),
    ),
    "diffquant.unreadable": (
        lambda: comfy(FLUX, LAYER, {"format": "int3_of_mine"}),
        lambda: comfy(FLUX, LAYER),
    ),
    "diffquant.parts": (lambda: model(FLUX), checkpoint),
    **{f"{name}.imatrix": (matrix, lambda: gguf(FLUX)) for name in LOADERS},
}

T5_LAYER = "encoder.block.0.layer.0.SelfAttention.q.weight"


def w4a4(key):
    """One layer in ComfyUI's 4-bit rotated format: half as wide on disk."""
    n, k = names(FLUX)[key][1]
    marker = {"format": "convrot_w4a4", "convrot_groupsize": 64}
    return comfy(FLUX, key, marker, dtype="I8", scale=("F32", (n,)), shape=(n, k // 2))


def mixed_bnb():
    """nf4 and fp4 side by side in one component."""
    other_layer = DLAYER.replace("to_q", "to_k")
    one = bnb(DFLUX, DLAYER, container="diffusers_folder")
    other = bnb(DFLUX, other_layer, container="diffusers_folder", kind="fp4")
    specs = {**one.specs, **{k: v for k, v in other.specs.items() if k.startswith(other_layer)}}
    contents = {**one.contents, **other.contents}
    configs = {"config.json": {"quantization_config": SAID_BNB}}
    return Header(specs, one.container, configs=configs, contents=contents, path=Path("folder"))


def modelopt():
    """nvfp4 of ModelOpt: low nibble first, and a header that names its maker."""
    tensors = names(FLUX)
    n, k = tensors[LAYER][1]
    layer = LAYER.removesuffix("weight")
    tensors[LAYER] = ("U8", (n, k // 2))
    tensors[layer + "weight_scale"] = ("F8_E4M3", (n, k // 16))
    tensors[layer + "weight_scale_2"] = ("F32", ())
    said = {"quantization_config": json.dumps({"producer": {"name": "modelopt"}})}
    return file(tensors, said=said)


def subject(found):
    header, path = found if isinstance(found, tuple) else (found, "")
    return subject_of(header, path)


def rules_on(found):
    verdicts = loader_report(subject(found))
    return {reason.rule: reason for one in verdicts for reason in one.reasons}


@pytest.mark.parametrize("rule", LOADER_RULES, ids=lambda rule: rule.id)
def test_a_rule_applies_to_one_file_and_not_to_another(rule):
    applies, silent = CASES[rule.id]
    found = rules_on(applies())
    assert rule.id in found
    assert found[rule.id].verdict == rule.verdict
    assert found[rule.id].text.endswith(rule.text)
    assert rule.id not in rules_on(silent())


@pytest.mark.parametrize(
    "rule", [one for one in LOADER_RULES if one.verdict == "refuses"], ids=lambda rule: rule.id
)
def test_a_refusal_decides(rule):
    verdicts = {one.loader: one for one in loader_report(subject(CASES[rule.id][0]()))}
    decided = verdicts[rule.loader]
    assert decided.verdict == "refuses"
    assert decided.reasons[0].verdict == "refuses"


def test_every_rule_is_about_a_known_loader_and_has_a_source():
    ids = [rule.id for rule in LOADER_RULES]
    assert len(ids) == len(set(ids))
    assert {rule.loader for rule in LOADER_RULES} == set(LOADERS)
    assert all(rule.source and rule.text for rule in LOADER_RULES)
    assert not [rule.id for rule in LOADER_RULES if rule.text.endswith(".")]
    assert set(CASES) == set(ids)


def test_loaders_share_their_names_with_targets():
    assert set(LOADERS) - {"diffquant"} <= set(TARGETS)


@pytest.mark.parametrize(
    ("rules", "verdict"),
    [
        ((), "unknown"),
        (("accepts",), "accepts"),
        (("caveat",), "unknown"),
        (("accepts", "caveat"), "caveat"),
        (("accepts", "caveat", "unknown"), "unknown"),
        (("accepts", "unknown", "refuses"), "refuses"),
    ],
)
def test_the_worst_row_decides_and_nothing_is_accepted_unsaid(rules, verdict):
    rows = [LoaderRule(f"sdcpp.{one}", one, "text", "source") for one in rules]
    found = {one.loader: one for one in loader_report(subject(model(FLUX)), rows)}
    assert found["sdcpp"].verdict == verdict
    assert found["forge"].verdict == "unknown"


def test_an_unknown_loader_names_the_closest():
    with pytest.raises(UnknownFormat, match="did you mean 'comfyui-gguf'"):
        check_loader("comfyui-ggf")


def test_a_legacy_matrix_is_refused_by_all(tmp_path):
    assert {one.verdict for one in matrix_report()} == {"refuses"}
    assert [one.loader for one in matrix_report()] == list(LOADERS)


@pytest.mark.parametrize("name", sorted(manifests()))
def test_no_real_model_is_left_without_a_word(name):
    """Every manifest is judged; whatever is refused or conditional says what to do or why."""
    found = loader_report(subject(model(name)))
    assert [one.loader for one in found] == list(LOADERS)
    json.dumps(to_json(found))
    for one in found:
        assert one.reasons or one.verdict == "unknown"


def test_the_runtime_serves_what_is_said_of_it():
    pytest.importorskip("torch")
    from diffquant.runtime.families import FAMILIES

    assert set(FAMILIES) == SERVED


def test_the_page_lists_every_rule_with_its_source():
    text = (DOCS / "loaders.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.-]+)` \| (\w+) \|", text, re.MULTILINE))
    assert rows == {rule.id: rule.verdict for rule in LOADER_RULES}


def test_judging_a_file_loads_neither_torch_nor_numba(examples):
    code = (
        "import sys; from diffquant.inspect.loaders import judge;"
        f"judge({str(examples / 'sd15-shapes')!r});"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numba')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_on_disk_is_judged(examples):
    found = {one.loader: one.verdict for one in judge(examples / "sd15-shapes")}
    assert found["diffusers"] == "accepts"
    assert found["diffquant"] == "accepts"
    assert found["comfyui"] == "refuses"


def test_a_case_tells_a_folder_of_parts_from_a_part_s_folder(examples):
    assert Case(subject(component(DUNET))).container == "component"
    assert Case(subject(folder(*SD_PARTS, configs=INDEX))).container == "folder"
    assert Case(subject(bare_folder(DUNET))).container == "component"
