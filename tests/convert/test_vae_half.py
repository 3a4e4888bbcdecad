"""Which tensors of an autoencoder are scaled for half precision, and by what."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffquant.convert.binding import bind
from diffquant.convert.detect import to_canonical
from diffquant.convert.recognise import recognise
from diffquant.convert.vae_half import HALF_MAX, Scaled, half_safe_factors, streams
from diffquant.io import open_source


@pytest.fixture(scope="module")
def shapes(examples):
    with open_source(examples / "sdxl-shapes") as source:
        match = recognise(bind(source).specs(), source.metadata, source.configs)
        part = next(one for one in match.parts if one.name == "vae")
        return {one.target: one.shape for one in to_canonical(part)}


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_every_convolution_on_the_stream_has_its_place_once(shapes, half):
    found = streams(shapes, half)
    assert found[0].opener == f"{half}.conv_in"
    placed = [one for stream in found for one in (stream.opener, *stream.writers)]
    assert len(placed) == len(set(placed))
    wanted = {
        key.removesuffix(".weight")
        for key in shapes
        if key.startswith(half)
        and key.endswith(
            (".conv2.weight", ".nin_shortcut.weight", ".proj_out.weight", "sample.conv.weight")
        )
    }
    assert set(placed) == wanted | {f"{half}.conv_in"}


def test_the_decoder_runs_from_the_deepest_level_to_the_finest(shapes):
    nodes = [node for stream in streams(shapes, "decoder") for node in stream.nodes]
    levels = [int(node.split(".")[2]) for node in nodes if node.startswith("decoder.up.")]
    assert levels == sorted(levels, reverse=True)
    assert nodes[1] == "decoder.mid.block_1"


def test_nothing_changes_where_nothing_overflows(shapes):
    assert half_safe_factors(shapes, {"decoder.mid.block_1": HALF_MAX / 16}) == {}


def test_one_large_stream_is_scaled_between_its_neighbours(shapes):
    first, second, third = streams(shapes, "decoder")[:3]
    factors = half_safe_factors(shapes, {second.nodes[-1]: 8 * HALF_MAX})
    scale = 64.0  # a peak of 8 times the limit, and 8 times headroom
    assert factors[f"{second.opener}.weight"] == factors[f"{second.opener}.bias"] == 1 / scale
    assert all(factors[f"{one}.weight"] == 1 / scale for one in second.writers)
    assert factors[f"{third.opener}.weight"] == scale
    assert f"{third.opener}.bias" not in factors
    assert not any(f"{one}.weight" in factors for one in (first.opener, *first.writers))
    assert all(math.log2(one).is_integer() for one in factors.values())


def test_a_scaled_weight_keeps_its_digits():
    weight = np.float32([[1.25, -3.5e-3]])
    assert np.array_equal(Scaled(2.0**-5).apply(weight, (0, 1)) * 32, weight)
