"""diffusers and packed weights: GGUF, bitsandbytes, and scales that it leaves aside."""

from __future__ import annotations

from collections.abc import Mapping

from diffquant.convert.dialects.bnb import BNB_FORMATS
from diffquant.inspect.loader_rules.case import Case
from diffquant.inspect.loader_rules.looks import (
    misplaced,
    mixes_bnb,
    packed_as,
    reshaped,
    short_pad_tokens,
    unread_formats,
)
from diffquant.inspect.loader_rules.rule import FILES, MODELS, LoaderRule

__all__ = ["PACKED"]

_DF = "huggingface/diffusers@58eb52c:src/diffusers"
_SINGLE_MODEL = f"{_DF}/loaders/single_file_model.py"
_RAN = "ran with diffusers 0.42.1"


def _bnb_unsaid(case: Case) -> str | None:
    """Components with bitsandbytes layers whose config.json does not say so."""
    configs = case.subject.source.configs
    folders = {one.key.rpartition("/")[0] for one in case.stored if one.format in BNB_FORMATS}
    silent = []
    for folder in sorted(folders):
        config = configs.get(f"{folder}/config.json" if folder else "config.json")
        if not (isinstance(config, Mapping) and "quantization_config" in config):
            silent.append(folder or "the component")
    return ", ".join(silent) or None


PACKED = (
    LoaderRule(
        "diffusers.gguf-types",
        "refuses",
        "it raises for the whole file: `diffquant quantize --target diffusers`",
        f"{_DF}/quantizers/gguf/utils.py:501-516; models/model_loading_utils.py:677-688; {_RAN}",
        kinds=MODELS,
        containers=frozenset({"gguf"}),
        when=unread_formats("diffusers"),
    ),
    LoaderRule(
        "diffusers.placement",
        "refuses",
        "it unpacks in linear layers alone, and BF16 counts as packed: "
        "`diffquant quantize --target diffusers` keeps the others in F32 or F16",
        f"{_DF}/quantizers/gguf/utils.py:136-168; {_RAN}",
        kinds=MODELS,
        containers=frozenset({"gguf"}),
        when=misplaced("diffusers"),
    ),
    LoaderRule(
        "diffusers.orig-shape",
        "refuses",
        "it ignores that key and stops at the shape: `diffquant quantize --target diffusers` "
        "keeps rows as they are",
        f"{_DF}/quantizers/gguf/gguf_quantizer.py:78-92; {_RAN}",
        kinds=MODELS,
        containers=frozenset({"gguf"}),
        when=reshaped,
    ),
    LoaderRule(
        "diffusers.pad-tokens",
        "refuses",
        "they lost their leading 1, and it stops at the shape",
        f"{_DF}/models/transformers/transformer_z_image.py",
        kinds=MODELS,
        when=short_pad_tokens,
    ),
    LoaderRule(
        "diffusers.file-scales",
        "refuses",
        "from_single_file leaves scales aside, so that the weights are other numbers, or stops at "
        "their shape: `diffquant convert` to a folder unpacks nothing, quantize the source to GGUF "
        "or to a bitsandbytes folder instead",
        f"{_SINGLE_MODEL}; {_RAN}",
        containers=FILES | {"component", "folder"},
        when=packed_as("comfy", "scaled_fp8", "modelopt"),
    ),
    LoaderRule(
        "diffusers.file-bitsandbytes",
        "refuses",
        "packed layers of a single file cannot be split into Diffusers' layers: quantize the "
        "source to a folder, -t nf4 with an output without extension",
        "huggingface/diffusers issues 9165, 9996; " + _RAN,
        containers=FILES,
        when=packed_as("bnb"),
    ),
    LoaderRule(
        "diffusers.file-bfl",
        "caveat",
        "pass quantization_config=BFLQuantizationConfig(...), which diffusers 0.42 has",
        "diffusers 0.42.1 quantizers/bfl/bfl_quantizer.py",
        containers=FILES,
        when=packed_as("bfl"),
    ),
    LoaderRule(
        "diffusers.bitsandbytes-config",
        "refuses",
        "a component's config.json must have quantization_config for its packed layers",
        f"{_DF}/quantizers/bitsandbytes/bnb_quantizer.py:170-185; {_RAN}",
        containers=frozenset({"folder", "component"}),
        when=_bnb_unsaid,
    ),
    LoaderRule(
        "diffusers.bitsandbytes-gpu",
        "caveat",
        "bitsandbytes layers load on a GPU alone, and need the package",
        f"{_DF}/quantizers/bitsandbytes/bnb_quantizer.py validate_environment; {_RAN}",
        containers=frozenset({"folder", "component"}),
        when=packed_as("bnb"),
    ),
    LoaderRule(
        "diffusers.bitsandbytes-mixed",
        "refuses",
        "a config.json names one format for the whole component",
        f"{_DF}/quantizers/quantization_config.py:226-280",
        containers=frozenset({"folder", "component"}),
        when=mixes_bnb,
    ),
    LoaderRule(
        "diffusers.sdnq",
        "caveat",
        "needs the package sdnq",
        f"{_DF}/quantizers/quantization_config.py:45-54",
        containers=frozenset({"folder", "component"}),
        when=packed_as("sdnq"),
    ),
)
