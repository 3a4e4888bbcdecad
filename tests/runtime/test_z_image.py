"""Z-Image's transformer against diffusers' ZImageTransformer2DModel."""

import re

import pytest
import torch

from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.runtime.calibrate import layers_of
from diffquant.runtime.gradients import GradientPower, recomputed
from diffquant.runtime.layers import PackedWeight, Segment
from diffquant.runtime.loading import build
from diffquant.runtime.models import z_image

CASES = {
    "as published, small": {},
    "three heads": {"n_heads": 3, "dim": 72, "axes_dims": (8, 8, 8), "axes_lens": (256, 64, 64)},
    "deep": {"n_layers": 3, "n_refiner_layers": 1, "norm_eps": 1e-3, "rope_theta": 100.0},
    "wider commands": {"dim": 320, "n_heads": 2, "axes_dims": (64, 48, 48), "cap_feat_dim": 48},
    "four channels": {"in_channels": 4, "t_scale": 500.0},
}


def tiny(oracle, seed=3, **changes):
    config = {
        "in_channels": 16,
        "dim": 64,
        "n_layers": 2,
        "n_refiner_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 24,
        "axes_dims": (8, 12, 12),
        "axes_lens": (256, 64, 64),
        **changes,
    }
    config["n_kv_heads"] = config["n_heads"]
    model = oracle.diffusers.ZImageTransformer2DModel(**config)
    return oracle.randomize(model, seed=seed)


def weights(transformer):
    """Single-file weights; q, k and v stay segments of their own."""
    state, found = dict(transformer.state_dict()), {}
    for key in list(state):
        match = re.fullmatch(r"(.+\.attention\.)to_q\.weight", key)
        if match:
            parts = [state.pop(f"{match[1]}to_{x}.weight") for x in "qkv"]
            found[f"{match[1]}qkv.weight"] = PackedWeight(
                tuple(Segment("f32", tuple(p.shape), {"weight": p}) for p in parts)
            )
    for key, value in state.items():
        ours = re.sub(r"^all_(x_embedder|final_layer)\.2-1\.", r"\1.", key)
        ours = re.sub(r"attention\.norm_([qk])\.", r"attention.\1_norm.", ours)
        ours = ours.replace("attention.to_out.0.", "attention.out.")
        found[ours] = PackedWeight.of(value)
    return found


def run_both(reference, ours, size, lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batch, (height, width) = len(lengths), size
    config = ours.config
    latents = torch.randn(batch, config.in_channels, height, width, generator=generator)
    states = torch.randn(batch, max(lengths), config.caption, generator=generator)
    t = torch.rand(batch, generator=generator)
    texts = [one[:length] for one, length in zip(states, lengths, strict=True)]
    with torch.no_grad():
        wanted = reference(list(latents[:, :, None]), t, texts).sample
        found = ours(latents, t, states, lengths)
    return found, torch.stack(wanted)[:, :, 0]


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_prediction_equals_diffusers(name, oracle):
    reference = tiny(oracle, **CASES[name])
    ours = build("z_image", weights(reference), reference.config)
    oracle.assert_close(*run_both(reference, ours, (6, 10), (5, 5)))


@pytest.mark.oracle
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("size", "lengths"),
    [
        ((2, 2), (1,)),
        ((8, 16), (32,)),  # picture and text fill their multiples of 32 exactly
        ((14, 6), (33, 7)),  # one text is longer when filled up: the other is masked
        ((6, 22), (70, 3, 33)),
        ((4, 4), (20, 31)),  # not of one length, but of one when filled up
    ],
)
def test_any_size_and_any_lengths(size, lengths, seed, oracle):
    reference = tiny(oracle, seed=seed + 10)
    ours = build("z_image", weights(reference), reference.config)
    oracle.assert_close(*run_both(reference, ours, size, lengths, seed))


def int8(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    parts = {"weight": (weight / scale).round().to(torch.int8), "scale": scale}
    return PackedWeight((Segment("int8_rowwise", tuple(weight.shape), parts),))


@pytest.mark.oracle
def test_packed_weights_run(oracle):
    reference = tiny(oracle)
    plain = weights(reference)
    packed = {
        key: int8(one.dequantize(torch.float32))
        if key.endswith("weight") and len(one.shape) == 2
        else one
        for key, one in plain.items()
    }
    ours = build("z_image", packed, reference.config)
    assert ours.layers[0].attention.qkv.bound().formats == ("int8_rowwise",)
    found, wanted = run_both(reference, ours, (6, 10), (5, 40))
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.oracle
@pytest.mark.parametrize("lengths", [[6], [0], [5, 5]])
def test_lengths_must_fit_the_states(lengths, oracle):
    reference = tiny(oracle)
    ours = build("z_image", weights(reference), reference.config)
    with pytest.raises(UsageError, match="from 1 to 5"):
        ours(torch.zeros(1, 16, 2, 2), torch.zeros(1), torch.zeros(1, 5, 24), lengths)


def test_rotary_axes_must_fill_the_head():
    shapes = {"x_embedder.weight": (64, 16), "layers.0.attention.q_norm.weight": (64,)}
    with pytest.raises(ArchitectureError, match="do not add up to the head width 64"):
        z_image.config_from(shapes, {})


def test_other_patches_are_refused():
    with pytest.raises(ArchitectureError, match="all_patch_size"):
        z_image.config_from({}, {"all_patch_size": (4,)})


@pytest.mark.oracle
def test_gradients_reach_every_packed_layer(oracle):
    reference = tiny(oracle)
    ours = build("z_image", weights(reference), reference.config)
    power = GradientPower(dict(layers_of(ours)))
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, ours.config.in_channels, 4, 6, generator=generator)
    states, t = torch.randn(2, 5, ours.config.caption, generator=generator), torch.rand(2)
    with torch.no_grad():
        plain = ours(latents, t, states, (5, 5))
    with power.hooked(), recomputed(ours), torch.enable_grad():
        found = ours(latents, t, states, (5, 5))
        (found * torch.randn(found.shape, generator=generator)).sum().backward()
    power.finish_picture()
    assert torch.equal(found.detach(), plain)
    assert all(power.power(key).total > 0 for key in power.layers)
