"""Strangers: files that lie in the same folders as models and are none, named by their marks.

Upscalers and face restorers by the marks that spandrel tells them by (chaiNNer-org/spandrel v0.4.2:
spandrel/architectures/*/__init__.py, `detect`); packings by the keys of their writers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from diffquant.convert.rules import Shape

__all__ = ["packing", "stranger"]

_Shapes = Mapping[str, Shape]
_WRAPPERS = ("", "params_ema.", "params.", "params-ema.", "model.", "module.", "state_dict.")


@dataclass(frozen=True, slots=True)
class _Stranger:
    """One row: what to call it, and the keys that must be there."""

    title: str
    required: tuple[str, ...]


_STRANGERS = (
    _Stranger("an upscaler (ESRGAN)", ("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight")),
    _Stranger("an upscaler (ESRGAN)", ("conv_first.weight", "body.0.rdb1.conv1.weight")),
    _Stranger("an upscaler (ESRGAN)", ("conv_first.weight", "RRDB_trunk.0.RDB1.conv1.weight")),
    _Stranger(
        "an upscaler (SwinIR or Swin2SR)",
        ("conv_first.weight", "layers.0.residual_group.blocks.0.norm1.weight"),
    ),
    _Stranger("an upscaler (DAT)", ("conv_first.weight", "before_RG.1.weight")),
    _Stranger("an upscaler (ATD)", ("conv_first.weight", "relative_position_index_SA")),
    _Stranger(
        "an upscaler (Real-CUGAN)", ("unet1.conv1.conv.0.weight", "unet1.conv_bottom.weight")
    ),
    _Stranger("an upscaler (SPAN)", ("conv_1.sk.weight", "upsampler.0.weight")),
    _Stranger(
        "a face restorer (GFPGAN)", ("toRGB.0.weight", "stylegan_decoder.style_mlp.1.weight")
    ),
)
# Endings of keys -> what writes them: all must be there.
_PACKINGS = (
    # nunchaku-tech/nunchaku@3a3cc3d:nunchaku/models/linear.py
    (
        "SVDQuant (nunchaku): weights in the order of its kernels, under fused names of its own, "
        "which nothing here reads",
        (".qweight", ".wscales"),
    ),
    # AutoGPTQ's and AutoAWQ's names, vllm-project/vllm: model_executor/layers/quantization/gptq.py
    ("packed by GPTQ or AWQ, which nothing here reads", (".qweight", ".qzeros")),
    # huggingface/optimum-quanto 0.2.7: optimum/quanto/nn/qmodule.py:140-159
    ("packed by optimum-quanto, which nothing here reads", (".weight._data", ".weight._scale")),
)
# lllyasviel, AUTOMATIC1111/stable-diffusion-webui: modules/hypernetworks/hypernetwork.py, save: one
# list of layers per width of the attention's input.
_WIDTHS = ("320.", "640.", "768.", "1024.", "1280.", "2048.")


def stranger(shapes: _Shapes) -> str:
    """What a file is that is no part of a diffusion model, "" where nothing says so."""
    for wrapper in _WRAPPERS:
        for row in _STRANGERS:
            if all(wrapper + key in shapes for key in row.required):
                return row.title
    return next((title for title, test in _TESTS if test(shapes)), "")


def packing(shapes: _Shapes) -> str:
    """How the weights are packed, where that hides what they are; "" where nothing says so."""
    return next(
        (
            title
            for title, endings in _PACKINGS
            if all(any(key.endswith(end) for key in shapes) for end in endings)
        ),
        "",
    )


def _is_hypernetwork(shapes: _Shapes) -> bool:
    return bool(shapes) and all(key.startswith(_WIDTHS) for key in shapes)


def _is_motion(shapes: _Shapes) -> bool:
    """AnimateDiff's module alone (huggingface/diffusers@58eb52c:single_file_utils.py:62-160)."""
    return bool(shapes) and all(".motion_modules." in key or "pos_encoder" in key for key in shapes)


def _is_compact(shapes: _Shapes) -> bool:
    """Real-ESRGAN's compact network: convolutions and activations in one row, nothing else."""
    tops = {key.rpartition("body.")[0] for key in shapes}
    return len(tops) == 1 and all(
        ".".join(key.split(".")[-3:-1]).startswith("body.") for key in shapes
    )


_TESTS: tuple[tuple[str, Callable[[_Shapes], bool]], ...] = (
    ("an upscaler (Real-ESRGAN, compact)", _is_compact),
    ("a hypernetwork of the web UI", _is_hypernetwork),
    ("a motion module (AnimateDiff)", _is_motion),
)
