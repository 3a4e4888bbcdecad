"""The UNet of the Stable Diffusion family, named as CompVis names it.

`input_blocks` walk down and leave a skip each, `middle_block` stays, `output_blocks` take the skips
back. What each block holds is read from its keys, so one file serves SD1.5, SD2 and SDXL (with
their inpainting members), the refiner, and the pruned models that leave blocks out:

    in_layers, emb_layers, out_layers, skip_connection   residual block
    norm, proj_in, transformer_blocks, proj_out          spatial transformer
    op                                                   halve the resolution
    conv                                                 double it

Source: CompVis/stable-diffusion ldm/modules/diffusionmodules/openaimodel.py and
ldm/modules/attention.py; Stability-AI/generative-models for `label_emb`. Odd sizes are doubled to
the size of the next skip, as huggingface/diffusers does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffquant.runtime.kernels import tokens
from diffquant.runtime.layers import Activations, QuantConv2d, QuantLinear
from diffquant.runtime.models.attention import attention, taken_by
from diffquant.runtime.models.facts import guidance_embedding, param_dtype, timestep_embedding
from diffquant.runtime.models.unet_config import (
    AttentionSpec,
    LayerSpec,
    ResampleSpec,
    ResSpec,
    UNetConfig,
    config_from,
)

__all__ = ["AttentionSpec", "ResSpec", "ResampleSpec", "UNet", "UNetConfig", "config_from"]


class _ResBlock(nn.Module):
    def __init__(self, spec: ResSpec, config: UNetConfig) -> None:
        super().__init__()
        norm = nn.GroupNorm(config.groups, spec.before, eps=config.eps)
        self.in_layers = nn.Sequential(
            norm, nn.SiLU(), QuantConv2d(spec.before, spec.after, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), QuantLinear(config.embedding, spec.after))
        norm = nn.GroupNorm(config.groups, spec.after, eps=config.eps)
        conv = QuantConv2d(spec.after, spec.after, 3, padding=1)
        self.out_layers = nn.Sequential(norm, nn.SiLU(), nn.Identity(), conv)
        same = spec.before == spec.after
        self.skip_connection = nn.Identity() if same else QuantConv2d(spec.before, spec.after, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        out: Tensor = self.skip_connection(x) + self.out_layers(h)
        return out


class _Attention(nn.Module):
    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = QuantLinear(channels, channels, bias=False)
        self.to_k = QuantLinear(context, channels, bias=False)
        self.to_v = QuantLinear(context, channels, bias=False)
        self.to_out = nn.Sequential(QuantLinear(channels, channels))

    def forward(self, x: Activations, context: Activations) -> Tensor:
        q, k, v = (
            _heads_first(y, self.heads)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        y = attention(q, k, v)
        out: Tensor = self.to_out(y.transpose(1, 2).flatten(2))
        return out


def _heads_first(y: Tensor, heads: int) -> Tensor:
    """(B, tokens, C) to (B, heads, tokens, C / heads).

    Copied on a CPU, whose attention reads a head's rows once per block of queries: scattered they
    cost a tenth more. Other devices' kernels do not care.
    """
    y = y.view(*y.shape[:2], heads, -1).transpose(1, 2)
    return y.contiguous() if y.device.type == "cpu" else y


class _GatedGelu(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = QuantLinear(channels, 2 * hidden)

    def forward(self, x: Activations, into: QuantLinear) -> Activations:
        """What the layer `into` takes."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        kind = into.takes(value)
        for asked in (kind, None) if kind is not None else (None,):
            found = tokens.gelu_gated(value, gate, asked)
            if found is not None:
                return found
        out: Tensor = value * functional.gelu(gate)
        return out


class _FeedForward(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        layers = (_GatedGelu(channels, hidden), nn.Identity(), QuantLinear(hidden, channels))
        self.net = nn.Sequential(*layers)

    def layers(self) -> tuple[_GatedGelu, QuantLinear]:
        """Both, in their order."""
        before, after = self.net[0], self.net[2]
        assert isinstance(before, _GatedGelu)
        assert isinstance(after, QuantLinear)
        return before, after

    def forward(self, x: Activations) -> Tensor:
        before, after = self.layers()
        out: Tensor = after(before(x, after))
        return out


def _normed(x: Tensor, norm: nn.LayerNorm, into: Sequence[QuantLinear]) -> Activations:
    """A layer norm of tokens, as all of the layers that take it want it."""
    found = tokens.normed(x, norm, taken_by(into, x))
    if found is not None:
        return found
    out: Tensor = norm(x)
    return out


class _TransformerBlock(nn.Module):
    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.channels)
        self.attn1 = _Attention(spec.channels, spec.channels, spec.heads)
        self.norm2 = nn.LayerNorm(spec.channels)
        self.attn2 = _Attention(spec.channels, spec.context, spec.heads)
        self.norm3 = nn.LayerNorm(spec.channels)
        self.ff = _FeedForward(spec.channels, spec.hidden)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        own = self.attn1
        normed = _normed(x, self.norm1, (own.to_q, own.to_k, own.to_v))
        x = x + own(normed, normed)
        x = x + self.attn2(_normed(x, self.norm2, [self.attn2.to_q]), context)
        out: Tensor = x + self.ff(_normed(x, self.norm3, [self.ff.layers()[0].proj]))
        return out


class _SpatialTransformer(nn.Module):
    def __init__(self, spec: AttentionSpec, config: UNetConfig) -> None:
        super().__init__()
        channels = spec.channels
        self.convolution = spec.convolution
        self.norm = nn.GroupNorm(config.groups, channels, eps=1e-6)
        self.proj_in, self.proj_out = (
            QuantConv2d(channels, channels, 1)
            if spec.convolution
            else QuantLinear(channels, channels)
            for _ in range(2)
        )
        blocks = (_TransformerBlock(spec) for _ in range(spec.depth))
        self.transformer_blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x)
        h = _tokens(self.proj_in(h)) if self.convolution else self.proj_in(_tokens(h))
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(_grid(h, x)) if self.convolution else _grid(self.proj_out(h), x)
        out: Tensor = x + h
        return out


def _tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h w, C), copied: sums and norms keep the layout they are given."""
    return x.flatten(2).transpose(1, 2).contiguous()


def _grid(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, h w, C) to the shape of `like`, laid out as convolutions want it."""
    return tokens.transpose(1, 2).reshape(like.shape).contiguous()


class _Downsample(nn.Module):
    def __init__(self, spec: ResampleSpec) -> None:
        super().__init__()
        self.op = QuantConv2d(spec.channels, spec.channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class _Upsample(nn.Module):
    def __init__(self, spec: ResampleSpec) -> None:
        super().__init__()
        self.conv = QuantConv2d(spec.channels, spec.channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        out: Tensor = self.conv(functional.interpolate(x, size=size, mode="nearest"))
        return out


def _build(spec: LayerSpec, config: UNetConfig) -> nn.Module:
    match spec:
        case ResSpec():
            return _ResBlock(spec, config)
        case AttentionSpec():
            return _SpatialTransformer(spec, config)
        case ResampleSpec():
            return _Upsample(spec) if spec.up else _Downsample(spec)


class _Block(nn.ModuleList):
    """Layers run in order, each handed what it needs."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, size: tuple[int, int]) -> Tensor:
        for layer in self:
            match layer:
                case _ResBlock():
                    x = layer(x, emb)
                case _SpatialTransformer():
                    x = layer(x, context)
                case _Upsample():
                    x = layer(x, size)
                case _:
                    x = layer(x)
        return x


class _TimeEmbed(nn.ModuleDict):
    """Two layers; before the first, the guidance is added where the model takes one."""

    def __init__(self, config: UNetConfig) -> None:
        base, embedding = config.base, config.embedding
        super().__init__(
            {"0": QuantLinear(base, embedding), "2": QuantLinear(embedding, embedding)}
        )
        self.guidance = config.guidance
        if config.guidance is not None:
            self["cond_proj"] = QuantLinear(config.guidance, base, bias=False)

    def forward(self, t: Tensor, guidance: Tensor | None) -> Tensor:
        if self.guidance is not None:
            assert guidance is not None
            t = t + self["cond_proj"](guidance_embedding(guidance, self.guidance).to(t.dtype))
        out: Tensor = self["2"](functional.silu(self["0"](t)))
        return out


class UNet(nn.Module):
    """The denoiser of SD1.5, SD2, SDXL and what was pruned or distilled from them."""

    def __init__(self, config: UNetConfig) -> None:
        """Build the modules; weights are bound later."""
        super().__init__()
        self.config = config
        base, embedding = config.base, config.embedding
        self.time_embed = _TimeEmbed(config)
        if config.label is not None:
            label = (
                QuantLinear(config.label, embedding),
                nn.SiLU(),
                QuantLinear(embedding, embedding),
            )
            self.label_emb = nn.Sequential(nn.Sequential(*label))
        first = _Block([QuantConv2d(config.in_channels, base, 3, padding=1)])
        rest = (_Block(_build(layer, config) for layer in block) for block in config.inputs[1:])
        self.input_blocks = nn.ModuleList((first, *rest))
        self.middle_block = _Block(_build(layer, config) for layer in config.middle)
        outputs = (_Block(_build(layer, config) for layer in block) for block in config.outputs)
        self.output_blocks = nn.ModuleList(outputs)
        norm = nn.GroupNorm(config.groups, base, eps=config.eps)
        self.out = nn.Sequential(
            norm, nn.SiLU(), QuantConv2d(base, config.out_channels, 3, padding=1)
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict noise (or velocity).

        Args:
            x: (B, in_channels, h, w) latents.
            t: (B,) training timesteps, 0 to 999, fractions allowed.
            context: (B, T, context width) text states.
            label: (B, config.label), where the model has `label_emb`.
            guidance: (B,) distilled strength, where the model has `time_embed.cond_proj`.

        Returns:
            (B, out_channels, h, w).
        """
        times = timestep_embedding(t, self.config.base).to(param_dtype(self))
        emb = self.time_embed(times, guidance)
        if self.config.label is not None:
            emb = emb + self.label_emb(label)
        skips: list[Tensor] = []
        for block in self.input_blocks:
            x = block(x, emb, context, (0, 0))
            skips.append(x)
        x = self.middle_block(x, emb, context, (0, 0))
        for block in self.output_blocks:
            x = torch.cat((x, skips.pop()), dim=1)
            height, width = (skips[-1] if skips else x).shape[2:]
            x = block(x, emb, context, (height, width))
        out: Tensor = self.out(x)
        return out
