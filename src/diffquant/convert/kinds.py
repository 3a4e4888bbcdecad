"""What sort of file this is, by names and shapes alone, its architecture known or not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from diffquant.convert.lora.roles import adapter_share, part_of
from diffquant.core.tensors import TensorSpec

__all__ = ["is_lora", "kind_of"]

_INVERSION = re.compile(r"^(emb_params|string_to_param(\.\*)?|clip_[lg]|t5xxl|<[^>]+>|\*)$")
_CONTROLNET = re.compile(
    r"^(control_model\.|controlnet_cond_embedding\.|controlnet_blocks\.|controlnet_x_embedder\."
    r"|controlnet_down_blocks\.|control_layers\.|pos_embed_input\.|input_hint_block\.|zero_convs\.|transformer\.controlnet)"
)
_VAE = re.compile(
    r"^((vae|first_stage_model)\.)?(encoder|decoder)\.((conv_in|conv1|mid|mid_block|middle)\."
    r"|layers\.\d+\.(conv\.\d+\.)?(weight|bias)$)"
)
_TINY_VAE = re.compile(r"^\d+(\.\w+)*\.(weight|bias)$")
_TEXT = re.compile(
    r"(^|\.)(token_embedding|embed_tokens)\.weight$|^(encoder\.)?shared\.weight$|^tok_embeddings\."
)
_DENOISER = re.compile(
    r"^(model\.diffusion_model\.|unet/|transformer/)|^(model\.|net\.)?("
    r"(transformer|double|single|joint|input|output|down|up|vace)_(transformer_)?(blocks|layers)\.\d+\."
    r"|(double|single)_stream_(blocks|layers)\.|layers\.\d+\.(attention|adaLN)|noise_refiner\."
    r"|blocks\.\d+\.(self_attn|cross_attn|attn|mlp|scale_shift_table|adaln)|double_layers\.)"
)


_LOOKED_AT = 200


@dataclass(frozen=True, slots=True)
class _Sort:
    """One row: a kind, and its test; the first that holds decides."""

    kind: str
    test: Callable[[Mapping[str, TensorSpec]], bool]


def _share(pattern: re.Pattern[str], specs: Mapping[str, TensorSpec]) -> float:
    return sum(bool(pattern.search(key)) for key in specs) / max(len(specs), 1)


def _any(pattern: re.Pattern[str], specs: Mapping[str, TensorSpec]) -> bool:
    return any(pattern.search(key) for key in specs)


def is_lora(specs: Mapping[str, TensorSpec]) -> bool:
    """Whether most tensors are an adapter's (alphas and scales aside)."""
    keys = list(specs)
    few = keys[:: max(len(keys) // _LOOKED_AT, 1)]  # spares models a look at every name
    return any(part_of(key) for key in few) and adapter_share(keys) > 0.5


def _is_inversion(specs: Mapping[str, TensorSpec]) -> bool:
    """A few small matrices of token vectors, under a name nothing else uses."""
    vectors = [spec for spec in specs.values() if len(spec.shape) in (1, 2)]
    small = all(spec.shape[0] <= 256 or len(spec.shape) == 1 for spec in vectors)
    return len(specs) <= 4 and bool(vectors) and small and _any(_INVERSION, specs)


def _is_checkpoint(specs: Mapping[str, TensorSpec]) -> bool:
    """A denoiser together with another part."""
    if not _any(_DENOISER, specs):
        return False
    others = (
        "first_stage_model.",
        "vae.",
        "cond_stage_model.",
        "conditioner.",
        "text_encoders.",
        "vae/",
        "text_encoder",
    )
    return any(key.startswith(others) for key in specs)


_SORTS = (
    _Sort("lora", is_lora),
    _Sort("textual_inversion", _is_inversion),
    _Sort("controlnet", lambda specs: _any(_CONTROLNET, specs)),
    _Sort("checkpoint", _is_checkpoint),
    _Sort("diffusion_model", lambda specs: _any(_DENOISER, specs)),
    _Sort("vae", lambda specs: _any(_VAE, specs) or _share(_TINY_VAE, specs) > 0.99),
    _Sort("text_encoder", lambda specs: _any(_TEXT, specs)),
)


def kind_of(specs: Mapping[str, TensorSpec]) -> str:
    """Sort a file by its names and shapes.

    Returns:
        checkpoint, diffusion_model, lora, vae, text_encoder, textual_inversion, controlnet or
        unknown.
    """
    return next((row.kind for row in _SORTS if specs and row.test(specs)), "unknown")
