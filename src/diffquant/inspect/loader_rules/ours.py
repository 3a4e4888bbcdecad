"""diffquant's own runtime: what `diffquant generate` takes.

The runtime's tables stand behind torch, which is not loaded to read a header; a test holds these
names against them.
"""

from __future__ import annotations

from diffquant.inspect.loader_rules.case import Case
from diffquant.inspect.loader_rules.looks import lacks_parts, named
from diffquant.inspect.loader_rules.rule import MODELS, LoaderRule

__all__ = ["ROWS", "SERVED"]

_RUNTIME = "diffquant: runtime/opening.py, runtime/families/"

SERVED = frozenset(
    {"sd15", "sd2", "sdxl", "sdxl_refiner", "flux1", "flux2", "qwen_image", "z_image"}
)
_VAES = frozenset({"vae_kl", "vae_flux2", "vae_qwen", "vae_tiny", "vae_tiny_decoder"})
# Conditions that the runtime cannot give a denoiser; a picture with a mask is none of them.
_PICTURES = {
    "sd15": ("ip2p",),
    "flux1": ("control",),
    "qwen_image": ("layered",),  # editing models draw from text alone, too
}


def _unserved(case: Case) -> str | None:
    return None if case.architecture in SERVED else case.architecture


def _conditioned(case: Case) -> str | None:
    return case.variant if case.variant in _PICTURES.get(case.architecture, ()) else None


def _unspoken(case: Case) -> str | None:
    return case.variant if (case.architecture, case.variant) == ("flux2", "dev") else None


def _unreadable(case: Case) -> str | None:
    return named((key for key, one in case.tensors.items() if one.why), "weights")


ROWS = (
    LoaderRule(
        "diffquant.model",
        "accepts",
        "`diffquant generate MODEL -p PROMPT`",
        _RUNTIME,
        kinds=MODELS,
        architectures=SERVED,
    ),
    LoaderRule(
        "diffquant.vae",
        "accepts",
        "`diffquant generate MODEL --vae FILE`",
        _RUNTIME,
        kinds=frozenset({"vae"}),
        architectures=_VAES,
    ),
    LoaderRule(
        "diffquant.lora",
        "accepts",
        "`diffquant generate MODEL --lora FILE:WEIGHT`, which stops at keys it cannot place",
        "diffquant: runtime/lora.py",
        kinds=frozenset({"lora"}),
    ),
    LoaderRule(
        "diffquant.architecture",
        "refuses",
        "no runtime for it yet; it can be inspected, converted, quantized and verified by tensors",
        _RUNTIME,
        kinds=MODELS,
        when=_unserved,
    ),
    LoaderRule(
        "diffquant.conditioned",
        "refuses",
        "it takes a picture beside the prompt, which the runtime cannot give it",
        _RUNTIME,
        kinds=MODELS,
        architectures=SERVED,
        when=_conditioned,
    ),
    LoaderRule(
        "diffquant.text",
        "refuses",
        "the runtime has no model of its text encoder, Mistral 3",
        _RUNTIME,
        kinds=MODELS,
        architectures=SERVED,
        when=_unspoken,
    ),
    LoaderRule(
        "diffquant.part",
        "refuses",
        "the runtime takes this part from a folder or checkpoint given as MODEL or --base",
        _RUNTIME,
        kinds=frozenset({"text_encoder", "controlnet", "textual_inversion"}),
    ),
    LoaderRule(
        "diffquant.other-vae",
        "refuses",
        "the runtime has no such autoencoder",
        _RUNTIME,
        kinds=frozenset({"vae"}),
        when=lambda case: None if case.architecture in _VAES else case.architecture,
    ),
    LoaderRule(
        "diffquant.unreadable",
        "refuses",
        "packed in a way that is not read here; the file's warnings say why",
        "diffquant: convert/binding.py",
        when=_unreadable,
    ),
    LoaderRule(
        "diffquant.parts",
        "caveat",
        "name where they are with --base or --vae; a file we wrote remembers its source",
        _RUNTIME,
        kinds=MODELS,
        architectures=SERVED,
        when=lacks_parts,
    ),
)
