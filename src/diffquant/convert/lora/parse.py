"""Read a LoRA file: which layers it holds, by names and shapes; the factors themselves on demand.

    delta W = scale * up @ down      down (r, K) or (r, in, kh, kw)   up (n, r) or (n, r, 1, 1)
    scale   = alpha / r, or alpha / sqrt(r) where PEFT's use_rslora says so; 1 without an alpha

A key is prefix + module + suffix: the prefix says which part of the model and how the module is
written, the suffix which factor it is. Both are tables below. Sources:

- kohya-ss/sd-scripts@450630c:networks/lora_flux.py: lora_unet, lora_te1, lora_te3
- Comfy-Org/ComfyUI@17358c8:comfy/lora.py, model_lora_keys_unet and _clip: the other prefixes
- Comfy-Org/ComfyUI@6f98b15:comfy/weight_adapter/lora.py: suffixes, alpha / r, 1 without alpha
- diffusers 0.42.1 (package), utils/state_dict_utils.py: older suffixes, ".processor."
- diffusers 0.42.1 (package), loaders/lora_base.py: lora_adapter_metadata
- peft 0.21.2 (package), tuners/lora/layer.py: use_rslora
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.logical import LogicalSource
from diffquant.core.errors import ArchitectureError, MalformedFile
from diffquant.core.tensors import TensorSource

__all__ = ["LoraFile", "LoraLayer", "Naming", "factors", "parse_lora"]

Naming: TypeAlias = Literal["underscored", "dotted"]

# Adapters that are not a plain pair of factors; the first that occurs names the file.
_OTHERS = (
    ("DoRA", r"\.dora_scale$|\.lora_magnitude_vector\b"),
    ("LoHa", r"\.hada_(w[12]_[ab]|t[12])$"),
    ("LoKr", r"\.lokr_(w[12](_[ab])?|t2)$"),
    ("GLoRA", r"\.[ab][12]\.weight$"),
    ("OFT", r"\.oft_(blocks|diag|R|r)\b"),
    ("IA3", r"\.on_input$|\.ia3_l\b"),
    ("LoCon with a Tucker core (lora_mid)", r"\.lora_mid\b"),
    ("LoRA on embeddings", r"\.lora_embedding_[AB]\b"),
    ("LoRA with a bias", r"\.lora_(B|up)(\.[^.]+)?\.bias$"),
    ("a full difference", r"\.(diff|diff_b|set_weight|w_norm|b_norm|reshape_weight)$"),
    ("LoRA with XLabs names", r"\.processor\.(qkv|proj)_lora\d?\."),
    ("LoRA with numbered layers (cloneofsimo)", r"^[a-z_0-9]+:\d+:(up|down)$"),
)
_FACTOR = re.compile(
    r"^(?P<module>.+?)(?:"
    r"\.lora_(?P<kohya>down|up)\.weight"
    r"|\.lora_(?P<peft>A|B)(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?"
    r"|[._]lora(?:_linear_layer)?\.(?P<old>down|up)\.weight"
    r")$"
)
_ALPHA = re.compile(r"^(?P<module>.+?)(?:\.lora)?\.alpha$")
_ROLES = {"A": "down", "B": "up"}


@dataclass(frozen=True, slots=True)
class _Prefix:
    """One row: what stands before a module's name."""

    text: str
    part: str
    naming: Naming


_PREFIXES = (
    _Prefix("lora_unet_", "denoiser", "underscored"),
    _Prefix("lora_transformer_", "denoiser", "underscored"),  # OneTrainer
    _Prefix("lycoris_", "denoiser", "underscored"),  # SimpleTuner
    _Prefix("lora_te_", "text_encoder", "underscored"),
    _Prefix("lora_te1_", "text_encoder", "underscored"),
    _Prefix("lora_te2_", "text_encoder_2", "underscored"),
    _Prefix("lora_te3_", "text_encoder_2", "underscored"),  # T5 of Flux, as sd-scripts counts
    _Prefix("model.diffusion_model.", "denoiser", "dotted"),
    _Prefix("diffusion_model.", "denoiser", "dotted"),
    _Prefix("transformer.", "denoiser", "dotted"),
    _Prefix("unet.", "denoiser", "dotted"),
    _Prefix("text_encoders.clip_l.transformer.", "text_encoder", "dotted"),
    _Prefix("text_encoders.t5xxl.transformer.", "text_encoder_2", "dotted"),
    _Prefix("text_encoder_2.", "text_encoder_2", "dotted"),
    _Prefix("text_encoder.", "text_encoder", "dotted"),
    _Prefix("", "", "dotted"),
)
_WRAPPER = "base_model.model."
# Older names of a projection, by the module that holds it; see diffusers' DIFFUSERS_OLD_TO_PEFT.
_OLD_NAMES = (
    (re.compile(r"\.processor\."), "."),
    (re.compile(r"self_attn\.to_([qkv]|out)$"), r"self_attn.\1_proj"),
    (re.compile(r"\.to_out$"), ".to_out.0"),
)


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """One pair of factors.

    Attributes:
        name: what stands before the suffix in the file.
        part: denoiser, text_encoder or text_encoder_2; "" where the file does not say.
        naming: how `module` is written.
        module: the name without its prefix, older spellings made current.
        down, up: keys of the factors.
        down_shape, up_shape: their shapes, two or four dimensions.
        rank: r.
        alpha: as stated by the file; None means alpha = r.
        rooted: alpha is divided by sqrt(r).
    """

    name: str
    part: str
    naming: Naming
    module: str
    down: str
    up: str
    down_shape: tuple[int, ...]
    up_shape: tuple[int, ...]
    rank: int
    alpha: float | None
    rooted: bool = False

    @property
    def kind(self) -> Literal["linear", "conv"]:
        """Whether the factors are written as convolutions."""
        return "conv" if len(self.down_shape) > 2 else "linear"

    @property
    def scale(self) -> float:
        """What `up @ down` is multiplied by at weight 1."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rooted else self.rank)


@dataclass(frozen=True, slots=True)
class LoraFile:
    """What a file holds.

    Attributes:
        layers: in file order.
        ignored: (key, reason) of every tensor that is part of no layer.
    """

    layers: tuple[LoraLayer, ...]
    ignored: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Pair:
    module: str
    keys: dict[str, str]  # role -> key


def parse_lora(source: TensorSource) -> LoraFile:
    """Find the layers of a LoRA; reads scalars only.

    Raises:
        ArchitectureError: no LoRA in it, or another kind of adapter.
        MalformedFile: factors or scalars that contradict each other.
    """
    for what, pattern in _OTHERS:
        if found := next((key for key in source.specs if re.search(pattern, key)), None):
            raise ArchitectureError(
                f"{source.path} is {what}; only LoRA is supported yet (tensor {found})"
            )
    pairs, alphas, ignored = _sort(source)
    configs = dict(_peft_configs(source))
    layers = []
    for pair in pairs:
        if missing := {"down", "up"} - pair.keys.keys():
            key = next(iter(pair.keys.values()))
            ignored.append((key, f"the {missing.pop()} factor of this layer is missing"))
            continue
        layers.append(_layer(source, pair, alphas.pop(pair.module, None), configs))
    ignored += [(key, "alpha of a layer without factors") for key in alphas.values()]
    if not layers:
        first = next(iter(source.specs), "no tensors")
        raise ArchitectureError(f"{source.path}: no LoRA in it (first tensor: {first})")
    return LoraFile(tuple(layers), tuple(ignored))


def factors(
    source: LogicalSource, layer: LoraLayer
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Read copies of (down, up) as float32, in the shapes the file gives them.

    Raises:
        MalformedFile: NaN or infinity in them.
    """
    read = []
    for key, shape in ((layer.down, layer.down_shape), (layer.up, layer.up_shape)):
        values = np.array(source.read(key)).reshape(shape)  # not a view of the mapped file
        if not np.isfinite(values).all():
            raise MalformedFile(f"{key}: NaN or infinity in a LoRA", path=source.source.path)
        read.append(values)
    return read[0], read[1]


def _sort(
    source: TensorSource,
) -> tuple[list[_Pair], dict[str, str], list[tuple[str, str]]]:
    """Pairs in file order, module -> key of its alpha, and the rest."""
    pairs: dict[tuple[str, str], _Pair] = {}
    alphas: dict[str, str] = {}
    ignored: list[tuple[str, str]] = []
    for key in source.specs:
        if match := _FACTOR.match(key):
            written = match["kohya"] or match["peft"] or match["old"]
            pair = _Pair(match["module"], {})
            pair = pairs.setdefault((match["module"], match["adapter"] or ""), pair)
            pair.keys[_ROLES.get(written, written)] = key
        elif match := _ALPHA.match(key):
            alphas[match["module"]] = key
        else:
            ignored.append((key, "no factor of a LoRA by its name"))
    return list(pairs.values()), alphas, ignored


def _layer(
    source: TensorSource, pair: _Pair, alpha_key: str | None, configs: Mapping[str, Any]
) -> LoraLayer:
    down, up = (source.specs[pair.keys[role]] for role in ("down", "up"))
    fits = len(down.shape) in (2, 4) and len(up.shape) in (2, 4)
    if not fits or down.shape[0] != up.shape[1] or not (down.size and up.size):
        raise MalformedFile(
            f"{pair.module}: expected factors (r, K) and (n, r), found down {down.shape} and up "
            f"{up.shape}",
            path=source.path,
        )
    prefix, module = _place(pair.module)
    rank = down.shape[0]
    rooted = False
    if alpha_key is not None:
        alpha: float | None = _scalar(source, alpha_key)
    else:
        alpha, rooted = _stated(configs, prefix, module)
    return LoraLayer(
        name=pair.module,
        part=prefix.part,
        naming=prefix.naming,
        module=module,
        down=down.key,
        up=up.key,
        down_shape=down.shape,
        up_shape=up.shape,
        rank=rank,
        alpha=alpha,
        rooted=rooted,
    )


def _place(name: str) -> tuple[_Prefix, str]:
    """Split a name into its prefix and the module; PEFT's wrapper may stand on either side."""
    name = name.removeprefix(_WRAPPER)
    prefix = next(row for row in _PREFIXES if name.startswith(row.text))
    module = name[len(prefix.text) :].removeprefix(_WRAPPER)
    if prefix.naming == "dotted":
        for pattern, current in _OLD_NAMES:
            module = pattern.sub(current, module)
    return prefix, module


def _scalar(source: TensorSource, key: str) -> float:
    """A one-element tensor of any plain dtype."""
    spec = source.specs[key]
    kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8", "BF16": "<u2"}
    if spec.size != 1 or spec.dtype not in kinds:
        raise MalformedFile(
            f"{key}: expected one number, found {spec.dtype} {spec.shape}", path=source.path
        )
    raw = source.read(key).view(kinds[spec.dtype])
    if spec.dtype == "BF16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    value = float(raw[0])
    if not math.isfinite(value):
        raise MalformedFile(f"{key}: expected a finite alpha, found {value}", path=source.path)
    return value


def _peft_configs(source: TensorSource) -> Iterator[tuple[str, Any]]:
    """PEFT's LoraConfig, flat, as field or "transformer.field" -> value.

    Diffusers writes it into the header, PEFT itself into a file beside adapter_model.safetensors.
    """
    beside = source.path.parent / "adapter_config.json"
    text = source.metadata.get("lora_adapter_metadata")
    where = "lora_adapter_metadata in the header"
    if text is None and source.path.stem == "adapter_model" and beside.is_file():
        text, where = beside.read_text(encoding="utf-8"), beside.name
    if isinstance(text, str):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MalformedFile(f"{where} is not JSON", path=source.path) from error
        if isinstance(found, dict):
            yield from found.items()


def _stated(configs: Mapping[str, Any], prefix: _Prefix, module: str) -> tuple[float | None, bool]:
    """Alpha by a LoraConfig: the module's own by alpha_pattern, else lora_alpha."""

    def field(name: str) -> object:
        return configs.get(prefix.text + name, configs.get(name))

    alpha, pattern = field("lora_alpha"), field("alpha_pattern")
    for key, value in pattern.items() if isinstance(pattern, Mapping) else ():
        if re.match(rf"(.*\.)?({key})$", module):  # peft: utils/other.py, get_pattern_key
            alpha = value
            break
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        return None, False
    return float(alpha), bool(field("use_rslora"))
