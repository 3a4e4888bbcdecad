"""Layers that types keep and `--free-kept` packs: diffusers, stable-diffusion.cpp run them packed.

In diffusers the judge is its own model with the decoded numbers as plain weights: a program that
reads a dtype or a width off a packed layer (Wan's time embedding there is one) differs or stops.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
from test_diffusers import FLUX_CONFIG
from test_sdcpp import decibels, draw

from diffquant.convert.allocation import allocate_bits
from diffquant.convert.budgets import Budget
from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request

pytestmark = pytest.mark.oracle

Client = Callable[[str], Any]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / "cache"))


def smallest(source: Path, out: Path, *among: str) -> tuple[str, ...]:
    """Write the smallest file there is; the layers that were freed."""

    def asked(nbytes: int) -> Budget:
        return Budget("file", nbytes, f"--max-size {nbytes}", among, free_kept=True)

    largest = allocate_bits(source, Request("gguf"), asked(1 << 40)).report
    found = allocate_bits(source, Request("gguf"), asked(largest.smallest_nbytes))
    run_job(source, out, found.request)
    freed = found.report.freed
    assert freed
    assert all(one.format != one.kept_as for one in freed)
    return tuple(one.key for one in freed)


# Of widths that have whole blocks; diffusers' loaders of these take any. Class -> its numbers, and
# the layers that are freed: of the single block of each kind there is.
WIDE: dict[str, tuple[dict[str, Any], int]] = {
    "ZImageTransformer2DModel": (
        {
            "dim": 768,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 12,
            "n_kv_heads": 12,
            "cap_feat_dim": 256,
            "axes_dims": [32, 16, 16],
            "axes_lens": [64, 8, 8],
        },
        15,
    ),
    "Flux2Transformer2DModel": (
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 128,
            "num_attention_heads": 2,
            "joint_attention_dim": 256,
            "timestep_guidance_channels": 256,
            "axes_dims_rope": (32, 32, 32, 32),
            "guidance_embeds": True,
        },
        9,
    ),
    "SD3Transformer2DModel": (
        {
            "sample_size": 8,
            "num_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 4,
            "joint_attention_dim": 256,
            "caption_projection_dim": 256,
            "pooled_projection_dim": 256,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
        },
        4,
    ),
}


def inputs_of(torch: Any, config: Any) -> dict[str, Any]:
    """What one call takes, by the model's class."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    if "ZImage" in config["_class_name"]:
        return {
            "x": [noise(config["in_channels"], 1, 4, 4)],
            "t": torch.tensor([0.7]),
            "cap_feats": [noise(5, config["cap_feat_dim"])],
        }
    if "Flux2" in config["_class_name"]:
        return {
            "hidden_states": noise(1, 16, config["in_channels"]),
            "encoder_hidden_states": noise(1, 5, config["joint_attention_dim"]),
            "timestep": torch.tensor([0.7]),
            "guidance": torch.tensor([3.5]),
            "img_ids": torch.cartesian_prod(*(torch.arange(n) for n in (1, 4, 4, 1))),
            "txt_ids": torch.zeros(5, 4),
        }
    if "SD3" in config["_class_name"]:
        return {
            "hidden_states": noise(1, config["in_channels"], 8, 8),
            "encoder_hidden_states": noise(1, 5, config["joint_attention_dim"]),
            "pooled_projections": noise(1, config["pooled_projection_dim"]),
            "timestep": torch.tensor([700.0]),
        }
    if "QwenImage" in config["_class_name"]:
        return {
            "hidden_states": noise(1, 16, config["in_channels"]),
            "encoder_hidden_states": noise(1, 5, config["joint_attention_dim"]),
            "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.long),
            "timestep": torch.tensor([0.7]),
            "img_shapes": [[(1, 4, 4)]],
        }
    if "Flux" in config["_class_name"]:
        return {
            "hidden_states": noise(1, 16, config["in_channels"]),
            "encoder_hidden_states": noise(1, 5, config["joint_attention_dim"]),
            "pooled_projections": noise(1, config["pooled_projection_dim"]),
            "timestep": torch.tensor([0.7]),
            "guidance": torch.tensor([3.5]),
            "img_ids": torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4)),
            "txt_ids": torch.zeros(5, 3),
        }
    found: dict[str, Any] = {
        "sample": noise(1, config["in_channels"], 8, 8),
        "timestep": 700,
        "encoder_hidden_states": noise(1, 5, config["cross_attention_dim"]),
    }
    if config.get("addition_embed_type") == "text_time":
        width = (
            config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        )
        found["added_cond_kwargs"] = {
            "text_embeds": noise(1, width),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
        }
    return found


def check_diffusers(
    client: Client, silently: Callable[..., Any], name: str, out: Path, config: Path, folder: str
) -> int:
    """Compare a call of the packed model with one of its own numbers; packed layers."""
    diffusers, torch = client("diffusers"), client("torch")
    utils = client("diffusers.quantizers.gguf.utils")
    kind = getattr(diffusers, name)
    packed = silently(
        kind.from_single_file,
        str(out),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
        config=str(config),
        subfolder=folder,
        local_files_only=True,
    )
    plain = silently(kind.from_config, packed.config).eval()
    state, count = {}, 0
    for key, tensor in packed.state_dict().items():
        if hasattr(tensor, "quant_type"):
            tensor, count = utils.dequantize_gguf_tensor(tensor), count + 1
        state[key] = tensor.float()
    plain.load_state_dict(state)
    given = inputs_of(torch, packed.config)
    with torch.no_grad():
        answers = [one(**given, return_dict=False)[0] for one in (plain, packed.eval())]
    expected, found = (one[0] if isinstance(one, list) else one for one in answers)
    assert expected.std() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    return count


@pytest.mark.parametrize(
    ("model", "name", "folder"),
    [
        ("sd15-shapes", "UNet2DConditionModel", "unet"),
        ("sdxl-shapes", "UNet2DConditionModel", "unet"),
        ("qwen-image-shapes", "QwenImageTransformer2DModel", "transformer"),
    ],
)
def test_diffusers_computes_with_freed_layers(
    tmp_path: Path,
    client: Client,
    silently: Callable[..., Any],
    examples: Path,
    model: str,
    name: str,
    folder: str,
) -> None:
    out = tmp_path / "freed.gguf"
    freed = smallest(examples / model, out)
    assert check_diffusers(client, silently, name, out, examples / model, folder) > len(freed)


@pytest.mark.parametrize("name", WIDE)
def test_diffusers_computes_with_freed_layers_of_others(
    tmp_path: Path, client: Client, silently: Callable[..., Any], name: str
) -> None:
    diffusers, torch = client("diffusers"), client("torch")
    config, count = WIDE[name]
    model = tiny_pipelines._model(name, config, torch.Generator().manual_seed(0))
    source, out = tmp_path / "model" / "transformer", tmp_path / "freed.gguf"
    silently(model.to(torch.bfloat16).save_pretrained, source)
    assert isinstance(model, getattr(diffusers, name))
    freed = smallest(source, out)
    assert len(freed) == count
    assert check_diffusers(client, silently, name, out, source.parent, "transformer") > count


@pytest.mark.slow
def test_diffusers_computes_with_freed_layers_of_flux(
    tmp_path: Path,
    client: Client,
    silently: Callable[..., Any],
    random_checkpoint: Callable[..., Path],
) -> None:
    source = random_checkpoint("flux-dev.transformer.original", shallow=True, dtype="BF16")
    config, out = tmp_path / "config" / "transformer", tmp_path / "freed.gguf"
    freed = smallest(source, out, "q4_k", "q8_0")
    config.mkdir(parents=True)
    (config / "config.json").write_text(json.dumps(FLUX_CONFIG))
    name = "FluxTransformer2DModel"
    count = check_diffusers(client, silently, name, out, config.parent, "transformer")
    assert count > len(freed) == 6


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "least"), [("q8_0", 45.0), ("q4_k", 25.0)])
def test_stable_diffusion_cpp_draws_with_a_freed_unet(
    tmp_path: Path, client: Client, random_checkpoint: Callable[..., Path], fmt: str, least: float
) -> None:
    sd = client("cyllama.sd")
    source = random_checkpoint("sd15.checkpoint.ldm-webui-fp16")
    rest, out = tmp_path / "rest.safetensors", tmp_path / "freed.gguf"
    run_job(source, rest, Request("safetensors", parts=("vae", "text_encoder")))
    smallest(source, out, fmt)
    expected = draw(sd, model_path=source)
    found = draw(sd, model_path=rest, diffusion_model_path=out)
    assert expected.std() > 0.1
    assert decibels(expected, found) > least


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "least"), [("q8_0", 45.0), ("q4_k", 25.0)])
def test_stable_diffusion_cpp_draws_with_a_freed_flux(
    tmp_path: Path, client: Client, random_checkpoint: Callable[..., Path], fmt: str, least: float
) -> None:
    sd = client("cyllama.sd")
    source = random_checkpoint("flux-dev.transformer.original", shallow=True, dtype="BF16")
    others = {
        "vae_path": random_checkpoint("flux.vae.original"),
        "clip_l_path": random_checkpoint("clip-l.hf"),
    }
    out = tmp_path / "freed.gguf"
    smallest(source, out, fmt)
    expected = draw(sd, diffusion_model_path=source, **others)
    found = draw(sd, diffusion_model_path=out, **others)
    assert expected.std() > 0.1
    assert decibels(expected, found) > least
