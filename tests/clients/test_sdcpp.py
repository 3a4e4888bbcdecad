"""stable-diffusion.cpp loads our files and draws with them the picture of the source.

Through cyllama, a wheel that carries it. It fixes the UNet's width at 320 and Flux's pooled width
at 768, so models here have real widths; Flux has one block of each kind and no T5, which the
program allows. Weights are random: the pictures mean nothing, and must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.quant.types import type_named

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

Client = Callable[[str], Any]


def draw(sd: Any, **files: Path) -> np.ndarray:
    """Two steps of 128 x 128 pixels as (height, width, 3) float64 in [0, 1]."""
    parameters = sd.SDContextParams()
    for name, path in files.items():
        setattr(parameters, name, str(path))
    parameters.n_threads = 2
    context = sd.SDContext(parameters)
    assert context.is_valid
    images = context.generate(
        "a red circle", width=128, height=128, sample_steps=2, cfg_scale=1.0, seed=7
    )
    picture: np.ndarray = np.asarray(images[0].to_numpy()).astype(np.float64) / 255
    context.close()
    return picture


def decibels(left: np.ndarray, right: np.ndarray) -> float:
    return float(-10 * np.log10(((left - right) ** 2).mean()))


def quantized(source: Path, folder: Path, name: str) -> Path:
    out = folder / f"{name}.gguf"
    run_job(source, out, Request("gguf", type=type_named(name)))
    return out


@pytest.mark.parametrize(("name", "least"), [("q8_0", 45.0), ("q4_k_s", 25.0)])
def test_it_draws_from_an_sd15_file(
    tmp_path: Path, client: Client, random_checkpoint: Callable[..., Path], name: str, least: float
) -> None:
    sd = client("cyllama.sd")
    source = random_checkpoint("sd15.checkpoint.ldm-webui-fp16")
    rest = tmp_path / "rest.safetensors"
    run_job(source, rest, Request("safetensors", parts=("vae", "text_encoder")))
    denoiser = quantized(source, tmp_path, name)
    expected = draw(sd, model_path=source)
    found = draw(sd, model_path=rest, diffusion_model_path=denoiser)
    assert expected.std() > 0.1
    assert decibels(expected, found) > least


@pytest.mark.parametrize(("name", "least"), [("q8_0", 45.0), ("q4_k_s", 30.0)])
def test_it_draws_from_a_flux_file(
    tmp_path: Path, client: Client, random_checkpoint: Callable[..., Path], name: str, least: float
) -> None:
    sd = client("cyllama.sd")
    source = random_checkpoint("flux-dev.transformer.original", shallow=True, dtype="BF16")
    others = {
        "vae_path": random_checkpoint("flux.vae.original"),
        "clip_l_path": random_checkpoint("clip-l.hf"),
    }
    expected = draw(sd, diffusion_model_path=source, **others)
    found = draw(sd, diffusion_model_path=quantized(source, tmp_path, name), **others)
    assert expected.std() > 0.1
    assert decibels(expected, found) > least
