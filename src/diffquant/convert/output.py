"""What surrounds the tensors of an output: header metadata, configs, side files.

Every file we write carries `diffquant.*`: version, type, architecture, the source's base name and
fingerprint (never a path), and `diffquant.config`: the config.json of every part, so that a single
file can become a Diffusers folder again and the runtime need not guess heads or schedules.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
from collections.abc import Mapping
from typing import Any

from diffquant import __version__
from diffquant.convert.bias import BIAS_CORRECTION
from diffquant.convert.detect import Match
from diffquant.convert.dialects.bnb import BNB_FORMATS, FOUR_BITS
from diffquant.convert.plan import Plan, Request
from diffquant.core.tensors import TensorSource

__all__ = ["CONFIG_KEY", "configs_of", "file_metadata", "fingerprint", "folder_configs"]

CONFIG_KEY = "diffquant.config"
_SAMPLES = 64
_SAMPLE_NBYTES = 4096


def fingerprint(source: TensorSource) -> str:
    """Identify a source without reading all of it: sha256 of specs and of evenly spaced samples.

    Samples are 64 slices of at most 4 KiB, one each from tensors spread over the file. Two
    fine-tunes of one model share every name and shape, so the samples are what tells them apart.
    """
    digest = hashlib.sha256()
    keys = sorted(source.specs)
    for key in keys:
        spec = source.specs[key]
        digest.update(f"{key}\0{spec.dtype}\0{spec.shape}\n".encode())
    big = sorted(keys, key=lambda key: (-source.specs[key].nbytes, key))[: _SAMPLES * 4]
    for key in big[:: max(len(big) // _SAMPLES, 1)][:_SAMPLES]:
        spec = source.specs[key]
        if spec.nbytes:
            middle = spec.rows // 2
            data = source.read(key, (middle, middle + 1)) if spec.rows > 1 else source.read(key)
            digest.update(bytes(data[:_SAMPLE_NBYTES]))
    return digest.hexdigest()


def configs_of(source: TensorSource) -> dict[str, Any]:
    """Configs a source brings: files of a folder, or `diffquant.config` in a header."""
    if source.configs:
        return dict(source.configs)
    text = source.metadata.get(CONFIG_KEY)
    if not isinstance(text, str):
        return {}
    try:
        found = json.loads(text).get("configs", {})
    except (ValueError, AttributeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def file_metadata(plan: Plan, match: Match, source: TensorSource) -> dict[str, str]:
    """`diffquant.*` strings for a header; deterministic, no date."""
    out = {
        "diffquant.version": __version__,
        "diffquant.architecture": match.architecture,
        "diffquant.source.name": source.path.name,
        "diffquant.source.fingerprint": fingerprint(source),
        CONFIG_KEY: json.dumps({"configs": configs_of(source)}, sort_keys=True),
    }
    if match.variant:
        out["diffquant.variant"] = match.variant
    if plan.request.type is not None:
        out["diffquant.type"] = plan.request.type.name
    if plan.policy:
        out["diffquant.policy"] = plan.policy
    if plan.request.allocated:
        out["diffquant.allocation"] = plan.request.allocated
    out["diffquant.target"] = plan.target
    if plan.request.rounding != "nearest":
        out["diffquant.rounding"] = plan.request.rounding
    if plan.inputs is not None:
        out["diffquant.rounding.inputs"] = plan.inputs.path.name
        out["diffquant.rounding.inputs.fingerprint"] = fingerprint(plan.inputs.source)
    if plan.bias_fixes:
        out[BIAS_CORRECTION] = f"{len(plan.bias_fixes)} layers, mean inputs of {plan.bias_inputs}"
    if options := _options(plan.request):
        out["diffquant.options"] = options
    if plan.mixed:
        out["diffquant.mixed"] = "less than half of the weights are stored as the named type"
    return out


def _options(request: Request) -> str:
    """Options of `quantize` that chose what is stored, as a shell has them; never a path."""
    words = [word for part in request.parts for word in ("--part", part)]
    words += ["--all"] if request.all_parts else []
    words += ["--pure"] if request.pure else []
    for rule in request.rules:
        words += (
            ["--exclude", rule.pattern]
            if rule.format is None
            else ["--tensor-type", f"{rule.pattern}={rule.format}"]
        )
    if request.recipe is not None and not request.allocated:
        words += ["--recipe-from", request.recipe.name]
    return shlex.join(words)


def folder_configs(plan: Plan, configs: Mapping[str, Any]) -> dict[str, Any]:
    """Configs of a folder output: the source's, plus quantization_config where needed."""
    folders = {step.target.partition("/")[0] for step in plan.steps}
    known = {path.partition("/")[0] for path in configs if "/" in path}
    weightless = {name for name in known if name.startswith(("scheduler", "tokenizer"))}
    out = {
        path: copy.deepcopy(value)
        for path, value in configs.items()
        if "/" not in path or path.partition("/")[0] in folders | weightless
    }
    packed = {
        step.target.partition("/")[0]: step.stored
        for step in plan.steps
        if step.stored in BNB_FORMATS
    }
    for folder in sorted(packed):
        config = out.setdefault(f"{folder}/config.json", {})
        config["quantization_config"] = _bnb_config(plan, folder, packed[folder])
    for folder in folders - set(packed):  # what the source said of weights that are now decoded
        out.get(f"{folder}/config.json", {}).pop("quantization_config", None)
    for folder in folders:  # SDNQ's second place for it
        out.pop(f"{folder}/quantization_config.json", None)
    return out


def _bnb_config(plan: Plan, folder: str, fmt: str) -> dict[str, Any]:
    """What diffusers' bitsandbytes quantizer reads.

    huggingface/diffusers@58eb52c:src/diffusers/quantizers/quantization_config.py:226-280. Its skip
    list names modules; every linear that is not packed must be in it, or it would be packed on
    load.
    """
    skipped = [
        step.target.removeprefix(f"{folder}/").removesuffix(".weight")
        for step in plan.steps
        if step.target.startswith(f"{folder}/")
        and step.stored not in BNB_FORMATS
        and step.target.endswith(".weight")
        and len(step.assignment.shape) == 2
    ]
    four = fmt in FOUR_BITS
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": FOUR_BITS.get(fmt, "fp4"),  # its default, where it has no meaning
        "bnb_4bit_use_double_quant": fmt.endswith("_dq"),
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped or None,
        "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
