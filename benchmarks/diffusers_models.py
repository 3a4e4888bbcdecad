"""Real-size models of diffusers and transformers without initial values, and memory for them.

Their parameters have the names and shapes of the published files (tests/data), which the
configurations below were checked against.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from random_weights import gaussian, is_norm

# What the published config.json files say beyond the classes' defaults.
_SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5 = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
_QWEN = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584},
}
_SD15_UNET = {"cross_attention_dim": 768, "sample_size": 64}
_SDXL_UNET = {
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
_FLUX_VAE = {
    **_SD_VAE,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "sample_size": 1024,
}
# Component -> (class, config): real ones; tiny ones are read from the folder in examples/.
COMPONENTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "sd15": {
        "unet": ("UNet2DConditionModel", _SD15_UNET),
        "vae": ("AutoencoderKL", _SD_VAE),
        "text_encoder": ("CLIPTextModel", _CLIP_L),
    },
    "sdxl": {
        "unet": ("UNet2DConditionModel", _SDXL_UNET),
        "vae": ("AutoencoderKL", {**_SD_VAE, "scaling_factor": 0.13025, "sample_size": 1024}),
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
    },
    "flux1": {
        "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
        "vae": ("AutoencoderKL", _FLUX_VAE),
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("T5EncoderModel", _T5),
    },
    "qwen_image": {
        "transformer": ("QwenImageTransformer2DModel", {}),
        "vae": ("AutoencoderKLQwenImage", {}),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration", _QWEN),
    },
}


def built(kind: str, stated: dict[str, Any]) -> Any:
    import diffusers
    import transformers

    if hasattr(diffusers, kind):
        cls = getattr(diffusers, kind)
        return cls.from_config(stated) if "_class_name" in stated else cls(**stated)
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**stated))


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Parameters have a shape and no values; buffers and tables of positions are real."""
    import accelerate
    import torch

    init = torch.nn.init
    names = [name for name in dir(init) if name.endswith("_") and not name.startswith("_")]
    kept = {name: getattr(init, name) for name in names}
    for name in names:
        setattr(init, name, lambda tensor, *_args, **_kwargs: tensor)
    try:
        with accelerate.init_empty_weights(include_buffers=False):
            yield
    finally:
        for name, function in kept.items():
            setattr(init, name, function)


class Weights:
    """The memory that a component's parameters lie in, one after another."""

    def __init__(self, module: Any, dtype: Any) -> None:
        import torch

        total = sum(param.numel() for param in module.parameters())
        self.flat = torch.empty(total, dtype=dtype)
        tile = torch.from_numpy(np.array(gaussian())).view(torch.bfloat16).to(dtype)
        whole = total // tile.numel() * tile.numel()
        self.flat[:whole].view(-1, tile.numel()).copy_(tile)
        self.flat[whole:] = tile[: total - whole]
        self._locked = False

    def give(self, module: Any) -> None:
        """Let a module's parameters be this memory."""
        import torch

        at = 0
        made: dict[int, Any] = {}
        for name, param in list(module.named_parameters(remove_duplicate=False)):
            if id(param) not in made:
                view = self.flat[at : at + param.numel()].view(param.shape)
                at += param.numel()
                if is_norm(name, tuple(param.shape)):
                    view.fill_(1)
                made[id(param)] = param, torch.nn.Parameter(view, requires_grad=False)
            owner = module.get_submodule(name.rpartition(".")[0])
            owner._parameters[name.rpartition(".")[2]] = made[id(param)][1]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Page-locked meanwhile."""
        import torch

        runtime = torch.cuda.cudart()
        code = runtime.cudaHostRegister(self.flat.data_ptr(), self.flat.nbytes, 0)
        if int(code):
            raise RuntimeError(f"{self.flat.nbytes} bytes cannot be page-locked: error {code}")
        try:
            yield
        finally:
            runtime.cudaHostUnregister(self.flat.data_ptr())
