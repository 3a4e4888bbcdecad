"""Control models: what steers a denoiser from outside, and which architecture each is made for.

ControlNets, control LoRAs, T2I-Adapters, IP-Adapters, Redux. They are recognised, nothing here
converts them. Marks: Comfy-Org/ComfyUI@03b1ca6:comfy/controlnet.py, load_controlnet_state_dict and
load_t2i_adapter, comfy_extras/nodes_model_patch.py, ModelPatchLoader; the classes of
huggingface/diffusers@58eb52c:src/diffusers/models/controlnets/, src/diffusers/models/adapter.py,
src/diffusers/loaders/ip_adapter.py, transformer_flux.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from diffquant.convert.match import Match, PartMatch
from diffquant.convert.rules import Shape
from diffquant.core.tensors import TensorSpec

__all__ = ["detect_control"]

_Shapes = Mapping[str, Shape]
_PREFIXES = ("", "control_model.", "controlnet.", "module.", "controlnet/")
_CONTEXT = (".attn2.to_k.weight", ".attn2.to_k.down", ".to_k_ip.weight")
_WIDTHS = {768: "sd15", 1024: "sd2", 2048: "sdxl", 2432: "sd3", 4096: "flux1"}


@dataclass(frozen=True, slots=True)
class _Control:
    """One row: what it is, the keys that must be there, and the architecture it is made for."""

    variant: str
    title: str
    required: tuple[str, ...]
    base: str | Callable[[_Shapes], str]


def _by_context(shapes: _Shapes) -> str:
    """The member of the UNet family, or the transformer, by the width of the text it reads."""
    key = next((key for key in shapes if key.endswith(_CONTEXT)), "")
    width = shapes[key][-1] if shapes.get(key) else 0
    if "encoder_hid_proj.weight" in shapes:
        return "kolors"
    if width in _WIDTHS:
        return _WIDTHS[width]
    sized = ("add_embedding.linear_1.weight", "label_emb.0.0.weight", "label_emb.0.0.down")
    return "sdxl" if any(one in shapes for one in sized) else ""


def _by_patches(key: str) -> Callable[[_Shapes], str]:
    """Of a T2I-Adapter: SDXL's unshuffles by 16, SD 1.x's by 8, of one channel or three."""

    def base(shapes: _Shapes) -> str:
        channels = shapes[key][1] if len(shapes[key]) > 1 else 0
        return {64: "sd15", 192: "sd15", 256: "sdxl", 768: "sdxl"}.get(channels, "")

    return base


_BLOCK, _COND = "controlnet_blocks.0.weight", "controlnet_cond_embedding.conv_in.weight"
_T2I, _T2I_THEIRS, _LIGHT = "conv_in.weight", "adapter.conv_in.weight", "body.0.in_conv.weight"
_CONTROLS = (
    _Control("controlnet", "a ControlNet", ("after_proj_list.18.bias",), "hunyuan"),
    _Control("controlnet", "a ControlNet", (_BLOCK, "text_embedding_padding"), "hunyuan"),
    _Control("control_lora", "a control LoRA", ("lora_controlnet",), _by_context),
    _Control(
        "controlnet_union",
        "a ControlNet of several kinds (union)",
        ("control_add_embedding.linear_1.weight", "task_embedding"),
        _by_context,
    ),
    _Control(
        "controlnet_xs",
        "a ControlNet-XS",
        (_COND, "up_connections.0.ctrl_to_base.0.weight"),
        _by_context,
    ),
    _Control(
        "sparse_ctrl",
        "a SparseCtrl encoder of AnimateDiff",
        ("controlnet_cond_embedding.weight", "controlnet_down_blocks.0.weight"),
        _by_context,
    ),
    _Control("controlnet", "a ControlNet", (_COND, "controlnet_down_blocks.0.weight"), _by_context),
    _Control(
        "controlnet",
        "a ControlNet",
        ("input_hint_block.0.weight", "zero_convs.0.0.weight"),
        _by_context,
    ),
    _Control(
        "controlnet",
        "a ControlNet (XLabs)",
        (_BLOCK, "double_blocks.0.img_attn.norm.key_norm.scale"),
        "flux1",
    ),
    _Control(
        "controlnet",
        "a ControlNet (MistoLine)",
        ("controlnet_blocks.0.linear.weight", "double_blocks.0.img_attn.norm.key_norm.scale"),
        "flux1",
    ),
    _Control("controlnet", "a ControlNet", (_BLOCK, "pos_embed_input.proj.weight"), "sd3"),
    _Control(
        "controlnet",
        "a ControlNet",
        (_BLOCK, "transformer_blocks.0.img_mlp.net.0.proj.weight"),
        "qwen_image",
    ),
    _Control(
        "controlnet_fun",
        "a ControlNet (Fun)",
        ("control_blocks.0.after_proj.weight", "control_img_in.weight"),
        "qwen_image",
    ),
    _Control(
        "controlnet_blockwise",
        "a ControlNet of DiffSynth-Studio, block by block",
        ("controlnet_blocks.0.y_rms.weight",),
        "qwen_image",
    ),
    _Control(
        "controlnet_union",
        "a ControlNet of several kinds (union)",
        (_BLOCK, "controlnet_mode_embedder.weight", "controlnet_x_embedder.weight"),
        "flux1",
    ),
    _Control(
        "controlnet",
        "a ControlNet",
        (_BLOCK, "controlnet_x_embedder.weight", "context_embedder.weight"),
        "flux1",
    ),
    _Control(
        "controlnet_fun",
        "a ControlNet (Fun)",
        ("control_all_x_embedder.2-1.weight",),
        "z_image",
    ),
    _Control(
        "controlnet",
        "a ControlNet of Sana",
        (_BLOCK, "caption_norm.weight", "input_block.weight"),
        "",
    ),
    _Control(
        "controlnet",
        "a ControlNet of Cosmos",
        ("patch_embed_base.proj.weight", "time_embed.norm.weight"),
        "",
    ),
    _Control(
        "t2i_adapter",
        "a T2I-Adapter",
        (_T2I_THEIRS, "adapter.body.0.resnets.0.block1.weight"),
        _by_patches(_T2I_THEIRS),
    ),
    _Control(
        "t2i_adapter",
        "a T2I-Adapter",
        (_T2I, "body.0.block1.weight", "body.0.block2.weight"),
        _by_patches(_T2I),
    ),
    _Control(
        "t2i_adapter",
        "a light T2I-Adapter",
        (f"adapter.{_LIGHT}", "adapter.body.0.out_conv.weight"),
        _by_patches(f"adapter.{_LIGHT}"),
    ),
    _Control(
        "t2i_adapter",
        "a light T2I-Adapter",
        (_LIGHT, "body.0.out_conv.weight"),
        _by_patches(_LIGHT),
    ),
    _Control(
        "ip_adapter",
        "an IP-Adapter (XLabs)",
        (
            "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",
            "ip_adapter_proj_model.proj.weight",
        ),
        "flux1",
    ),
    *(
        _Control("ip_adapter", "an IP-Adapter", (f"ip_adapter.{n}.to_k_ip.weight",), _by_context)
        for n in (0, 1)
    ),
    _Control(
        "redux",
        "an embedder of images (Redux)",
        ("redux_up.weight", "redux_down.weight"),
        "flux1",
    ),
)


def detect_control(specs: Mapping[str, TensorSpec]) -> Match | None:
    """Recognise a file that steers a denoiser; None for others.

    The Match names the architecture it is made for, "unknown" where none here has it, and holds one
    part called "controlnet".
    """
    shapes = {key: spec.shape for key, spec in specs.items()}
    for prefix in _PREFIXES:
        for row in _CONTROLS:
            if all(prefix + key in shapes for key in row.required):
                return _match(row, prefix, shapes)
    return None


def _match(row: _Control, prefix: str, shapes: _Shapes) -> Match:
    local = {key[len(prefix) :]: shapes[key] for key in shapes if key.startswith(prefix)}
    base = row.base if isinstance(row.base, str) else row.base(local)
    told = f"{row.title} for {base}" if base else f"{row.title}; for which model is not known here"
    part = PartMatch("controlnet", "controlnet", "canonical", prefix, local, {})
    left = tuple(
        (key, "outside of the control model") for key in shapes if key[: len(prefix)] != prefix
    )
    return Match(base or "unknown", row.variant, "single", (part,), (told,), left, ())
