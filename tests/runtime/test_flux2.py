"""The Flux.2 transformer against diffusers' Flux2Transformer2DModel."""

import pytest
import torch

from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.runtime.calibrate import layers_of
from diffquant.runtime.gradients import GradientPower, recomputed
from diffquant.runtime.layers import PackedWeight, Segment
from diffquant.runtime.loading import build
from diffquant.runtime.models import flux2

CASES = {
    "dev": {"guidance_embeds": True},
    "klein": {"guidance_embeds": False, "num_layers": 1, "num_single_layers": 3},
    "three heads": {"num_attention_heads": 3, "axes_dims_rope": (4, 4, 8, 16)},
    "other numbers": {
        "mlp_ratio": 2.0,
        "eps": 1e-3,
        "rope_theta": 100,
        "in_channels": 12,
        "timestep_guidance_channels": 64,
    },
}


def tiny(oracle, seed=3, **changes):
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (8, 8, 8, 8),
        **changes,
    }
    config["attention_head_dim"] = sum(config["axes_dims_rope"])
    return oracle.randomize(oracle.diffusers.Flux2Transformer2DModel(**config), seed=seed)


_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}


def weights(transformer):
    """Single-file weights; q, k and v stay segments of their own."""
    state, found = dict(transformer.state_dict()), {}

    def take(target, *sources, leaf="weight"):
        parts = [state.pop(f"{source}.weight") for source in sources]
        found[f"{target}.{leaf}"] = PackedWeight(
            tuple(Segment("f32", tuple(p.shape), {"weight": p}) for p in parts)
        )

    for source, target in _TOP.items():
        if f"{source}.weight" in state:
            take(target, source)
    for i in range(transformer.config.num_layers):
        old, new = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for source, target in _DOUBLE.items():
            take(f"{new}.{target}", f"{old}.{source}")
        take(f"{new}.img_attn.qkv", *(f"{old}.attn.to_{x}" for x in "qkv"))
        take(f"{new}.txt_attn.qkv", *(f"{old}.attn.add_{x}_proj" for x in "qkv"))
        for source, target in _NORMS.items():
            take(f"{new}.{target}", f"{old}.{source}", leaf="scale")
    for i in range(transformer.config.num_single_layers):
        old, new = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        take(f"{new}.linear1", f"{old}.to_qkv_mlp_proj")
        take(f"{new}.linear2", f"{old}.to_out")
        take(f"{new}.norm.query_norm", f"{old}.norm_q", leaf="scale")
        take(f"{new}.norm.key_norm", f"{old}.norm_k", leaf="scale")
    scale, shift = state.pop("norm_out.linear.weight").chunk(2)  # shift, scale in single files
    found["final_layer.adaLN_modulation.1.weight"] = PackedWeight.of(torch.cat((shift, scale)))
    assert not state, sorted(state)
    return found


def run_both(reference, ours, size=(3, 5), tokens=7, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    (height, width), config = size, ours.config
    latents = torch.randn(batch, config.in_channels, height, width, generator=generator)
    txt = torch.randn(batch, tokens, config.context, generator=generator)
    t = torch.rand(batch, generator=generator)
    guidance = 5 * torch.rand(batch, generator=generator) if config.guidance else None
    one, zero = torch.arange(1), torch.zeros(1)
    with torch.no_grad():
        wanted = reference(
            hidden_states=latents.flatten(2).transpose(1, 2),
            encoder_hidden_states=txt,
            timestep=t,
            img_ids=torch.cartesian_prod(one, torch.arange(height), torch.arange(width), one),
            txt_ids=torch.cartesian_prod(zero, zero, zero, torch.arange(float(tokens))),
            guidance=guidance,
        ).sample
        found = ours(latents, t, txt, guidance)
    return found, wanted.transpose(1, 2).reshape(found.shape)


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_prediction_equals_diffusers(name, oracle):
    reference = tiny(oracle, **CASES[name])
    ours = build("flux2", weights(reference), reference.config)
    oracle.assert_close(*run_both(reference, ours))


@pytest.mark.oracle
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("size", "tokens", "batch"), [((1, 1), 1, 1), ((9, 2), 33, 3)])
def test_any_size_and_any_length(size, tokens, batch, seed, oracle):
    reference = tiny(oracle, seed=seed + 10)
    ours = build("flux2", weights(reference), reference.config)
    oracle.assert_close(*run_both(reference, ours, size, tokens, batch, seed))


def int8(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    parts = {"weight": (weight / scale).round().to(torch.int8), "scale": scale}
    return PackedWeight((Segment("int8_rowwise", tuple(weight.shape), parts),))


@pytest.mark.oracle
def test_packed_weights_run(oracle):
    reference = tiny(oracle)
    packed = {
        key: int8(one.dequantize(torch.float32)) if len(one.shape) == 2 else one
        for key, one in weights(reference).items()
    }
    ours = build("flux2", packed, reference.config)
    assert ours.single_blocks[0].linear1.bound().formats == ("int8_rowwise",)
    found, wanted = run_both(reference, ours)
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.oracle
@pytest.mark.parametrize("there", [True, False])
def test_guidance_must_fit_the_model(there, oracle):
    reference = tiny(oracle, guidance_embeds=there)
    ours = build("flux2", weights(reference), reference.config)
    inputs = torch.zeros(1, 16, 1, 1), torch.zeros(1), torch.zeros(1, 1, 24)
    with pytest.raises(UsageError, match="needs guidance" if there else "takes no guidance"):
        ours(*inputs, None if there else torch.zeros(1))


def test_rotary_axes_must_fill_the_head():
    shapes = {
        "img_in.weight": (256, 64),
        "double_blocks.0.img_attn.norm.query_norm.scale": (64,),
    }
    with pytest.raises(ArchitectureError, match="do not add up to the head width 64"):
        flux2.config_from(shapes, {})


@pytest.mark.oracle
def test_gradients_reach_every_packed_layer(oracle):
    reference = tiny(oracle, **CASES["klein"])
    ours = build("flux2", weights(reference), reference.config)
    power = GradientPower(dict(layers_of(ours)))
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, ours.config.in_channels, 4, 6, generator=generator)
    states, t = torch.randn(2, 5, ours.config.context, generator=generator), torch.rand(2)
    with torch.no_grad():
        plain = ours(latents, t, states, None)
    with power.hooked(), recomputed(ours), torch.enable_grad():
        found = ours(latents, t, states, None)
        (found * torch.randn(found.shape, generator=generator)).sum().backward()
    power.finish_picture()
    assert torch.equal(found.detach(), plain)
    assert all(power.power(key).total > 0 for key in power.layers)
