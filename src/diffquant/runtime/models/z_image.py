"""Z-Image's transformer: one stream of picture and text tokens, in blocks of one kind.

Picture tokens (2x2 latent pixels) first pass `noise_refiner`, text tokens `context_refiner`; then
both run, picture first, through `layers`. A block is norm, attention, norm, gate; norm, gated MLP,
norm, gate; the context refiner's has no gates and does not know the time. Both sequences are filled
up to multiples of 32 with learned tokens, which are attended to like any other.
Positions are (time, row, column): text token i stands at (i + 1, 0, 0), the picture in the plane
behind the last one, what fills a picture up at the origin.
Source: huggingface/diffusers@58eb52c:src/diffusers/models/transformers/transformer_z_image.py; the
names are those of single files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.runtime.layers import QuantLinear
from diffquant.runtime.models.attention import Positions, Stream, attend, gated, rotary
from diffquant.runtime.models.facts import (
    Hyper,
    Shapes,
    count,
    number,
    param_dtype,
    require,
    rotary_axes,
    shape_of,
    timestep_embedding,
)

__all__ = ["ZImage", "ZImageConfig", "config_from"]

_DEFAULT_AXES = (32, 48, 48)
_MULTIPLE = 32  # SEQ_MULTI_OF of the source
_QK_EPS = 1e-5  # of the norms of queries and keys, whatever norm_eps says


@dataclass(frozen=True, slots=True)
class ZImageConfig:
    """Sizes of a Z-Image transformer.

    Attributes:
        in_channels: of the latents.
        time, time_hidden, command: widths of the timestep's sinusoids, of the layer after them,
            and of the vector that commands the blocks.
        caption: width of the text encoder's states.
        refiners, layers: blocks of each refiner, and of both streams together.
        axes: rotary widths of the three position axes; their sum is head_dim.
        time_scale: what the flow time is multiplied with before it becomes sinusoids.
    """

    in_channels: int
    width: int
    hidden: int
    head_dim: int
    time: int
    time_hidden: int
    command: int
    caption: int
    noise_refiners: int
    context_refiners: int
    layers: int
    axes: tuple[int, ...]
    theta: float
    time_scale: float
    eps: float


def config_from(shapes: Shapes, hyper: Hyper) -> ZImageConfig:
    """Read sizes from keys; hyper: axes_dims, rope_theta, t_scale, norm_eps.

    Raises:
        ArchitectureError: the rotary axes do not fill a head, or the model reads pictures too.
    """
    require(hyper, "all_patch_size", ((2,), [2]))
    require(hyper, "all_f_patch_size", ((1,), [1]))
    if "siglip_embedder.1.weight" in shapes:
        raise ArchitectureError(
            "this Z-Image transformer also reads SigLIP features (Omni, Edit): the runtime makes "
            "pictures with the models that read text alone"
        )
    width, columns = shape_of(shapes, "x_embedder.weight")
    (head_dim,) = shape_of(shapes, "layers.0.attention.q_norm.weight")
    axes = rotary_axes(hyper, "axes_dims", _DEFAULT_AXES, head_dim)
    time_hidden, time = shape_of(shapes, "t_embedder.mlp.0.weight")
    return ZImageConfig(
        in_channels=columns // 4,
        width=width,
        hidden=shape_of(shapes, "layers.0.feed_forward.w1.weight")[0],
        head_dim=head_dim,
        time=time,
        time_hidden=time_hidden,
        command=shape_of(shapes, "t_embedder.mlp.2.weight")[0],
        caption=shape_of(shapes, "cap_embedder.1.weight")[1],
        noise_refiners=count(shapes, "noise_refiner"),
        context_refiners=count(shapes, "context_refiner"),
        layers=count(shapes, "layers"),
        axes=axes,
        theta=number(hyper, "rope_theta", 256.0),
        time_scale=number(hyper, "t_scale", 1000.0),
        eps=number(hyper, "norm_eps", 1e-5),
    )


def _filled(length: int) -> int:
    """Tokens of a sequence once it is filled up."""
    return -(-length // _MULTIPLE) * _MULTIPLE


class _Attention(nn.Module):
    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.qkv = QuantLinear(config.width, 3 * config.width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=_QK_EPS)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=_QK_EPS)
        self.out = QuantLinear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, positions: Positions, mask: Tensor | None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, -1, self.q_norm.weight.shape[0]))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, heads, L, head_dim) each
        stream = Stream(q, k, v, self.q_norm, self.k_norm)
        out: Tensor = self.out(attend((stream,), positions, mask))
        return out


class _FeedForward(nn.Module):
    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.w1 = QuantLinear(config.width, config.hidden, bias=False)
        self.w2 = QuantLinear(config.hidden, config.width, bias=False)
        self.w3 = QuantLinear(config.width, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return out


class _Block(nn.Module):
    """One block; with `timed`, scales and gates come from the timestep."""

    def __init__(self, config: ZImageConfig, *, timed: bool) -> None:
        super().__init__()
        width, eps = config.width, config.eps
        self.attention = _Attention(config)
        self.feed_forward = _FeedForward(config)
        self.attention_norm1 = nn.RMSNorm(width, eps=eps)
        self.attention_norm2 = nn.RMSNorm(width, eps=eps)
        self.ffn_norm1 = nn.RMSNorm(width, eps=eps)
        self.ffn_norm2 = nn.RMSNorm(width, eps=eps)
        self.adaLN_modulation = (
            nn.Sequential(QuantLinear(config.command, 4 * width)) if timed else None
        )

    def forward(
        self, x: Tensor, positions: Positions, mask: Tensor | None, command: Tensor
    ) -> Tensor:
        if self.adaLN_modulation is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), positions, mask))
            out: Tensor = x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
            return out
        scale, gate, scale_mlp, gate_mlp = self.adaLN_modulation(command)[:, None].chunk(4, dim=-1)
        y = self.attention(self.attention_norm1(x) * (1 + scale), positions, mask)
        x = gated(x, gate.tanh(), self.attention_norm2(y))
        y = self.feed_forward(self.ffn_norm1(x) * (1 + scale_mlp))
        return gated(x, gate_mlp.tanh(), self.ffn_norm2(y))


class _TimeEmbedder(nn.Module):
    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            QuantLinear(config.time, config.time_hidden),
            nn.SiLU(),
            QuantLinear(config.time_hidden, config.command),
        )


class _FinalLayer(nn.Module):
    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.linear = QuantLinear(config.width, 4 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), QuantLinear(config.command, config.width))

    def forward(self, x: Tensor, command: Tensor) -> Tensor:
        scale = self.adaLN_modulation(command)[:, None]
        out: Tensor = self.linear(functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale))
        return out


class ZImage(nn.Module):
    """The denoiser of Z-Image, Turbo and base."""

    def __init__(self, config: ZImageConfig) -> None:
        """Build the modules; weights are bound later."""
        super().__init__()
        self.config = config
        width = config.width
        self.x_embedder = QuantLinear(4 * config.in_channels, width)
        self.cap_embedder = nn.Sequential(
            nn.RMSNorm(config.caption, eps=config.eps), QuantLinear(config.caption, width)
        )
        self.t_embedder = _TimeEmbedder(config)
        self.x_pad_token = nn.Parameter(torch.empty(1, width))
        self.cap_pad_token = nn.Parameter(torch.empty(1, width))
        self.noise_refiner = nn.ModuleList(
            _Block(config, timed=True) for _ in range(config.noise_refiners)
        )
        self.context_refiner = nn.ModuleList(
            _Block(config, timed=False) for _ in range(config.context_refiners)
        )
        self.layers = nn.ModuleList(_Block(config, timed=True) for _ in range(config.layers))
        self.final_layer = _FinalLayer(config)

    def forward(
        self, latents: Tensor, t: Tensor, states: Tensor, lengths: Sequence[int] | None = None
    ) -> Tensor:
        """Predict the velocity of the flow, from noise to picture.

        Args:
            latents: (B, in_channels, h, w), h and w even.
            t: (B,) flow time in [0, 1], 1 is the picture.
            states: (B, T, caption) of the text encoder, the tokens that count first.
            lengths: tokens that count, per prompt; None: all T of each.

        Returns:
            (B, in_channels, h, w).

        Raises:
            UsageError: lengths that do not fit the states.
        """
        batch, channels, height, width = latents.shape
        lengths = [states.shape[1]] * batch if lengths is None else lengths
        if len(lengths) != batch or not all(0 < one <= states.shape[1] for one in lengths):
            raise UsageError(
                f"expected {batch} text lengths from 1 to {states.shape[1]}, found {list(lengths)}"
            )
        dtype = param_dtype(self)
        waves = timestep_embedding(t * self.config.time_scale, self.config.time)
        command = self.t_embedder.mlp(waves.to(dtype))
        ends = torch.tensor([_filled(one) for one in lengths])
        device = latents.device

        text, mask = self._text(states.to(dtype), lengths, ends)
        text_at = self._positions(_text_ids(text.shape[1]), device)
        for block in self.context_refiner:
            text = block(text, text_at, None if mask is None else mask[:, None, None], command)

        x = self._picture(latents.to(dtype))
        picture_at = self._positions(_picture_ids(height // 2, width // 2, ends), device)
        for block in self.noise_refiner:
            x = block(x, picture_at, None, command)

        positions = tuple(
            torch.cat((a, b.expand(len(a), *b.shape[1:])), dim=-2)
            for a, b in zip(picture_at, text_at, strict=True)
        )
        if mask is not None:
            mask = functional.pad(mask, (x.shape[1], 0), value=True)[:, None, None]
        x = torch.cat((x, text), dim=1)
        for block in self.layers:
            x = block(x, positions, mask, command)
        out: Tensor = self.final_layer(x[:, : height * width // 4], command)
        out = out.reshape(batch, height // 2, width // 2, 2, 2, channels)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)

    def _text(
        self, states: Tensor, lengths: Sequence[int], ends: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Embed and fill up: (B, L, width), and (B, L) bool where the longest of all is longer."""
        length = _filled(max(lengths))
        kept = self.cap_embedder(states[:, :length])
        kept = functional.pad(kept, (0, 0, 0, length - kept.shape[1]))
        index = torch.arange(length, device=states.device)
        real = index < torch.tensor(lengths, device=states.device)[:, None]
        text = torch.where(real[..., None], kept, self.cap_pad_token)
        same = len({_filled(one) for one in lengths}) == 1
        return text, None if same else index < ends.to(index.device)[:, None]

    def _picture(self, latents: Tensor) -> Tensor:
        """Fold 2x2 latent pixels into tokens, channels last; embed and fill up: (B, L, width)."""
        batch, channels, height, width = latents.shape
        x = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, 4 * channels)
        x = self.x_embedder(x)
        fill = _filled(x.shape[1]) - x.shape[1]
        return torch.cat((x, self.x_pad_token.expand(batch, fill, -1)), dim=1)

    def _positions(self, ids: Tensor, device: torch.device) -> Positions:
        """Rotary tables of positions (B or 1, L, 3), to be shared by all heads."""
        cos, sin = rotary(ids, self.config.axes, self.config.theta, device)
        return cos[:, None], sin[:, None]


def _text_ids(length: int) -> Tensor:
    """Positions of text tokens: (1, L, 3)."""
    index = torch.arange(1, length + 1, dtype=torch.float32)
    return functional.pad(index[None, :, None], (0, 2))


def _picture_ids(rows: int, columns: int, ends: Tensor) -> Tensor:
    """Positions of picture tokens behind texts of `ends` (B,) tokens: (B, L, 3)."""
    at = torch.arange(rows), torch.arange(columns)
    plane = torch.stack(torch.meshgrid(*at, indexing="ij"), dim=-1).reshape(1, -1, 2)
    depth = (ends + 1)[:, None, None].expand(-1, plane.shape[1], 1)
    ids = torch.cat((depth, plane.expand(len(ends), -1, 2)), dim=-1).float()
    return functional.pad(ids, (0, 0, 0, _filled(ids.shape[1]) - ids.shape[1]))
