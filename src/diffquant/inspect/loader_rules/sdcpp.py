"""stable-diffusion.cpp: sd-cli and the libraries built on it.

Checked against cyllama 0.2.18, which carries a build of it, in
tests/clients/test_loader_rules_sdcpp.py: rows whose source says "ran" were seen to do what they
say.
"""

from __future__ import annotations

from diffquant.convert.targets import TARGETS
from diffquant.inspect.loader_rules.case import Case
from diffquant.inspect.loader_rules.looks import (
    fact_differs,
    foreign_names,
    keys_like,
    lacks_parts,
    named,
    odd_unet_width,
    reshaped,
    unread_formats,
)
from diffquant.inspect.loader_rules.rule import FILES, MODELS, LoaderRule

__all__ = ["ROWS"]

_SD = "leejet/stable-diffusion.cpp@97d2990:src"
_RAN = "ran with cyllama 0.2.18"
_SINGLE = FILES | {"gguf", "sharded"}
# model_loader.cpp:450-684, as far as our architectures go
_KNOWN = frozenset(
    {
        "sd15", "sd2", "sdxl", "sdxl_refiner", "sd3", "flux1", "flux2", "chroma", "qwen_image",
        "z_image", "wan", "anima", "krea2", "ideogram4", "ltx", "hunyuan",
    }
)  # fmt: skip
_UNKNOWN = frozenset({"omnigen2", "pixart", "auraflow", "kolors", "lumina2"})
_UNETS = frozenset({"sd15", "sd2", "sdxl", "sdxl_refiner"})
_LLMS = frozenset({"qwen2_vl_text", "qwen2_vl_vision", "qwen3_text", "gemma2_text", "mistral_text"})
_MAX_DIMS = 4


def _without_transformer(case: Case) -> str | None:
    return "transformer/" if case.prefix == "transformer/" else None


def _arrays_beside_5d(case: Case) -> str | None:
    deep = [key for key, spec in case.subject.source.specs.items() if len(spec.shape) > _MAX_DIMS]
    if not deep or not case.arrays:
        return None
    return f"{deep[0]} beside {named(case.arrays, 'array keys')}"


def _scaled(case: Case) -> str | None:
    return named((one.key for one in case.stored if one.format == "fp8_e4m3_scaled"), "weights")


def _int8(case: Case) -> str | None:
    reads = TARGETS["sdcpp"].reads["safetensors"]
    names = {name for name in reads if name.startswith("int8")}
    return named((one.key for one in case.stored if one.format in names), "weights")


ROWS = (
    LoaderRule(
        "sdcpp.model",
        "accepts",
        "sd-cli -m for a checkpoint, --diffusion-model for a denoiser alone",
        f"{_SD}/model_loader.cpp:450-684; {_RAN}",
        kinds=MODELS,
        containers=_SINGLE,
        architectures=_KNOWN,
    ),
    LoaderRule(
        "sdcpp.vae",
        "accepts",
        "--vae",
        f"{_SD}/model_loader.cpp:302; {_RAN}",
        kinds=frozenset({"vae"}),
        containers=_SINGLE,
        architectures=frozenset({"vae_kl", "vae_flux2", "vae_qwen"}),
    ),
    LoaderRule(
        "sdcpp.tiny-vae",
        "accepts",
        "--taesd",
        "leejet/stable-diffusion.cpp@97d2990:docs/taesd.md",
        kinds=frozenset({"vae"}),
        containers=_SINGLE,
        architectures=frozenset({"vae_tiny"}),
    ),
    LoaderRule(
        "sdcpp.tiny-vae-half",
        "refuses",
        "--taesd takes encoder and decoder in one file, with Diffusers' names",
        "leejet/stable-diffusion.cpp@97d2990:docs/taesd.md",
        kinds=frozenset({"vae"}),
        architectures=frozenset({"vae_tiny_encoder", "vae_tiny_decoder"}),
    ),
    LoaderRule(
        "sdcpp.text-encoder",
        "accepts",
        "--clip_l, --clip_g or --t5xxl",
        f"{_SD}/convert.cpp:354-387; {_RAN}",
        kinds=frozenset({"text_encoder"}),
        containers=_SINGLE,
        architectures=frozenset({"clip_text", "openclip_text", "t5_encoder"}),
    ),
    LoaderRule(
        "sdcpp.language-model",
        "accepts",
        "--llm, and --llm_vision for an image tower",
        f"{_SD}/llm.hpp:35-45",
        kinds=frozenset({"text_encoder"}),
        containers=_SINGLE,
        architectures=_LLMS,
    ),
    LoaderRule(
        "sdcpp.lora",
        "accepts",
        "--lora-model-dir FOLDER, then <lora:NAME:1> in the prompt",
        "leejet/stable-diffusion.cpp@97d2990:docs/lora.md",
        kinds=frozenset({"lora"}),
        containers=_SINGLE,
    ),
    LoaderRule(
        "sdcpp.lora-dora",
        "caveat",
        "dora_scale is not applied: it draws other pictures",
        f"{_SD}/lora.hpp:389",
        kinds=frozenset({"lora"}),
        when=keys_like(r"\.dora_scale$", "tensors"),
    ),
    LoaderRule(
        "sdcpp.lora-kind",
        "refuses",
        "it knows LoRA, LoHa, LoKr and diff: these tensors are left aside",
        "leejet/stable-diffusion.cpp@97d2990:docs/lora.md; src/lora.hpp",
        kinds=frozenset({"lora"}),
        when=keys_like(r"\.(oft_blocks|oft_diag)$|\.[ab][12]\.weight$|:(up|down)$", "tensors"),
    ),
    LoaderRule(
        "sdcpp.textual-inversion",
        "accepts",
        "--embd-dir FOLDER, then its name in the prompt",
        f"{_SD}/conditioning/conditioner.hpp load_embedding",
        kinds=frozenset({"textual_inversion"}),
        containers=FILES,
    ),
    LoaderRule(
        "sdcpp.controlnet",
        "accepts",
        "--control-net, with a model of the SD1.5 family",
        f"{_SD}/control.hpp",
        kinds=frozenset({"controlnet"}),
        containers=_SINGLE,
        architectures=frozenset({"sd15"}),
    ),
    LoaderRule(
        "sdcpp.folder",
        "caveat",
        "it reads unet/, vae/, text_encoder/ and text_encoder_2/, each as one file",
        f"{_SD}/model_loader.cpp:231-257,426-448",
        containers=frozenset({"folder"}),
        architectures=_UNETS,
    ),
    LoaderRule(
        "sdcpp.unet-folder",
        "accepts",
        "sd-cli -m FOLDER",
        f"{_SD}/model_loader.cpp:231-257,426-448",
        containers=frozenset({"folder"}),
        architectures=_UNETS,
    ),
    LoaderRule(
        "sdcpp.transformer-folder",
        "refuses",
        "of a folder it does not read this: `diffquant convert` the parts to single files",
        f"{_SD}/model_loader.cpp:231-257,426-448",
        containers=frozenset({"folder"}),
        when=_without_transformer,
    ),
    LoaderRule(
        "sdcpp.component-folder",
        "refuses",
        "give it the safetensors file inside, or the shard index",
        f"{_SD}/model_loader.cpp:231-257",
        containers=frozenset({"component"}),
    ),
    LoaderRule(
        "sdcpp.architecture",
        "refuses",
        "it has no such model",
        f"{_SD}/model_loader.cpp:450-684",
        kinds=MODELS,
        architectures=_UNKNOWN,
    ),
    LoaderRule(
        "sdcpp.parts",
        "caveat",
        "give the others: --vae, --clip_l, --clip_g, --t5xxl, --llm",
        f"{_SD}/convert.cpp:354-387; {_RAN}",
        kinds=MODELS,
        containers=_SINGLE,
        architectures=_KNOWN,
        when=lacks_parts,
    ),
    LoaderRule(
        "sdcpp.orig-shape",
        "refuses",
        "it takes shapes as they are stored (wrong shape in model file): "
        "`diffquant quantize --target sdcpp` keeps them",
        f"{_SD}/model_loader.cpp:1461-1473; {_RAN}",
        containers=frozenset({"gguf"}),
        when=reshaped,
    ),
    LoaderRule(
        "sdcpp.arrays-beside-5d",
        "refuses",
        "a file with a tensor of more than four dimensions is read by a second parser, which "
        "takes an array's items for keys",
        f"{_SD}/gguf_reader_ext.h:114-127; {_RAN}",
        containers=frozenset({"gguf"}),
        when=_arrays_beside_5d,
    ),
    LoaderRule(
        "sdcpp.diffusers-names",
        "refuses",
        "a denoiser alone must have its makers' names: `diffquant convert` it to .safetensors, or "
        "quantize it to GGUF",
        f"{_RAN}: SD1.5 and Flux; names are mapped in {_SD}/name_conversion.cpp",
        kinds=MODELS,
        containers=_SINGLE,
        architectures=_KNOWN,
        when=foreign_names,
    ),
    LoaderRule(
        "sdcpp.clip-names",
        "refuses",
        "names of transformers 5, without text_model.: it does not know them",
        f"{_RAN}; {_SD}/name_conversion.cpp",
        kinds=frozenset({"text_encoder"}),
        architectures=frozenset({"clip_text", "openclip_text"}),
        when=keys_like(r"^embeddings\.position_embedding\.weight$", "tensor"),
    ),
    LoaderRule(
        "sdcpp.unet-width",
        "refuses",
        "it has its families' widths in its code",
        f"{_SD}/unet.hpp",
        kinds=MODELS,
        architectures=_UNETS,
        when=odd_unet_width,
    ),
    LoaderRule(
        "sdcpp.flux-width",
        "refuses",
        "it takes pooled text of CLIP-L's width, 768, alone",
        f"{_SD}/flux.hpp",
        kinds=MODELS,
        architectures=frozenset({"flux1"}),
        when=fact_differs("pooled_projection_dim", 768),
    ),
    LoaderRule(
        "sdcpp.packing",
        "refuses",
        "it has no such layer, skips U8 tensors in silence and takes scales for nothing: "
        "quantize the source to GGUF, which it reads best",
        f"{_SD}/safetensors_io.cpp:79-101,249-264",
        containers=FILES | {"sharded"},
        when=unread_formats("sdcpp"),
    ),
    LoaderRule(
        "sdcpp.scaled-fp8",
        "caveat",
        "both spellings of the scale are read since pull request 1913 (2026-08-26); older builds "
        "ignore it and draw a white picture without an error",
        "leejet/stable-diffusion.cpp issue 1898, pull request 1913",
        containers=FILES | {"sharded"},
        when=_scaled,
    ),
    LoaderRule(
        "sdcpp.int8",
        "caveat",
        "int8 layers are read since pull request 1857; older builds do not have them",
        "leejet/stable-diffusion.cpp pull request 1857; docs/int8_convrot.md; " + _RAN,
        containers=FILES | {"sharded"},
        when=_int8,
    ),
)
