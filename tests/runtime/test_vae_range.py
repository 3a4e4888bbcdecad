"""Autoencoders in half precision: overflow is measured, and mended without changing pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffquant.convert.adapters import Adapter
from diffquant.convert.jobs import run_job
from diffquant.convert.request import Request
from diffquant.convert.vae_half import HALF_MAX, Scaled, half_safe_factors, streams
from diffquant.core.errors import UnknownArchitecture, UsageError
from diffquant.runtime.vae_range import decoded_pictures, vae_range

SIZE = 64
BOOST = 2.0**16
EXAMPLES = Path(__file__).parents[2] / "examples"


def rewrite(source, out, factors):
    changes: dict[str, tuple[Adapter, ...]] = {k: (Scaled(f),) for k, f in factors.items()}
    request = Request("safetensors", dtype="f32", parts=("vae",), changes={"vae": changes})
    run_job(source, out, request)
    return out


@pytest.fixture(scope="module")
def boosted(tmp_path_factory):
    """The demo SDXL autoencoder with a stream 2**16 times as large: the same function."""
    source = EXAMPLES / "sdxl-shapes"
    found = vae_range(source, size=SIZE)
    assert found.fits
    factors = {}
    for half in ("encoder", "decoder"):
        for stream in streams(found.shapes, half):
            opens = stream.opener.endswith("conv_in")
            factors[f"{stream.opener}.weight"] = BOOST if opens else 1.0
            for name in (stream.opener, *stream.writers):
                factors[f"{name}.bias"] = BOOST
            factors.update((f"{name}.weight", BOOST) for name in stream.writers)
    kept = {k: f for k, f in factors.items() if f != 1.0 and k in found.shapes}
    return rewrite(source, tmp_path_factory.mktemp("vae") / "boosted.safetensors", kept)


def test_overflow_is_seen_and_mended(boosted, tmp_path):
    before = vae_range(boosted, size=SIZE)
    assert not before.fits
    assert before.peak > HALF_MAX
    assert not before.half_finite
    factors = half_safe_factors(before.shapes, before.peaks)
    after = vae_range(rewrite(boosted, tmp_path / "mended.safetensors", factors), size=SIZE)
    assert after.fits
    assert after.peak <= HALF_MAX / 8
    assert after.half_psnr_db > 50


def test_mending_leaves_pictures_as_they_are(boosted, tmp_path):
    """In float32: 60 dB, since the norms' epsilon weighs more against smaller inputs."""
    before = vae_range(boosted, size=SIZE)
    factors = half_safe_factors(before.shapes, before.peaks)
    mended = rewrite(boosted, tmp_path / "mended.safetensors", factors)
    one, two = (decoded_pictures(path, size=SIZE) for path in (boosted, mended))
    error = torch.mean((one - two) ** 2)
    assert 10 * torch.log10(1 / error) > 60


def test_other_autoencoders_and_none_are_refused():
    with pytest.raises(UnknownArchitecture, match="vae_qwen"):
        vae_range(EXAMPLES / "qwen-image-shapes", size=SIZE)
    with pytest.raises(UsageError, match="no autoencoder"):
        vae_range(EXAMPLES / "sdxl-shapes" / "unet", size=SIZE)
    with pytest.raises(UsageError, match="multiple of 64"):
        vae_range(EXAMPLES / "sdxl-shapes", size=100)
