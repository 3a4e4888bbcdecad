"""Whole pipelines of diffusers' and transformers' own classes, a few thousand weights each.

A row names the classes and the numbers that make them small; `build` saves what `save_pretrained`
saves, with random weights of which no two tensors are alike. Text encoders keep the names that the
installed transformers gives them, which is not always how they were published.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
_TOKENIZERS = {  # class -> a small one of the demo checkpoints
    "CLIPTokenizer": "sd15-shapes/tokenizer",
    "T5TokenizerFast": "flux1-shapes/tokenizer_2",
    "Qwen2Tokenizer": "qwen-image-shapes/tokenizer",
}
_VOCAB, _WIDTH = 64, 16

KL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
KL4 = {**KL, "latent_channels": 4}
KL16 = {
    **KL,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
_CAUSAL = {"base_dim": 4, "z_dim": 16, "num_res_blocks": 1}
CLIP = {
    "vocab_size": _VOCAB,
    "hidden_size": _WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": _WIDTH,
    "bos_token_id": 62,
    "eos_token_id": 63,
    "pad_token_id": 1,
}
OPEN_CLIP = {**CLIP, "hidden_act": "gelu", "num_hidden_layers": 3}
T5 = {
    "vocab_size": _VOCAB,
    "d_model": _WIDTH,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
_DECODER = {
    "vocab_size": _VOCAB,
    "hidden_size": _WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN3 = {**_DECODER, "tie_word_embeddings": True}
_UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": _WIDTH,
    "use_linear_projection": True,
}
_SDXL = {
    **_UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
}
_ENDS_BARE = {
    "down": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
_FLOW = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})


@dataclass(frozen=True)
class Tiny:
    """A pipeline.

    Attributes:
        pipeline: its class.
        parts: folder -> (class, arguments of its config).
        tokenizers: folder -> class.
        scheduler: class and arguments.
        denoise: arguments of one call of the denoiser, made of a function of shapes.
        latent: shape of what the VAE decodes.
        more: further arguments of the pipeline.
        architecture: slug.
    """

    architecture: str
    pipeline: str
    parts: Mapping[str, tuple[str, Mapping[str, Any]]]
    tokenizers: Mapping[str, str]
    denoise: Callable[[Callable[..., Any]], Mapping[str, Any]]
    latent: tuple[int, ...] = (1, 16, 4, 4)
    scheduler: tuple[str, Mapping[str, Any]] = _FLOW
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def denoiser(self) -> str:
        return next(iter(self.parts))


def _step(*shape: int) -> Callable[..., Mapping[str, Any]]:
    """A latent, a timestep and five tokens of text."""
    return lambda make: {
        "hidden_states": make(*shape),
        "timestep": make.number(0.5),
        "encoder_hidden_states": make(1, 5, _WIDTH),
    }


def _flux_ids(make: Any, axes: int) -> dict[str, Any]:
    return {"img_ids": make.grid(4, axes), "txt_ids": make.grid(5, axes)}


def _sdxl_step(ids: int) -> Callable[..., Mapping[str, Any]]:
    return lambda make: {
        "sample": make(1, 4, 8, 8),
        "timestep": 7,
        "encoder_hidden_states": make(1, 5, 2 * _WIDTH if ids == 6 else _WIDTH),
        "added_cond_kwargs": {"text_embeds": make(1, _WIDTH), "time_ids": make(1, ids)},
    }


PIPELINES: dict[str, Tiny] = {
    "sd2": Tiny(
        "sd2",
        "StableDiffusionPipeline",
        {
            "unet": (
                "UNet2DConditionModel",
                {
                    **_UNET,
                    "layers_per_block": 2,
                    "block_out_channels": (8, 16),
                    "attention_head_dim": (1, 2),
                    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                },
            ),
            "vae": ("AutoencoderKL", {**KL4, "scaling_factor": 0.18215}),
            "text_encoder": ("CLIPTextModel", OPEN_CLIP),
        },
        {"tokenizer": "CLIPTokenizer"},
        lambda make: {
            "sample": make(1, 4, 8, 8),
            "timestep": 7,
            "encoder_hidden_states": make(1, 5, _WIDTH),
        },
        latent=(1, 4, 4, 4),
        scheduler=("DDIMScheduler", {"prediction_type": "v_prediction", "clip_sample": False}),
        more={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    "sdxl_refiner": Tiny(
        "sdxl_refiner",
        "StableDiffusionXLImg2ImgPipeline",
        {
            "unet": (
                "UNet2DConditionModel",
                {
                    **_SDXL,
                    "block_out_channels": (8, 16, 16, 24),
                    "attention_head_dim": (1, 2, 2, 3),
                    "transformer_layers_per_block": 2,
                    "projection_class_embeddings_input_dim": 5 * 4 + _WIDTH,
                    "down_block_types": _ENDS_BARE["down"],
                    "up_block_types": _ENDS_BARE["up"],
                },
            ),
            "vae": ("AutoencoderKL", {**KL4, "scaling_factor": 0.13025}),
            "text_encoder_2": ("CLIPTextModelWithProjection", OPEN_CLIP),
        },
        {"tokenizer_2": "CLIPTokenizer"},
        _sdxl_step(5),
        latent=(1, 4, 4, 4),
        scheduler=("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear"}),
        more={
            "text_encoder": None,
            "tokenizer": None,
            "requires_aesthetics_score": True,
            "force_zeros_for_empty_prompt": False,
            "add_watermarker": False,
        },
    ),
    "sd3": Tiny(
        "sd3",
        "StableDiffusion3Pipeline",
        {
            "transformer": (
                "SD3Transformer2DModel",
                {
                    "sample_size": 8,
                    "num_layers": 3,
                    "attention_head_dim": 8,
                    "num_attention_heads": 2,
                    "joint_attention_dim": _WIDTH,
                    "caption_projection_dim": 16,
                    "pooled_projection_dim": 2 * _WIDTH,
                    "pos_embed_max_size": 8,
                    "dual_attention_layers": (0, 1),
                    "qk_norm": "rms_norm",
                },
            ),
            "vae": ("AutoencoderKL", {**KL16, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
            "text_encoder": ("CLIPTextModelWithProjection", CLIP),
            "text_encoder_2": ("CLIPTextModelWithProjection", OPEN_CLIP),
            "text_encoder_3": ("T5EncoderModel", T5),
        },
        {
            "tokenizer": "CLIPTokenizer",
            "tokenizer_2": "CLIPTokenizer",
            "tokenizer_3": "T5TokenizerFast",
        },
        lambda make: {
            **_step(1, 16, 8, 8)(make),
            "pooled_projections": make(1, 2 * _WIDTH),
        },
    ),
    "flux2_klein": Tiny(
        "flux2",
        "Flux2KleinPipeline",
        {
            "transformer": (
                "Flux2Transformer2DModel",
                {
                    "num_layers": 2,
                    "num_single_layers": 2,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "joint_attention_dim": _WIDTH,
                    "timestep_guidance_channels": 8,
                    "axes_dims_rope": (4, 4, 4, 4),
                    "guidance_embeds": False,
                },
            ),
            "vae": ("AutoencoderKLFlux2", {**KL, "latent_channels": 32}),
            "text_encoder": ("Qwen3ForCausalLM", QWEN3),
        },
        {"tokenizer": "Qwen2Tokenizer"},
        lambda make: {**_step(1, 4, 128)(make), **_flux_ids(make, 4)},
        latent=(1, 32, 4, 4),
        more={"is_distilled": True},
    ),
    "flux2_dev": Tiny(
        "flux2",
        "Flux2Pipeline",
        {
            "transformer": (
                "Flux2Transformer2DModel",
                {
                    "num_layers": 2,
                    "num_single_layers": 2,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "joint_attention_dim": _WIDTH,
                    "timestep_guidance_channels": 8,
                    "axes_dims_rope": (4, 4, 4, 4),
                },
            ),
            "vae": ("AutoencoderKLFlux2", {**KL, "latent_channels": 32}),
            "text_encoder": (
                "Mistral3ForConditionalGeneration",
                {
                    # Its vocabulary is what tells it from other Llamas.
                    "text_config": {**_DECODER, "model_type": "mistral", "vocab_size": 131072}
                    | {"hidden_size": 8},
                    "vision_config": {
                        "model_type": "pixtral",
                        "hidden_size": 8,
                        "intermediate_size": 8,
                        "num_hidden_layers": 1,
                        "num_attention_heads": 2,
                        "head_dim": 4,
                        "patch_size": 4,
                        "image_size": 8,
                    },
                },
            ),
        },
        {"tokenizer": "Qwen2Tokenizer"},
        lambda make: {
            **_step(1, 4, 128)(make),
            **_flux_ids(make, 4),
            "guidance": make.number(4.0),
        },
        latent=(1, 32, 4, 4),
    ),
    "chroma": Tiny(
        "chroma",
        "ChromaPipeline",
        {
            "transformer": (
                "ChromaTransformer2DModel",
                {
                    "num_layers": 2,
                    "num_single_layers": 2,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "joint_attention_dim": _WIDTH,
                    "axes_dims_rope": (4, 6, 6),
                    "approximator_num_channels": 8,
                    "approximator_hidden_dim": 24,
                    "approximator_layers": 2,
                },
            ),
            "vae": ("AutoencoderKL", KL16),
            "text_encoder": ("T5EncoderModel", T5),
        },
        {"tokenizer": "T5TokenizerFast"},
        lambda make: {**_step(1, 4, 64)(make), **_flux_ids(make, 3)},
    ),
    "qwen_image": Tiny(
        "qwen_image",
        "QwenImagePipeline",
        {
            "transformer": (
                "QwenImageTransformer2DModel",
                {
                    "num_layers": 2,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "joint_attention_dim": _WIDTH,
                    "axes_dims_rope": (4, 6, 6),
                },
            ),
            "vae": ("AutoencoderKLQwenImage", _CAUSAL),
            "text_encoder": (
                "Qwen2_5_VLForConditionalGeneration",
                {
                    "text_config": {
                        **{k: v for k, v in _DECODER.items() if k != "head_dim"},
                        "rope_scaling": {
                            "type": "default",
                            "rope_type": "default",
                            "mrope_section": [1, 1, 2],
                        },
                    },
                    "vision_config": {
                        "depth": 1,
                        "hidden_size": 16,
                        "intermediate_size": 24,
                        "num_heads": 2,
                        "out_hidden_size": _WIDTH,
                    },
                },
            ),
        },
        {"tokenizer": "Qwen2Tokenizer"},
        lambda make: {
            **_step(1, 4, 64)(make),
            "encoder_hidden_states_mask": make.ones(1, 5),
            "img_shapes": [[(1, 2, 2)]],
        },
        latent=(1, 16, 1, 4, 4),
    ),
    "z_image": Tiny(
        "z_image",
        "ZImagePipeline",
        {
            "transformer": (
                "ZImageTransformer2DModel",
                {
                    "dim": 16,
                    "n_layers": 2,
                    "n_refiner_layers": 1,
                    "n_heads": 2,
                    "n_kv_heads": 2,
                    "cap_feat_dim": _WIDTH,
                    "axes_dims": [4, 2, 2],
                    "axes_lens": [64, 8, 8],
                },
            ),
            "vae": ("AutoencoderKL", KL16),
            "text_encoder": ("Qwen3Model", QWEN3),
        },
        {"tokenizer": "Qwen2Tokenizer"},
        lambda make: {"x": [make(16, 1, 4, 4)], "t": make.number(0.5), "cap_feats": [make(5, 16)]},
    ),
    "lumina2": Tiny(
        "lumina2",
        "Lumina2Pipeline",
        {
            "transformer": (
                "Lumina2Transformer2DModel",
                {
                    "sample_size": 8,
                    "hidden_size": 24,
                    "num_layers": 2,
                    "num_refiner_layers": 1,
                    "num_attention_heads": 3,
                    "num_kv_heads": 1,
                    "multiple_of": 8,
                    "axes_dim_rope": (4, 2, 2),
                    "axes_lens": (64, 16, 16),
                    "cap_feat_dim": _WIDTH,
                },
            ),
            "vae": ("AutoencoderKL", KL16),
            "text_encoder": ("Gemma2Model", _DECODER),
        },
        {"tokenizer": "Qwen2Tokenizer"},  # Gemma's own is not at hand; its files are bytes to us
        lambda make: {**_step(1, 16, 4, 4)(make), "encoder_attention_mask": make.ones(1, 5)},
    ),
    "wan": Tiny(
        "wan",
        "WanPipeline",
        {
            "transformer": (
                "WanTransformer3DModel",
                {
                    "num_attention_heads": 2,
                    "attention_head_dim": 12,
                    "text_dim": _WIDTH,
                    "freq_dim": 8,
                    "ffn_dim": 16,
                    "num_layers": 2,
                },
            ),
            "vae": ("AutoencoderKLWan", _CAUSAL),
            "text_encoder": ("UMT5EncoderModel", T5),
        },
        {"tokenizer": "T5TokenizerFast"},
        _step(1, 16, 1, 4, 4),
        latent=(1, 16, 1, 4, 4),
        scheduler=("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}),
    ),
}


class Make:
    """Inputs of a model, the same for every call with the same shapes."""

    def __call__(self, *shape: int) -> Any:
        import torch

        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    def number(self, value: float) -> Any:
        import torch

        return torch.tensor([value])

    def ones(self, *shape: int) -> Any:
        import torch

        return torch.ones(shape, dtype=torch.bool)

    def grid(self, count: int, axes: int) -> Any:
        import torch

        return torch.arange(count).float()[:, None].expand(count, axes).contiguous()


def _fill(model: Any, generator: Any) -> Any:
    """Random weights that keep a signal's size; norms near 1, biases near 0, nothing equal."""
    import torch

    with torch.no_grad():
        for key, tensor in {
            **dict(model.named_parameters()),
            **dict(model.named_buffers()),
        }.items():
            if key not in model.state_dict() or not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(values / (tensor.numel() / tensor.shape[0]) ** 0.5)
            else:
                tensor.copy_(0.1 * values + (0.0 if key.endswith("bias") else 1.0))
    return model.eval()


def _model(name: str, config: Mapping[str, Any], generator: Any) -> Any:
    import diffusers
    import transformers

    if hasattr(diffusers, name):
        return _fill(getattr(diffusers, name)(**config), generator)
    kind = getattr(transformers, name)
    return _fill(kind(kind.config_class(**config)), generator)


def build(name: str, folder: Path) -> Path:
    """Save the pipeline of PIPELINES in bfloat16."""
    import diffusers
    import torch
    import transformers

    row, generator = PIPELINES[name], torch.Generator().manual_seed(0)
    made = {
        part: _model(kind, config, generator).to(torch.bfloat16)
        for part, (kind, config) in row.parts.items()
    }
    for part, kind in row.tokenizers.items():
        source = EXAMPLES / _TOKENIZERS[kind]
        made[part] = getattr(transformers, kind).from_pretrained(source)
    kind, config = row.scheduler
    made["scheduler"] = getattr(diffusers, kind)(**config)
    getattr(diffusers, row.pipeline)(**made, **row.more).save_pretrained(folder)
    return folder


def loaded(name: str, folder: Path) -> Any:
    """The pipeline that diffusers loads from a folder, in float32."""
    import diffusers
    import torch

    row = PIPELINES[name]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == row.pipeline
    return diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)


def outputs(name: str, pipe: Any) -> dict[str, Any]:
    """One call of the denoiser, of every text encoder and of the decoder."""
    import torch

    row, make, found = PIPELINES[name], Make(), {}
    with torch.no_grad():
        for part in row.parts:
            model = getattr(pipe, part)
            if part == row.denoiser:
                out = model(**row.denoise(make), return_dict=False)[0]
                found[part] = out[0] if isinstance(out, list) else out
            elif part == "vae":
                found[part] = model.decode(make(*row.latent), return_dict=False)[0]
            else:
                ids = torch.tensor([[5, 9, 2, 33, 63]])
                out = model(input_ids=ids, output_hidden_states=True)
                found |= {f"{part} {n}": x for n, x in enumerate(out.hidden_states)}
                for field_name in ("text_embeds", "logits"):
                    if getattr(out, field_name, None) is not None:
                        found[f"{part} {field_name}"] = getattr(out, field_name)
    return found
