"""diffusers' denoisers for gpu_step.py: plain, with GGUF layers, with bitsandbytes' nf4 layers.

They are built without values (diffusers_models.py) and filled on the device. GGUF layers are
diffusers' own GGUFLinear over bytes of our encoder, which are ggml's; every linear layer of the
blocks gets the format, which is what a Q4_K_S or Q8_0 file has there.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from diffusers_models import COMPONENTS, built, without_values
from random_weights import FOLDERS, STD, Model, is_norm
from step_models import Inputs, Step, Tiles
from torch import nn

GGUF_LAYERS = {"gguf q4_k": "q4_k", "gguf q8_0": "q8_0"}
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
NEEDS = {
    "bf16": ("diffusers", "accelerate"),
    "gguf q4_k": ("diffusers", "accelerate", "gguf"),
    "gguf q8_0": ("diffusers", "accelerate", "gguf"),
    "bnb nf4": ("diffusers", "accelerate", "bitsandbytes"),
}


def missing(kind: str) -> str:
    """What a peer needs and is not installed; "" where nothing."""
    return ", ".join(one for one in NEEDS[kind] if importlib.util.find_spec(one) is None)


def peer(family: str, kind: str, device: str, *, tiny: bool) -> nn.Module:
    """A denoiser of diffusers."""
    component = FOLDERS[family]
    name, config = COMPONENTS[family][component]
    if tiny:
        folder = Model(family, Path(), tiny).example / component
        config = json.loads((folder / "config.json").read_text())
    with without_values():
        model: nn.Module = built(name, config)
    tiles = Tiles(device)
    inside = [
        (f"{path}.{leaf}", layer, leaf, child)
        for path, layer in model.named_modules()
        for leaf, child in layer.named_children()
        if isinstance(child, nn.Linear) and any(one in path.split(".") for one in BLOCKS)
    ]
    for _, layer, leaf, child in inside if kind != "bf16" else ():
        made = _bnb(child, device) if kind == "bnb nf4" else _gguf(child, GGUF_LAYERS[kind], tiles)
        setattr(layer, leaf, made)
    for path, layer in model.named_modules():
        for leaf, parameter in list(layer.named_parameters(recurse=False)):
            if type(parameter) is nn.Parameter:  # not a packed one
                values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                norm = is_norm(f"{path}.{leaf}", tuple(parameter.shape))
                values = values.fill_(1) if norm else values.normal_(0, STD)
                setattr(layer, leaf, nn.Parameter(values, requires_grad=False))
        for leaf, buffer in list(layer.named_buffers(recurse=False)):
            setattr(layer, leaf, buffer.to(device))
    return model.requires_grad_(False).eval()


def _gguf(child: nn.Linear, name: str, tiles: Tiles) -> nn.Module:
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType

    shape = (child.out_features, child.in_features)
    if shape[1] % (256 if name == "q4_k" else 32):
        return child
    with torch.device("meta"):
        made: nn.Module = GGUFLinear(
            shape[1], shape[0], bias=child.bias is not None, compute_dtype=torch.bfloat16
        )
    packed = tiles.parts(name, shape)["weight"]
    made.weight = GGUFParameter(packed, quant_type=GGMLQuantizationType[name.upper()])
    return made


def _bnb(child: nn.Linear, device: str) -> nn.Module:
    import bitsandbytes

    shape = (child.out_features, child.in_features)
    with torch.device("meta"):
        made: nn.Module = bitsandbytes.nn.Linear4bit(
            shape[1],
            shape[0],
            bias=child.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
        )
    values = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, STD)
    weight = bitsandbytes.nn.Params4bit(values, requires_grad=False, quant_type="nf4")
    made.weight = weight.to(device)
    return made


def peer_step(family: str, model: Any, inputs: Inputs) -> Step:
    """One prediction of the same picture."""
    device, side = inputs.pixels.device, inputs.side
    half = torch.full((len(inputs.pixels),), 0.5, device=device, dtype=torch.bfloat16)
    given: dict[str, Any] = {"encoder_hidden_states": inputs.text, "return_dict": False}
    if family == "sdxl":
        ids = torch.full((2, 6), 1024.0, device=device, dtype=torch.bfloat16)
        waves = 6 * model.config.addition_time_embed_dim
        pooled = inputs.pooled
        assert pooled is not None
        added = {"text_embeds": pooled[:, : pooled.shape[1] - waves], "time_ids": ids}
        given |= {"added_cond_kwargs": added}
        return lambda: model(inputs.pixels, 500.0, **given)[0]
    if family == "qwen_image":
        mask = torch.ones(inputs.text.shape[:2], dtype=torch.bool, device=device)
        given |= {"encoder_hidden_states_mask": mask}
        given |= {"img_shapes": [[(1, side // 2, side // 2)]]}
        return lambda: model(hidden_states=inputs.pixels, timestep=half, **given)[0]
    from diffquant.runtime.models.flux import image_ids

    given |= {"pooled_projections": inputs.pooled, "guidance": half.float() * 7}
    given |= {"img_ids": image_ids(side, side).to(device)}
    given |= {"txt_ids": torch.zeros(inputs.text.shape[1], 3, device=device)}
    return lambda: model(hidden_states=inputs.pixels, timestep=half, **given)[0]
