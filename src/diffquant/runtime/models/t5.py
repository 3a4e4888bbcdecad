"""T5 encoder, version 1.1.

Relative position bias, RMS norms, gated GELU, no biases, no scaling of attention. Names are
transformers'. Only block 0 holds the bias table; all blocks use it.
Source: google/flaxformer t5 v1.1; huggingface/transformers models/t5/modeling_t5.py.
"""

from __future__ import annotations

import math
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

__all__ = ["T5Config", "T5Encoder", "config_from"]


@dataclass(frozen=True, slots=True)
class T5Config:
    """Sizes of a T5 encoder.

    Attributes:
        inner: width of q, k and v together: heads times head width.
        gated: whether the feed-forward multiplies two branches (wi_0, wi_1) or has one (wi).
        buckets: rows of the relative bias table; `max_distance`: where its logarithmic part ends.
    """

    vocabulary: int
    width: int
    inner: int
    hidden: int
    layers: int
    heads: int
    buckets: int
    max_distance: int
    gated: bool
    act: str
    eps: float


def config_from(shapes: Shapes, hyper: Hyper) -> T5Config:
    """Read sizes from keys.

    Hyper: feed_forward_proj or dense_act_fn, layer_norm_epsilon, relative_attention_max_distance.
    """
    vocabulary, width = shape_of(shapes, "shared.weight")
    first = "encoder.block.0.layer"
    buckets, heads = shape_of(shapes, f"{first}.0.SelfAttention.relative_attention_bias.weight")
    gated = f"{first}.1.DenseReluDense.wi_0.weight" in shapes
    wi = "wi_0" if gated else "wi"
    named = hyper.get("dense_act_fn")
    if named is None:  # "gated-gelu" means gelu_new: transformers configuration_t5.py
        named = str(hyper.get("feed_forward_proj") or "gated-gelu").removeprefix("gated-")
        named = "gelu_new" if named == "gelu" and gated else named
    return T5Config(
        vocabulary=vocabulary,
        width=width,
        inner=shape_of(shapes, f"{first}.0.SelfAttention.q.weight")[0],
        hidden=shape_of(shapes, f"{first}.1.DenseReluDense.{wi}.weight")[0],
        layers=count(shapes, "encoder.block"),
        heads=heads,
        buckets=buckets,
        max_distance=int(number(hyper, "relative_attention_max_distance", 128)),
        gated=gated,
        act=activation(str(named)),
        eps=number(hyper, "layer_norm_epsilon", 1e-6),
    )


def relative_buckets(length: int, buckets: int, max_distance: int) -> Tensor:
    """Bucket of every (query, key) pair: (length, length) int64.

    Half of the buckets serve keys after the query. In each half the first half is one bucket per
    distance, the rest grows logarithmically up to `max_distance`.
    """
    position = torch.arange(length)
    distance = position[None, :] - position[:, None]  # key minus query
    half = buckets // 2
    exact = half // 2
    size = distance.abs()
    ratio = torch.log(size.float().clamp(min=1) / exact) / math.log(max_distance / exact)
    large = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(size < exact, size, large) + (distance > 0) * half


class _RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps)).to(x.dtype)


class _SelfAttention(nn.Module):
    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = QuantLinear(config.width, config.inner, bias=False)
        self.k = QuantLinear(config.width, config.inner, bias=False)
        self.v = QuantLinear(config.width, config.inner, bias=False)
        self.o = QuantLinear(config.inner, config.width, bias=False)
        if has_bias:
            self.relative_attention_bias = QuantEmbedding(config.buckets, config.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, inner / heads)
            for proj in (self.q, self.k, self.v)
        )
        y = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


class _DenseReluDense(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.act: Activation = ACTIVATIONS[config.act]
        self.gated = config.gated
        if config.gated:
            self.wi_0 = QuantLinear(config.width, config.hidden, bias=False)
            self.wi_1 = QuantLinear(config.width, config.hidden, bias=False)
        else:
            self.wi = QuantLinear(config.width, config.hidden, bias=False)
        self.wo = QuantLinear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act(self.wi_0(x)) * self.wi_1(x) if self.gated else self.act(self.wi(x))
        out: Tensor = self.wo(inner)
        return out


class _AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = _SelfAttention(config, has_bias=has_bias)
        self.layer_norm = _RmsNorm(config.width, config.eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = x + self.SelfAttention(self.layer_norm(x), bias)
        return out


class _FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = _DenseReluDense(config)
        self.layer_norm = _RmsNorm(config.width, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.DenseReluDense(self.layer_norm(x))
        return out


class _Block(nn.Module):
    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        layers = (_AttentionLayer(config, has_bias=has_bias), _FeedForwardLayer(config))
        self.layer = nn.ModuleList(layers)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        out: Tensor = feed_forward(attention(x, bias))
        return out


class _Stack(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        blocks = (_Block(config, has_bias=index == 0) for index in range(config.layers))
        self.block = nn.ModuleList(blocks)
        self.final_layer_norm = _RmsNorm(config.width, config.eps)


class T5Encoder(nn.Module):
    """The encoder. No padding mask: Flux lets padding be attended to, as it was trained."""

    def __init__(self, config: T5Config) -> None:
        """Build the modules; weights are bound later."""
        super().__init__()
        self.config = config
        self.shared = QuantEmbedding(config.vocabulary, config.width)
        self.encoder = _Stack(config)

    def forward(self, ids: Tensor) -> Tensor:
        """Encode token `ids` (B, T) int64: (B, T, width)."""
        config, dtype = self.config, param_dtype(self)
        x: Tensor = self.shared(ids, dtype)
        buckets = relative_buckets(ids.shape[1], config.buckets, config.max_distance)
        table = self.get_submodule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias")
        bias = table(buckets.to(ids.device), dtype).permute(2, 0, 1)[None]  # (1, heads, T, T)
        for block in self.encoder.block:
            x = block(x, bias)
            if x.dtype == torch.float16:  # activations of T5-XXL leave float16's range
                x = x.clamp(-64504.0, 64504.0)
        out: Tensor = self.encoder.final_layer_norm(x)
        return out
