"""The Qwen-Image transformer, with Diffusers' names.

Picture tokens (2x2 latent pixels each) and text tokens run side by side through all blocks, each
with its own weights but one attention over both, text first. Positions count (frame, row, column)
around the middle of each picture; text goes on where the largest picture ends. Other pictures, if
any (Edit, Layered), follow the one being made as further tokens.
Source: huggingface/diffusers@58eb52c:src/diffusers/models/transformers/transformer_qwenimage.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffquant.core.errors import UsageError
from diffquant.runtime.layers import Activations, QuantEmbedding, QuantLinear
from diffquant.runtime.models.attention import (
    Positions,
    Stream,
    attend,
    feed_forward,
    gated,
    modulated,
    rotary,
)
from diffquant.runtime.models.facts import param_dtype, timestep_embedding
from diffquant.runtime.models.qwen_image_config import QwenImageConfig, config_from

__all__ = ["QwenImage", "QwenImageConfig", "config_from", "positions"]

Size: TypeAlias = tuple[int, int, int]  # frames, rows and columns of tokens


def positions(sizes: Sequence[Size], text: int, *, layered: bool = False) -> tuple[Tensor, Tensor]:
    """Where tokens are: pictures (L, 3) and text (text, 3), float32 (frame, row, column).

    Rows and columns count from the middle, the larger half negative. Picture i starts at frame i;
    with `layered` the last of several is at frame -1.
    """
    grids = []
    for index, (frames, rows, columns) in enumerate(sizes):
        first = -1 if layered and index == len(sizes) - 1 else index
        axes = (
            torch.arange(first, first + frames),
            torch.arange(rows) - (rows - rows // 2),
            torch.arange(columns) - (columns - columns // 2),
        )
        grids.append(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3))
    start = max(max(rows // 2, columns // 2) for _, rows, columns in sizes)
    start = max(start, len(sizes) - 1) if layered else start
    words = torch.arange(start, start + text)[:, None].expand(-1, 3)
    return torch.cat(grids).float(), words.float()


class _Embedder(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.linear_1 = QuantLinear(before, width)
        self.linear_2 = QuantLinear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(functional.silu(self.linear_1(x)))
        return out


class _Time(nn.Module):
    def __init__(self, config: QwenImageConfig) -> None:
        super().__init__()
        self.timestep_embedder = _Embedder(config.time, config.width)
        self.addition_t_embedding = QuantEmbedding(2, config.width) if config.condition else None

    def forward(self, t: Tensor, condition: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Embed times (B,) in [0, 1] and conditions (B,) of 0 or 1: (B, width)."""
        before = self.timestep_embedder.linear_1.logical_shape[1]
        waves = timestep_embedding(t, before, 1000.0)
        vector: Tensor = self.timestep_embedder(waves.to(dtype))
        if (condition is None) != (self.addition_t_embedding is None):
            needs = "takes no" if self.addition_t_embedding is None else "needs an"
            raise UsageError(f"this model {needs} additional timestep condition")
        if self.addition_t_embedding is not None:
            vector = vector + self.addition_t_embedding(condition, dtype)
        return vector


class _Projection(nn.Module):
    """A linear layer, which Diffusers calls `proj`; it is followed by GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = QuantLinear(width, hidden)


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # Index 1 is a dropout, where it is trained.
        self.net = nn.Sequential(
            _Projection(width, hidden), nn.Identity(), QuantLinear(hidden, width)
        )

    def layers(self) -> tuple[QuantLinear, QuantLinear]:
        """Both, in their order."""
        before, after = self.net[0], self.net[2]
        assert isinstance(before, _Projection)
        assert isinstance(after, QuantLinear)
        return before.proj, after

    def forward(self, x: Activations) -> Tensor:
        return feed_forward(*self.layers(), x)


class _Attention(nn.Module):
    """One attention over text and picture; `to_*` are the picture's layers, `add_*` the text's."""

    def __init__(self, config: QwenImageConfig) -> None:
        super().__init__()
        width, self.head_dim = config.width, config.head_dim
        self.to_q, self.to_k, self.to_v = (QuantLinear(width, width) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            QuantLinear(width, width) for _ in range(3)
        )
        self.norm_q, self.norm_k = (nn.RMSNorm(self.head_dim, eps=config.eps) for _ in range(2))
        self.norm_added_q, self.norm_added_k = (
            nn.RMSNorm(self.head_dim, eps=config.eps) for _ in range(2)
        )
        self.to_out = nn.ModuleList([QuantLinear(width, width)])
        self.to_add_out = QuantLinear(width, width)

    def of_picture(self) -> tuple[QuantLinear, ...]:
        """The layers that picture tokens go into."""
        return self.to_q, self.to_k, self.to_v

    def of_text(self) -> tuple[QuantLinear, ...]:
        """The layers that text tokens go into."""
        return self.add_q_proj, self.add_k_proj, self.add_v_proj

    def forward(
        self, img: Activations, txt: Activations, places: Positions, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        def heads(layer: QuantLinear, x: Activations) -> Tensor:
            out: Tensor = layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            return out  # (B, heads, L, head_dim)

        words = Stream(
            heads(self.add_q_proj, txt),
            heads(self.add_k_proj, txt),
            heads(self.add_v_proj, txt),
            self.norm_added_q,
            self.norm_added_k,
        )
        picture = Stream(
            heads(self.to_q, img),
            heads(self.to_k, img),
            heads(self.to_v, img),
            self.norm_q,
            self.norm_k,
        )
        y = attend((words, picture), places, visible)
        length = words.q.shape[2]
        return self.to_out[0](y[:, length:]), self.to_add_out(y[:, :length])


def _modulation(width: int) -> nn.Sequential:
    """Timestep vector to shift, scale and gate, for attention and then for the feed-forward."""
    return nn.Sequential(nn.SiLU(), QuantLinear(width, 6 * width))


def _prepared(
    x: Tensor, modulation: Tensor, eps: float, into: Sequence[QuantLinear]
) -> tuple[Activations, Tensor]:
    """What layers are given, normed and modulated, and the gate of what they answer."""
    shift, scale, gate = modulation.chunk(3, dim=-1)
    return modulated(x, shift, scale, eps, into=into), gate


def _in_range(x: Tensor) -> Tensor:
    """Keep float16 activations finite."""
    return x.clamp(-65504.0, 65504.0) if x.dtype == torch.float16 else x


class _Block(nn.Module):
    def __init__(self, config: QwenImageConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.img_mod, self.txt_mod = _modulation(config.width), _modulation(config.width)
        self.attn = _Attention(config)
        self.img_mlp = _FeedForward(config.width, config.hidden)
        self.txt_mlp = _FeedForward(config.width, config.text_hidden)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vectors: tuple[Tensor, Tensor | None],
        places: Positions,
        visible: Tensor | None,
        made: int,
    ) -> tuple[Tensor, Tensor]:
        now, still = vectors
        changes = self.img_mod(now)[:, None]  # (B, 1, 6 width)
        if still is not None:  # a row per token: those after `made` stand still
            others = self.img_mod(still)[:, None].expand(-1, img.shape[1] - made, -1)
            changes = torch.cat((changes.expand(-1, made, -1), others), dim=1)
        img_mods = changes.chunk(2, dim=-1)  # for the attention, for the feed-forward
        txt_mods = self.txt_mod(now)[:, None].chunk(2, dim=-1)
        img_in, img_gate = _prepared(img, img_mods[0], self.eps, self.attn.of_picture())
        txt_in, txt_gate = _prepared(txt, txt_mods[0], self.eps, self.attn.of_text())
        img_out, txt_out = self.attn(img_in, txt_in, places, visible)
        img, txt = gated(img, img_gate, img_out), gated(txt, txt_gate, txt_out)
        img_in, img_gate = _prepared(img, img_mods[1], self.eps, self.img_mlp.layers()[:1])
        txt_in, txt_gate = _prepared(txt, txt_mods[1], self.eps, self.txt_mlp.layers()[:1])
        img = gated(img, img_gate, self.img_mlp(img_in))
        txt = gated(txt, txt_gate, self.txt_mlp(txt_in))
        return _in_range(img), _in_range(txt)


class _OutputNorm(nn.Module):
    def __init__(self, config: QwenImageConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.linear = QuantLinear(config.width, 2 * config.width)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        scale, shift = self.linear(functional.silu(vector))[:, None].chunk(2, dim=-1)
        return modulated(x, shift, scale, self.eps)


class QwenImage(nn.Module):
    """The denoiser of Qwen-Image and of its editing relatives."""

    def __init__(self, config: QwenImageConfig) -> None:
        """Build the modules; weights are bound later."""
        super().__init__()
        self.config = config
        self.img_in = QuantLinear(config.in_channels, config.width)
        self.txt_norm = nn.RMSNorm(config.context, eps=config.eps)
        self.txt_in = QuantLinear(config.context, config.width)
        self.time_text_embed = _Time(config)
        self.transformer_blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm_out = _OutputNorm(config)
        self.proj_out = QuantLinear(config.width, config.out_channels)

    def forward(
        self,
        img: Tensor,
        t: Tensor,
        txt: Tensor,
        sizes: Sequence[Size],
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity of the flow.

        Args:
            img: (B, L, in_channels) packed latents, of the picture being made and then of others.
            t: (B,) flow time in [0, 1], 1 is noise.
            txt: (B, T, context) states of the text encoder.
            sizes: (frames, rows, columns) in tokens of each picture; they add up to L.
            mask: (B, T) bool, False at padding; None: no padding.
            condition: (B,) int64 of 0 or 1, where the model takes one.

        Returns:
            (B, L, out_channels); what stands at other pictures means nothing.

        Raises:
            UsageError: sizes that are not those of `img`, or a condition the model does not take.
        """
        config, dtype, device = self.config, param_dtype(self), img.device
        if sum(map(prod, sizes)) != img.shape[1]:
            raise UsageError(f"sizes {list(sizes)} do not add up to the {img.shape[1]} tokens")
        now = self.time_text_embed(t, condition, dtype)
        alone = len(sizes) == 1 or not config.still
        still = None if alone else self.time_text_embed(torch.zeros_like(t), condition, dtype)
        pictures, words = positions(sizes, txt.shape[1], layered=config.layered)
        places = rotary(torch.cat((words, pictures)), config.axes, config.theta, device)
        visible = None
        if mask is not None:
            visible = functional.pad(mask.to(device), (0, img.shape[1]), value=True)[:, None, None]
        img, txt = self.img_in(img.to(dtype)), self.txt_in(self.txt_norm(txt.to(dtype)))
        for block in self.transformer_blocks:
            img, txt = block(img, txt, (now, still), places, visible, prod(sizes[0]))
        out: Tensor = self.proj_out(self.norm_out(img, now))
        return out
