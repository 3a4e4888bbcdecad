"""diffusers loads our GGUF files with `from_single_file`, and decodes them to our numbers.

Its Flux converter splits fused projections at 3072 and 12288 rows whatever the file's width
(huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
convert_flux_transformer_checkpoint_to_diffusers), so Flux has its real width and one block of each
kind. The UNet and Qwen-Image load at any width, given a config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffquant.convert.detect import to_diffusers
from diffquant.convert.jobs import opened, run_job
from diffquant.convert.plan import Request
from diffquant.quant.types import type_named

pytestmark = pytest.mark.oracle

Client = Callable[[str], Any]

# black-forest-labs/FLUX.1-dev transformer/config.json, one block of each kind.
FLUX_CONFIG = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 1,
    "num_single_layers": 1,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}


def load(
    client: Client, silently: Callable[..., Any], name: str, file: Path, config: Path, folder: str
) -> Mapping[str, Any]:
    """The state dict of a model that diffusers made from a GGUF file."""
    diffusers, torch = client("diffusers"), client("torch")
    model = silently(
        getattr(diffusers, name).from_single_file,
        str(file),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
        config=str(config),
        subfolder=folder,
        local_files_only=True,
    )
    state: Mapping[str, Any] = model.state_dict()
    return state


def compare(client: Client, state: Mapping[str, Any], file: Path) -> None:
    """Hold every tensor against our own decoding, under Diffusers' names."""
    utils = client("diffusers.quantizers.gguf.utils")
    packed = expected = 0
    with opened(file) as (_, logical, match):
        (part,) = match.parts
        assignments = {one.target: one for one in to_diffusers(part)}
        assert state.keys() == assignments.keys()
        for key, tensor in state.items():
            pieces = assignments[key].pieces
            # Diffusers counts bfloat16 as quantized too.
            expected += logical.tensors[pieces[0].key].format not in ("f32", "f16")
            if hasattr(tensor, "quant_type"):
                tensor = utils.dequantize_gguf_tensor(tensor)
                packed += 1
            if tensor.ndim > 1:
                rows = [logical.read(one.key, (one.start, one.stop)) for one in pieces]
                ours = np.concatenate(rows)
            else:
                ours = np.concatenate(
                    [logical.read(one.key)[0, one.start : one.stop] for one in pieces]
                )
            theirs = tensor.float().numpy().reshape(ours.shape)
            # It multiplies scales in float16 where ggml's definition has float32.
            # Not assert_allclose, whose copies take longer than all the rest of a gigabyte.
            size = np.abs(ours)
            gap = np.abs(theirs - ours)
            gap -= np.float32(2e-3) * size
            assert gap.max() <= 2e-3 * size.max(), key  # a NaN is not
    assert packed == expected > 10


# A gigabyte of weights. That diffusers decodes q8_0 as we do, the UNet and Qwen-Image show in CI.
@pytest.mark.parametrize("name", ["q4_k_s", pytest.param("q8_0", marks=pytest.mark.slow)])
def test_flux(
    tmp_path: Path,
    client: Client,
    silently: Callable[..., Any],
    random_checkpoint: Callable[..., Path],
    name: str,
) -> None:
    source = random_checkpoint("flux-dev.transformer.original", shallow=True, dtype="BF16")
    out = tmp_path / "flux.gguf"
    run_job(source, out, Request("gguf", type=type_named(name)), verify="load")
    config = tmp_path / "config" / "transformer"
    config.mkdir(parents=True)
    (config / "config.json").write_text(json.dumps(FLUX_CONFIG))
    state = load(client, silently, "FluxTransformer2DModel", out, config.parent, "transformer")
    compare(client, state, out)


@pytest.mark.parametrize("name", ["q8_0"])
def test_sd15(
    tmp_path: Path, client: Client, silently: Callable[..., Any], examples: Path, name: str
) -> None:
    out = tmp_path / "sd15.gguf"
    run_job(examples / "sd15-shapes", out, Request("gguf", type=type_named(name)))
    state = load(client, silently, "UNet2DConditionModel", out, examples / "sd15-shapes", "unet")
    compare(client, state, out)


@pytest.mark.parametrize("name", ["q4_k_s", "q8_0"])
def test_qwen_image(
    tmp_path: Path, client: Client, silently: Callable[..., Any], examples: Path, name: str
) -> None:
    out = tmp_path / "qwen.gguf"
    folder = examples / "qwen-image-shapes"
    run_job(folder, out, Request("gguf", type=type_named(name)))
    state = load(client, silently, "QwenImageTransformer2DModel", out, folder, "transformer")
    compare(client, state, out)
