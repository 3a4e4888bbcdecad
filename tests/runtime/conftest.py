"""Oracles for the runtime: random tiny models of diffusers and transformers, weights renamed.

The renaming is written here, independently of diffquant.convert, so that the two judge each other.
"""

import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffquant.runtime.layers import PackedWeight, Segment

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


def randomize(module, seed):
    """Fill every tensor from a seeded generator, with scales that keep activations of order one."""
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            value = generator.standard_normal(tuple(tensor.shape), dtype=np.float32)
            if name.endswith("bias") and tensor.ndim == 1:
                value *= 0.02
            elif tensor.ndim <= 1:
                value = 1 + 0.1 * value
            elif "embed" in name or "shared" in name or "relative_attention_bias" in name:
                value *= 0.5
            else:
                value /= np.sqrt(np.prod(tensor.shape[1:]))
            tensor.copy_(torch.from_numpy(value))
    return module.eval()


_RES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _unet_key(key, layers, attentive_up):
    stem, _, leaf = key.rpartition(".")
    if stem in _UNET_TOP:
        return f"{_UNET_TOP[stem]}.{leaf}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", key)
    if match:
        side, level, kind, index, rest = match.groups()
        level, index = int(level), int(index)
        if side == "down":
            block, where = 1 + level * (layers + 1) + index, "input_blocks"
        else:
            block, where = level * (layers + 1) + index, "output_blocks"
        if kind == "resnets":
            head, _, tail = rest.partition(".")
            return f"{where}.{block}.0.{_RES[head]}.{tail}"
        if kind == "attentions":
            return f"{where}.{block}.1.{rest}"
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{leaf}"
        slot = 2 if attentive_up[level] else 1
        return f"output_blocks.{level * (layers + 1) + layers}.{slot}.conv.{leaf}"
    match = re.fullmatch(r"mid_block\.(\w+)\.(\d+)\.(.+)", key)
    kind, index, rest = match.groups()
    if kind == "attentions":
        return f"middle_block.1.{rest}"
    head, _, tail = rest.partition(".")
    return f"middle_block.{2 * int(index)}.{_RES[head]}.{tail}"


def unet_state(unet):
    """LDM state of a UNet2DConditionModel."""
    attentive = ["CrossAttn" in name for name in unet.config.up_block_types]
    layers = unet.config.layers_per_block
    return {_unet_key(k, layers, attentive): v for k, v in unet.state_dict().items()}


def vae_state(vae, *, convolutions=True):
    """LDM state of an AutoencoderKL; the middle attention as 1x1 convolutions, or as matrices."""
    top = len(vae.config.up_block_types) - 1
    rules = [
        (r"(encoder|decoder)\.conv_norm_out", r"\1.norm_out"),
        (r"encoder\.down_blocks\.(\d+)\.resnets", r"encoder.down.\1.block"),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        ("conv_shortcut", "nin_shortcut"),
    ]
    state = {}
    for key, value in vae.state_dict().items():
        for pattern, text in rules:
            key = re.sub(pattern, text, key)
        key = re.sub(
            r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers\.0)",
            lambda m: (
                f"decoder.up.{top - int(m[1])}.{'block' if m[2] == 'resnets' else 'upsample'}"
            ),
            key,
        )
        if convolutions and re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key):
            value = value[:, :, None, None]
        state[key] = value
    return state


_FLUX_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
}
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_FLUX_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}


def flux_weights(transformer):
    """BFL weights of a FluxTransformer2DModel; q, k, v (and mlp) stay separate segments."""
    state = dict(transformer.state_dict())
    weights = {}

    def take(target, *sources):
        for leaf in ("weight", "bias"):
            parts = [state.pop(f"{source}.{leaf}") for source in sources]
            weights[f"{target}.{leaf}"] = PackedWeight(
                tuple(Segment("f32", tuple(p.shape), {"weight": p}) for p in parts)
            )

    for source, target in _FLUX_TOP.items():
        if f"{source}.weight" in state:
            take(target, source)
    for i in range(transformer.config.num_layers):
        old, new = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for source, target in _FLUX_DOUBLE.items():
            take(f"{new}.{target}", f"{old}.{source}")
        take(f"{new}.img_attn.qkv", *(f"{old}.attn.to_{x}" for x in "qkv"))
        take(f"{new}.txt_attn.qkv", *(f"{old}.attn.add_{x}_proj" for x in "qkv"))
        for source, target in _FLUX_NORMS.items():
            norm = state.pop(f"{old}.{source}.weight")
            weights[f"{new}.{target}.scale"] = PackedWeight.of(norm)
    for i in range(transformer.config.num_single_layers):
        old, new = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        take(f"{new}.modulation.lin", f"{old}.norm.linear")
        take(f"{new}.linear1", *(f"{old}.attn.to_{x}" for x in "qkv"), f"{old}.proj_mlp")
        take(f"{new}.linear2", f"{old}.proj_out")
        for x, name in (("q", "query"), ("k", "key")):
            norm = state.pop(f"{old}.attn.norm_{x}.weight")
            weights[f"{new}.norm.{name}_norm.scale"] = PackedWeight.of(norm)
    for leaf in ("weight", "bias"):  # diffusers: scale, shift; BFL: shift, scale
        scale, shift = state.pop(f"norm_out.linear.{leaf}").chunk(2)
        both = torch.cat((shift, scale))
        weights[f"final_layer.adaLN_modulation.1.{leaf}"] = PackedWeight.of(both)
    assert not state, sorted(state)
    return weights


def clip_state(encoder):
    """Published names of a CLIP text encoder; transformers 5 drops `text_model.`."""
    return {
        k if k.startswith(("text_model.", "text_projection.")) else f"text_model.{k}": v
        for k, v in encoder.state_dict().items()
        if not k.endswith("position_ids")
    }


def t5_state(encoder):
    """Published names of a T5 encoder."""
    return {k: v for k, v in encoder.state_dict().items() if k != "encoder.embed_tokens.weight"}


def packed(state):
    """Wrap a float state."""
    return {key: PackedWeight.of(value) for key, value in state.items()}


def assert_close(found, wanted, tolerance=1e-5):
    """Compare in absolute terms, relative to the largest value where that exceeds one."""
    assert found.shape == wanted.shape
    limit = tolerance * max(1.0, float(wanted.abs().max()))
    error = float((found - wanted).abs().max())
    assert error <= limit, f"largest error {error:.3g}, allowed {limit:.3g}"


@pytest.fixture(scope="session")
def oracle():
    """diffusers, transformers, and the functions of this file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers")
        transformers = pytest.importorskip("transformers")
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    return SimpleNamespace(
        diffusers=diffusers,
        transformers=transformers,
        randomize=randomize,
        unet_weights=lambda unet: packed(unet_state(unet)),
        vae_state=vae_state,
        vae_weights=lambda vae, **kw: packed(vae_state(vae, **kw)),
        flux_weights=flux_weights,
        clip_weights=lambda encoder: packed(clip_state(encoder)),
        t5_weights=lambda encoder: packed(t5_state(encoder)),
        assert_close=assert_close,
    )
