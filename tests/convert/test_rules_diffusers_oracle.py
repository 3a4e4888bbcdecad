"""diffusers' own single-file converters judge our rules, on values where they take small models."""

import functools
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.rules import apply_rules

pytestmark = pytest.mark.oracle

DATA = Path(__file__).parents[1] / "data" / "manifests.json.xz"

TINY_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
}
UNETS = {
    "sd15": TINY_UNET
    | {
        "block_out_channels": (8, 16, 16, 24),
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "sdxl": TINY_UNET
    | {
        "block_out_channels": (8, 16, 24),
        "attention_head_dim": (1, 2, 3),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    },
    "one_layer": TINY_UNET
    | {
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    },
}


@functools.cache
def single_file_utils():
    return pytest.importorskip("diffusers.loaders.single_file_utils")


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """Peers warn on import and on use; that is not what is judged here."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        single_file_utils()
        yield


def component_of(kind):
    rows = ARCHITECTURES.values()
    return next(one for row in rows for one in row.components if one.kind == kind)


def convert(component, tensors):
    """Run our rules from Diffusers to canonical names on torch tensors."""
    import torch

    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    out = {}
    for one in apply_rules(component.rules(shapes, "diffusers", "canonical"), shapes):
        whole = torch.cat([tensors[p.key][p.start : p.stop] for p in one.pieces])
        out[one.target] = (whole.T if one.transpose else whole).reshape(one.shape)
    return out


def same(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for key, tensor in theirs.items():
        assert tuple(ours[key].shape) == tuple(tensor.shape), key
        np.testing.assert_array_equal(ours[key].numpy(), tensor.numpy(), err_msg=key)


@pytest.mark.parametrize("name", UNETS)
def test_unet_converter_undoes_our_rules(name):
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = UNETS[name]
    source = UNet2DConditionModel(**config).state_dict()
    canonical = convert(component_of("unet_ldm"), source)
    prefixed = {f"model.diffusion_model.{key}": value for key, value in canonical.items()}
    same(single_file_utils().convert_ldm_unet_checkpoint(prefixed, dict(config)), source)


@pytest.mark.parametrize("quant_conv", [True, False])
def test_vae_converter_undoes_our_rules(quant_conv):
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    config = {
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "use_quant_conv": quant_conv,
        "use_post_quant_conv": quant_conv,
    }
    source = AutoencoderKL(**config).state_dict()
    canonical = convert(component_of("vae_kl"), source)
    assert canonical["encoder.mid.attn_1.q.weight"].ndim == 4
    same(single_file_utils().convert_ldm_vae_checkpoint(canonical, config), source)


def test_flux_converter_undoes_our_rules():
    """It writes the width 3072 down, so only the block counts are small; values are row numbers."""
    import torch

    shapes = {
        key: tuple(shape)
        for key, shape in json.loads(lzma.decompress(DATA.read_bytes()))[
            "flux-dev.transformer.diffusers"
        ].items()
        if "blocks." not in key or "blocks.0." in key or "blocks.1." in key
    }
    source = {}
    for number, (key, shape) in enumerate(shapes.items()):
        rows = torch.arange(shape[0], dtype=torch.float32) + number / 1024
        source[key] = rows if len(shape) == 1 else rows[:, None].expand(shape[0], 2)
    columns = {key: (shape[0], 2) if len(shape) == 2 else shape for key, shape in shapes.items()}
    assert {key: tuple(value.shape) for key, value in source.items()} == columns
    canonical = convert(component_of("flux"), source)
    converter = single_file_utils().convert_flux_transformer_checkpoint_to_diffusers
    same(converter(dict(canonical)), source)


def test_openclip_converter_undoes_our_rules():
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
    )
    model = CLIPTextModelWithProjection(config)
    source = {
        key if key.startswith("text_") else f"text_model.{key}": value
        for key, value in model.state_dict().items()
        if not key.endswith("position_ids")
    }
    canonical = convert(component_of("openclip_text"), source)
    prefix = "conditioner.embedders.1.model."
    prefixed = {prefix + key: value for key, value in canonical.items()}
    same(single_file_utils().convert_open_clip_checkpoint(model, prefixed, prefix=prefix), source)


def test_wan_vae_converter_agrees_with_our_names():
    manifests = json.loads(lzma.decompress(DATA.read_bytes()))
    shapes = {key: tuple(shape) for key, shape in manifests["qwen-image.vae.comfy"].items()}
    component = component_of("vae_qwen")
    rules = component.rules(shapes, "alternate", "canonical")
    ours = {one.target: one.pieces[0].key for one in apply_rules(rules, shapes)}
    assert single_file_utils().convert_wan_vae_to_diffusers({key: key for key in shapes}) == ours


# Small models of diffusers' own classes, and the converter that leads to their names. Where a
# converter writes a width down, the model has it, and as few blocks as there can be.
TRANSFORMERS = {
    "sd3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 10,
            "pos_embed_max_size": 4,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
        "convert_sd3_transformer_checkpoint_to_diffusers",
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {
            "in_channels": 8,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "timestep_guidance_channels": 8,
        },
        "convert_flux2_transformer_checkpoint_to_diffusers",
    ),
    "z_image": (
        "ZImageTransformer2DModel",
        {"dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        | {"cap_feat_dim": 12, "axes_dims": [4, 2, 2], "axes_lens": [8, 8, 8]},
        "convert_z_image_transformer_checkpoint_to_diffusers",
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        {
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 16,
        },
        "convert_auraflow_transformer_checkpoint_to_diffusers",
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 36,
            "text_dim": 12,
            "freq_dim": 8,
            "ffn_dim": 16,
            "num_layers": 2,
            "image_dim": 10,
            "added_kv_proj_dim": 24,
        },
        "convert_wan_transformer_to_diffusers",
    ),
    "wan_vace": (
        "WanVACETransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "text_dim": 12,
            "freq_dim": 8,
            "ffn_dim": 16,
            "num_layers": 2,
            "vace_layers": [0, 1],
        },
        "convert_wan_transformer_to_diffusers",
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 12,
        },
        "convert_ltx_transformer_checkpoint_to_diffusers",
    ),
    "ltx_2": (
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 8,
            "audio_out_channels": 8,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 2,
            "caption_channels": 12,
        },
        "convert_ltx2_transformer_to_diffusers",
    ),
}
WIDE = {  # in row numbers, as the Flux test has them
    "chroma": (
        "ChromaTransformer2DModel",
        {"num_layers": 1, "num_single_layers": 1, "approximator_layers": 1},
        "convert_chroma_transformer_checkpoint_to_diffusers",
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {"num_layers": 2, "num_refiner_layers": 1},
        "convert_lumina2_to_diffusers",
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
        "convert_hunyuan_video_transformer_to_diffusers",
    ),
}


def numbered(shapes):
    """Row numbers in place of weights, two columns wide."""
    import torch

    made = {}
    for number, (key, shape) in enumerate(shapes.items()):
        if not shape:
            made[key] = torch.tensor(float(number))
            continue
        rows = torch.arange(shape[0], dtype=torch.float32) + number / 1024
        made[key] = rows if len(shape) == 1 else rows[:, None].expand(shape[0], 2).clone()
    return made


def to_canonical_names(component, shapes, tensors):
    """Our rules on shapes, applied to tensors that may be narrower."""
    import torch

    out = {}
    for one in apply_rules(component.rules(shapes, "diffusers", "canonical"), shapes):
        whole = torch.cat([tensors[p.key][p.start : p.stop] for p in one.pieces])
        out[one.target] = whole
    return out


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_converters_undo_our_rules(name):
    import diffusers
    import torch

    torch.manual_seed(0)
    class_name, config, converter = TRANSFORMERS[name]
    source = getattr(diffusers, class_name)(**config).state_dict()
    source = {key: torch.randn(value.shape) for key, value in source.items()}
    kind = name.removesuffix("_vace").removesuffix("_2")
    canonical = convert(component_of(kind), source)
    assert set(canonical) != set(source)
    same(getattr(single_file_utils(), converter)(dict(canonical)), source)


@pytest.mark.parametrize("name", WIDE)
def test_converters_that_write_widths_down_undo_our_rules(name):
    import diffusers
    import torch

    class_name, config, converter = WIDE[name]
    made = getattr(diffusers, class_name)  # imported first: tables of its modules would be meta
    with torch.device("meta"):
        model = made(**config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    source = numbered(shapes)
    canonical = to_canonical_names(component_of(name), shapes, source)
    found = getattr(single_file_utils(), converter)(dict(canonical))
    same(found, source)
