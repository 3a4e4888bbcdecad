"""CLIP text encoder: causal transformer over 77 tokens, named as transformers names it.

Serves CLIP-L (SD1.5, Flux: quick_gelu), OpenCLIP-H (SD2: gelu, 23 layers) and bigG (SDXL: gelu,
with `text_projection`). Source: openai/CLIP clip/model.py; names and the choice of the pooled
token: huggingface/transformers models/clip/modeling_clip.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from diffquant.runtime.layers import QuantEmbedding, QuantLinear
from diffquant.runtime.models.facts import (
    ACTIVATIONS,
    Activation,
    Hyper,
    Shapes,
    activation,
    count,
    number,
    param_dtype,
    shape_of,
)

__all__ = ["ClipConfig", "ClipOutput", "ClipText", "config_from"]


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """Sizes of a CLIP text encoder.

    Attributes:
        projection: rows of `text_projection`, None where the encoder has none.
        eos_token_id: whose first position is pooled; 2 means "the highest id", as old configs have
            it.
    """

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    positions: int
    projection: int | None
    act: str
    eps: float
    eos_token_id: int


def config_from(shapes: Shapes, hyper: Hyper) -> ClipConfig:
    """Read sizes from keys.

    Hyper: num_attention_heads, hidden_act, layer_norm_eps, eos_token_id.
    """
    vocabulary, width = shape_of(shapes, "text_model.embeddings.token_embedding.weight")
    positions, _ = shape_of(shapes, "text_model.embeddings.position_embedding.weight")
    projection = shapes.get("text_projection.weight")
    return ClipConfig(
        vocabulary=vocabulary,
        width=width,
        hidden=shape_of(shapes, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        layers=count(shapes, "text_model.encoder.layers"),
        heads=int(number(hyper, "num_attention_heads", width // 64)),
        positions=positions,
        projection=None if projection is None else projection[0],
        act=activation(str(hyper.get("hidden_act") or "quick_gelu")),
        eps=number(hyper, "layer_norm_eps", 1e-5),
        eos_token_id=int(number(hyper, "eos_token_id", 2)),
    )


@dataclass(frozen=True, slots=True)
class ClipOutput:
    """What pipelines take from an encoder run.

    Attributes:
        last: (B, T, width) after the final norm.
        hidden: layers + 1 states (B, T, width) before the final norm; hidden[-2] is the penultimate
            one.
        pooled: (B, width) final state of the end-of-text token.
        projected: (B, projection) of the pooled state, None without `text_projection`.
    """

    last: Tensor
    hidden: tuple[Tensor, ...]
    pooled: Tensor
    projected: Tensor | None


class _Attention(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = QuantLinear(config.width, config.width)
        self.k_proj = QuantLinear(config.width, config.width)
        self.v_proj = QuantLinear(config.width, config.width)
        self.out_proj = QuantLinear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, width / heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out_proj(y.transpose(1, 2).flatten(2))
        return out


class _Mlp(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.act: Activation = ACTIVATIONS[config.act]
        self.fc1 = QuantLinear(config.width, config.hidden)
        self.fc2 = QuantLinear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class _Layer(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.self_attn = _Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = _Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class _Embeddings(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.token_embedding = QuantEmbedding(config.vocabulary, config.width)
        self.position_embedding = QuantEmbedding(config.positions, config.width)


class _Encoder(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))


class _TextModel(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.eps)


class ClipText(nn.Module):
    """The encoder. No padding mask: pipelines let the model see its padding, as it was trained."""

    def __init__(self, config: ClipConfig) -> None:
        """Build the modules; weights are bound later."""
        super().__init__()
        self.config = config
        self.text_model = _TextModel(config)
        if config.projection is not None:
            self.text_projection = QuantLinear(config.width, config.projection, bias=False)

    def forward(self, ids: Tensor) -> ClipOutput:
        """Encode token `ids` (B, T) int64."""
        model, dtype = self.text_model, param_dtype(self)
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = model.embeddings.token_embedding(ids, dtype)
        x = x + model.embeddings.position_embedding(positions, dtype)
        hidden = [x]
        for layer in model.encoder.layers:
            hidden.append(layer(hidden[-1]))
        last = model.final_layer_norm(hidden[-1])
        eos = self.config.eos_token_id
        end = ids.argmax(-1) if eos == 2 else (ids == eos).int().argmax(-1)
        pooled = last[torch.arange(len(ids), device=ids.device), end]
        has_projection = self.config.projection is not None
        projected = self.text_projection(pooled) if has_projection else None
        return ClipOutput(last, tuple(hidden), pooled, projected)
