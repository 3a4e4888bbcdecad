"""diffusers: `from_single_file` for files, `from_pretrained` for folders, `load_lora_weights`.

Checked against diffusers 0.42.1 in tests/clients/test_loader_rules_diffusers.py: rows whose source
says "ran" were seen to do what they say.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffquant.inspect.loader_rules.case import Case
from diffquant.inspect.loader_rules.diffusers_packed import PACKED
from diffquant.inspect.loader_rules.looks import (
    all_in_one,
    bare_names,
    extension_denies,
    fact_differs,
    keys_like,
    lacks_parts,
)
from diffquant.inspect.loader_rules.rule import FILES, MODELS, LoaderRule

__all__ = ["ROWS"]

_DF = "huggingface/diffusers@58eb52c:src/diffusers"
_SINGLE_MODEL = f"{_DF}/loaders/single_file_model.py"
_SINGLE_UTILS = f"{_DF}/loaders/single_file_utils.py"
_RAN = "ran with diffusers 0.42.1"
_SINGLE = FILES | {"gguf"}
_UNETS = frozenset({"sd15", "sd2", "sdxl", "sdxl_refiner", "kolors"})
# SINGLE_FILE_LOADABLE_CLASSES
_CLASSES = _UNETS | {
    "sd3", "flux1", "flux2", "chroma", "qwen_image", "z_image", "lumina2", "auraflow", "hidream",
    "wan", "hunyuan", "ltx", "krea2",
}  # fmt: skip
_NO_CLASS = frozenset({"omnigen2", "pixart", "anima", "ideogram4"})
_NO_CLASS_VARIANTS = {"hunyuan": ("dit", "dit_v1.1", "image", "video_1.5"), "hidream": ("o1",)}
_LYCORIS = r"\.(hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_blocks|oft_diag|[ab][12]\.weight)$"
_INDEXED = r"^(text_encoder|unet):\d+:(up|down)$"


def _classless(case: Case) -> str | None:
    """A member of the family for which there is no class."""
    rows = _NO_CLASS_VARIANTS.get(case.architecture, ())
    return case.variant if case.variant in rows else None


def _of_one_model(case: Case) -> str | None:
    """What a model class's own from_single_file is given."""
    return "" if case.kind == "diffusion_model" or case.container == "gguf" else None


def _needs_config(case: Case) -> str | None:
    """A file whose configuration it cannot guess by the tensors, or guesses wrongly."""
    part = case.denoiser
    if part is None:
        return None
    if part.layout == "diffusers":
        return "Diffusers' names"
    if case.architecture in ("qwen_image", "kolors") or case.variant.startswith("bk_sdm"):
        return f"{case.architecture} {case.variant}".rstrip()
    bare_xl = case.architecture.startswith("sdxl") and "text_encoder" in case.lacking
    return "an SDXL UNet without text encoders" if bare_xl else None


def _odd_flux(case: Case) -> str | None:
    """Flux in its makers' names, of another width than the published models'."""
    return None if case.diffusers_names else fact_differs("num_attention_heads", 24)(case)


def _prefixed(case: Case) -> str | None:
    """Keys of Qwen-Image, which it does not rename, with a prefix."""
    return f"keys begin with {case.prefix}" if case.prefix else None


def _config(case: Case) -> Mapping[str, object]:
    found = case.subject.source.configs.get("config.json")
    return found if isinstance(found, Mapping) else {}


def _unconfigured(case: Case) -> str | None:
    if case.container == "component":
        return None if _config(case) else "no config.json"
    return None if "model_index.json" in case.subject.source.configs else "no model_index.json"


def _configured(case: Case) -> str | None:
    return "" if _unconfigured(case) is None else None


ROWS = (
    LoaderRule(
        "diffusers.pipeline-file",
        "accepts",
        "the pipeline class's from_single_file; configs come from the hub or from config=",
        f"{_DF}/loaders/single_file.py; {_SINGLE_UTILS}:591-830",
        kinds=frozenset({"checkpoint"}),
        containers=FILES,
        architectures=_CLASSES,
    ),
    LoaderRule(
        "diffusers.model-file",
        "accepts",
        "the model class's from_single_file (quantization_config=GGUFQuantizationConfig(...) for "
        "GGUF)",
        f"{_SINGLE_MODEL} SINGLE_FILE_LOADABLE_CLASSES; {_RAN}",
        kinds=MODELS,
        containers=_SINGLE,
        architectures=_CLASSES,
        when=_of_one_model,
    ),
    LoaderRule(
        "diffusers.folder",
        "accepts",
        "from_pretrained",
        f"{_DF}/pipelines/pipeline_utils.py; {_RAN}",
        containers=frozenset({"folder", "component"}),
        when=_configured,
    ),
    LoaderRule(
        "diffusers.no-config",
        "refuses",
        "from_pretrained needs it: `diffquant convert` with --base FOLDER writes the configs too",
        f"{_DF}/models/modeling_utils.py from_pretrained; {_RAN}",
        containers=frozenset({"folder", "component"}),
        when=_unconfigured,
    ),
    LoaderRule(
        "diffusers.shards",
        "caveat",
        "from_pretrained takes the folder that the index is in, with its config.json",
        f"{_DF}/models/modeling_utils.py from_pretrained",
        containers=frozenset({"sharded"}),
    ),
    LoaderRule(
        "diffusers.shards-folder",
        "accepts",
        "from_pretrained",
        f"{_DF}/models/modeling_utils.py from_pretrained",
        containers=frozenset({"sharded"}),
    ),
    LoaderRule(
        "diffusers.vae-file",
        "accepts",
        "AutoencoderKL.from_single_file or AutoencoderKLWan.from_single_file, with config=",
        f"{_SINGLE_MODEL} SINGLE_FILE_LOADABLE_CLASSES",
        kinds=frozenset({"vae"}),
        containers=FILES,
        architectures=frozenset({"vae_kl", "vae_qwen"}),
    ),
    LoaderRule(
        "diffusers.vae-classless",
        "refuses",
        "from_single_file has no such autoencoder: put the file in a folder with its config.json, "
        "under Diffusers' names",
        f"{_SINGLE_MODEL} SINGLE_FILE_LOADABLE_CLASSES; {_RAN}",
        kinds=frozenset({"vae"}),
        containers=_SINGLE,
        architectures=frozenset({"vae_flux2", "vae_tiny", "vae_tiny_encoder", "vae_tiny_decoder"}),
    ),
    LoaderRule(
        "diffusers.encoder-file",
        "refuses",
        "text encoders are read by transformers, from a folder with config.json and tokenizer",
        f"{_DF}/loaders/single_file_utils.py create_diffusers_clip_model_from_ldm",
        kinds=frozenset({"text_encoder"}),
        containers=FILES,
    ),
    LoaderRule(
        "diffusers.textual-inversion",
        "accepts",
        "load_textual_inversion",
        f"{_DF}/loaders/textual_inversion.py; {_RAN}",
        kinds=frozenset({"textual_inversion"}),
        containers=FILES,
    ),
    LoaderRule(
        "diffusers.controlnet",
        "accepts",
        "ControlNetModel.from_single_file, or from_pretrained for a folder",
        f"{_SINGLE_MODEL} SINGLE_FILE_LOADABLE_CLASSES",
        kinds=frozenset({"controlnet"}),
        containers=FILES,
        architectures=frozenset({"sd15", "sd2", "sdxl"}),
    ),
    LoaderRule(
        "diffusers.lora",
        "accepts",
        "load_lora_weights; what it cannot place it warns of",
        f"{_DF}/loaders/lora_pipeline.py lora_state_dict; {_RAN}",
        kinds=frozenset({"lora"}),
        containers=FILES,
    ),
    LoaderRule(
        "diffusers.lora-lycoris",
        "refuses",
        "LoHa, LoKr, OFT and GLoRA: its converters raise (keys not correctly renamed)",
        f"{_DF}/loaders/lora_conversion_utils.py; {_RAN}",
        kinds=frozenset({"lora"}),
        when=keys_like(_LYCORIS, "tensors"),
    ),
    LoaderRule(
        "diffusers.lora-indexed",
        "refuses",
        "cloneofsimo's format numbers its layers, and no converter knows it",
        f"{_DF}/loaders/lora_conversion_utils.py",
        kinds=frozenset({"lora"}),
        when=keys_like(_INDEXED, "tensors"),
    ),
    LoaderRule(
        "diffusers.lora-dora",
        "caveat",
        "it drops dora_scale with a warning, and applies the rest as a plain LoRA: other pictures",
        f"{_DF}/loaders/lora_pipeline.py:1494-1497; {_RAN}",
        kinds=frozenset({"lora"}),
        when=keys_like(r"\.dora_scale$", "tensors"),
    ),
    LoaderRule(
        "diffusers.gguf-kind",
        "refuses",
        "GGUF is read for denoisers alone",
        f"{_DF}/quantizers/gguf/gguf_quantizer.py; {_SINGLE_MODEL}",
        kinds=frozenset({"lora", "vae", "text_encoder", "controlnet", "textual_inversion"}),
        containers=frozenset({"gguf"}),
    ),
    LoaderRule(
        "diffusers.class",
        "refuses",
        "from_single_file has no class for it: load a Diffusers folder with from_pretrained, where "
        "there is one",
        f"{_SINGLE_MODEL} SINGLE_FILE_LOADABLE_CLASSES; {_RAN}",
        kinds=MODELS,
        containers=_SINGLE,
        architectures=_NO_CLASS,
    ),
    LoaderRule(
        "diffusers.class-member",
        "refuses",
        "from_single_file has a class for other members of the family alone",
        f"{_SINGLE_MODEL} SINGLE_FILE_LOADABLE_CLASSES",
        kinds=MODELS,
        containers=_SINGLE,
        architectures=frozenset(_NO_CLASS_VARIANTS),
        when=_classless,
    ),
    LoaderRule(
        "diffusers.extension",
        "refuses",
        "it chooses its reader by the file's extension: rename the file",
        f"{_DF}/models/model_loading_utils.py load_state_dict; {_RAN}",
        when=extension_denies,
    ),
    LoaderRule(
        "diffusers.config",
        "caveat",
        "what it does not know by certain tensors it takes for SD1.5: pass config=FOLDER and "
        "subfolder=",
        f"{_SINGLE_UTILS}:591-830; {_RAN}",
        kinds=MODELS,
        containers=_SINGLE,
        architectures=_CLASSES,
        when=_needs_config,
    ),
    LoaderRule(
        "diffusers.unet-prefix",
        "refuses",
        "it looks for a UNet's weights under model.diffusion_model. alone: `diffquant convert` "
        "or quantize anew, both write it",
        f"{_SINGLE_UTILS}:1213-1215; {_RAN}",
        kinds=MODELS,
        containers=_SINGLE,
        architectures=_UNETS,
        when=bare_names,
    ),
    LoaderRule(
        "diffusers.qwen-prefix",
        "refuses",
        "it renames nothing for Qwen-Image, whose keys must be bare: `diffquant convert` it",
        f"{_SINGLE_MODEL} QwenImageTransformer2DModel; {_RAN}",
        kinds=MODELS,
        containers=_SINGLE,
        architectures=frozenset({"qwen_image"}),
        when=_prefixed,
    ),
    LoaderRule(
        "diffusers.flux-width",
        "refuses",
        "its converter splits fused layers at 3072 and 12288 rows, whatever the width: "
        "`diffquant convert` it to a folder",
        f"{_SINGLE_UTILS} convert_flux_transformer_checkpoint_to_diffusers; {_RAN}",
        kinds=MODELS,
        containers=_SINGLE,
        architectures=frozenset({"flux1"}),
        when=_odd_flux,
    ),
    LoaderRule(
        "diffusers.parts",
        "caveat",
        "load the others with the pipeline's from_pretrained, and hand this one to it",
        f"{_DF}/pipelines/pipeline_utils.py",
        kinds=MODELS,
        containers=_SINGLE,
        architectures=_CLASSES,
        when=lacks_parts,
    ),
    LoaderRule(
        "diffusers.gguf-all-in-one",
        "caveat",
        "from_single_file of the denoiser's class takes the denoiser and leaves the rest",
        _SINGLE_MODEL,
        kinds=MODELS,
        containers=frozenset({"gguf"}),
        when=all_in_one,
    ),
    *PACKED,
)
