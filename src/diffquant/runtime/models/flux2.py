"""The Flux.2 transformer (dev, klein), named as Black Forest Labs name it.

Flux.1's two kinds of blocks with three differences: what the timestep commands is computed once for
all blocks of a kind, not in each; the MLPs are gated (SwiGLU); nothing has a bias. There is no
pooled text. Tokens stand at (time, row, column, index): the picture at (0, row, column, 0), text
token i at (0, 0, 0, i).
Source: black-forest-labs/flux2 src/flux2/model.py; huggingface/diffusers@58eb52c:
src/diffusers/models/transformers/transformer_flux2.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffquant.core.errors import UsageError
from diffquant.runtime.layers import QuantLinear
from diffquant.runtime.models.attention import Positions, QkNorm, attend, gated, modulated, rotary
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
from diffquant.runtime.models.flux import Embedder, Modulation, in_range

__all__ = ["Flux2", "Flux2Config", "config_from"]

_DEFAULT_AXES = (32, 32, 32, 32)


@dataclass(frozen=True, slots=True)
class Flux2Config:
    """Sizes of a Flux.2 transformer.

    Attributes:
        in_channels, out_channels: of the latents, a token each: those of the VAE times 4.
        hidden, single_hidden: of the MLPs after gating, in double and in single blocks.
        context: width of the text encoder's states, three of its layers side by side.
        time: width of the timestep sinusoids.
        guidance: whether the model takes a distilled guidance strength (dev) or not (klein).
        axes: rotary widths of the four position axes; their sum is head_dim.
    """

    in_channels: int
    out_channels: int
    width: int
    hidden: int
    single_hidden: int
    head_dim: int
    context: int
    time: int
    double_depth: int
    single_depth: int
    guidance: bool
    axes: tuple[int, ...]
    theta: float
    eps: float


def config_from(shapes: Shapes, hyper: Hyper) -> Flux2Config:
    """Read sizes from keys; hyper: axes_dims_rope, rope_theta, eps.

    Raises:
        ArchitectureError: the rotary axes do not fill a head.
    """
    require(hyper, "patch_size", (1,))
    width, in_channels = shape_of(shapes, "img_in.weight")
    (head_dim,) = shape_of(shapes, "double_blocks.0.img_attn.norm.query_norm.scale")
    axes = rotary_axes(hyper, "axes_dims_rope", _DEFAULT_AXES, head_dim)
    single = count(shapes, "single_blocks")
    linear2 = shape_of(shapes, "single_blocks.0.linear2.weight")[1] if single else width
    return Flux2Config(
        in_channels=in_channels,
        out_channels=shape_of(shapes, "final_layer.linear.weight")[0],
        width=width,
        hidden=shape_of(shapes, "double_blocks.0.img_mlp.2.weight")[1],
        single_hidden=linear2 - width,
        head_dim=head_dim,
        context=shape_of(shapes, "txt_in.weight")[1],
        time=shape_of(shapes, "time_in.in_layer.weight")[1],
        double_depth=count(shapes, "double_blocks"),
        single_depth=single,
        guidance="guidance_in.in_layer.weight" in shapes,
        axes=axes,
        theta=number(hyper, "rope_theta", 2000.0),
        eps=number(hyper, "eps", 1e-6),
    )


class _SwiGlu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Halve the last dimension: the first half opens the second."""
        gate, value = x.chunk(2, dim=-1)
        return functional.silu(gate) * value


def _mlp(config: Flux2Config) -> nn.Sequential:
    width, hidden = config.width, config.hidden
    before = QuantLinear(width, 2 * hidden, bias=False)
    return nn.Sequential(before, _SwiGlu(), QuantLinear(hidden, width, bias=False))


class _Attention(nn.Module):
    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.qkv = QuantLinear(config.width, 3 * config.width, bias=False)
        self.norm = QkNorm(config.head_dim, config.eps)
        self.proj = QuantLinear(config.width, config.width, bias=False)


class _DoubleBlock(nn.Module):
    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.eps = config.eps
        self.img_attn, self.txt_attn = _Attention(config), _Attention(config)
        self.img_mlp, self.txt_mlp = _mlp(config), _mlp(config)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        img_mod: tuple[Tensor, ...],
        txt_mod: tuple[Tensor, ...],
        positions: Positions,
    ) -> tuple[Tensor, Tensor]:
        """Both streams, each (B, L, width); `*_mod`: shift, scale, gate, twice."""
        eps = self.eps
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = img_mod
        txt_shift, txt_scale, txt_gate, txt_shift_mlp, txt_scale_mlp, txt_gate_mlp = txt_mod
        img_qkv = self.img_attn.norm(self.img_attn.qkv(modulated(img, shift, scale, eps)))
        txt_qkv = self.txt_attn.norm(self.txt_attn.qkv(modulated(txt, txt_shift, txt_scale, eps)))
        joined = attend((txt_qkv, img_qkv), positions)
        length = txt.shape[1]
        img = gated(img, gate, self.img_attn.proj(joined[:, length:]))
        img = gated(img, gate_mlp, self.img_mlp(modulated(img, shift_mlp, scale_mlp, eps)))
        txt = gated(txt, txt_gate, self.txt_attn.proj(joined[:, :length]))
        told = self.txt_mlp(modulated(txt, txt_shift_mlp, txt_scale_mlp, eps))
        txt = gated(txt, txt_gate_mlp, told)
        return img, in_range(txt)


class _SingleBlock(nn.Module):
    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        width, hidden = config.width, config.single_hidden
        self.eps = config.eps
        self.split = (3 * width, 2 * hidden)
        self.linear1 = QuantLinear(width, 3 * width + 2 * hidden, bias=False)
        self.norm = QkNorm(config.head_dim, config.eps)
        self.gated = _SwiGlu()
        self.linear2 = QuantLinear(width + hidden, width, bias=False)

    def forward(self, x: Tensor, mod: tuple[Tensor, ...], positions: Positions) -> Tensor:
        shift, scale, gate = mod
        qkv, mlp = self.linear1(modulated(x, shift, scale, self.eps)).split(self.split, dim=-1)
        attended = attend((self.norm(qkv),), positions)
        out = self.linear2(torch.cat((attended, self.gated(mlp)), dim=-1))
        return in_range(gated(x, gate, out))


class _FinalLayer(nn.Module):
    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.eps = config.eps
        self.linear = QuantLinear(config.width, config.out_channels, bias=False)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), QuantLinear(config.width, 2 * config.width, bias=False)
        )

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vector)[:, None].chunk(2, dim=-1)
        out: Tensor = self.linear(modulated(x, shift, scale, self.eps))
        return out


class Flux2(nn.Module):
    """The denoiser of Flux.2 dev and klein."""

    def __init__(self, config: Flux2Config) -> None:
        """Build the modules; weights are bound later."""
        super().__init__()
        self.config = config
        width = config.width
        self.img_in = QuantLinear(config.in_channels, width, bias=False)
        self.txt_in = QuantLinear(config.context, width, bias=False)
        self.time_in = Embedder(config.time, width, bias=False)
        self.guidance_in = Embedder(config.time, width, bias=False) if config.guidance else None
        self.double_stream_modulation_img = Modulation(width, 6, bias=False)
        self.double_stream_modulation_txt = Modulation(width, 6, bias=False)
        self.single_stream_modulation = Modulation(width, 3, bias=False)
        self.double_blocks = nn.ModuleList(_DoubleBlock(config) for _ in range(config.double_depth))
        self.single_blocks = nn.ModuleList(_SingleBlock(config) for _ in range(config.single_depth))
        self.final_layer = _FinalLayer(config)

    def forward(
        self, latents: Tensor, t: Tensor, txt: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """Predict the velocity of the flow.

        Args:
            latents: (B, in_channels, h, w), each pixel a token.
            t: (B,) flow time in [0, 1], 1 is noise.
            txt: (B, T, context) states of the text encoder.
            guidance: (B,) distilled guidance strength, where the model takes one.

        Returns:
            (B, out_channels, h, w).

        Raises:
            UsageError: guidance is given and the model takes none, or the other way round.
        """
        config, dtype = self.config, param_dtype(self)
        if (guidance is None) == config.guidance:
            raise UsageError(
                f"this model {'needs' if config.guidance else 'takes no'} guidance strength"
            )
        vector = self.time_in(timestep_embedding(t * 1000.0, config.time).to(dtype))
        if self.guidance_in is not None and guidance is not None:
            strength = timestep_embedding(guidance * 1000.0, config.time)
            vector = vector + self.guidance_in(strength.to(dtype))
        img_mod = self.double_stream_modulation_img(vector)
        txt_mod = self.double_stream_modulation_txt(vector)
        mod = self.single_stream_modulation(vector)
        height, width = latents.shape[2:]
        ids = torch.cat((_text_ids(txt.shape[1]), _picture_ids(height, width)))
        positions = rotary(ids, config.axes, config.theta, latents.device)
        img = self.img_in(latents.to(dtype).flatten(2).transpose(1, 2))
        txt = self.txt_in(txt.to(dtype))
        for block in self.double_blocks:
            img, txt = block(img, txt, img_mod, txt_mod, positions)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, mod, positions)
        out: Tensor = self.final_layer(x[:, txt.shape[1] :], vector)
        return out.transpose(1, 2).reshape(len(out), -1, height, width)


def _text_ids(length: int) -> Tensor:
    """Positions (0, 0, 0, index): (T, 4)."""
    return functional.pad(torch.arange(length, dtype=torch.float32)[:, None], (3, 0))


def _picture_ids(height: int, width: int) -> Tensor:
    """Positions (0, row, column, 0): (h w, 4)."""
    grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return functional.pad(torch.stack(grid, dim=-1).reshape(-1, 2).float(), (1, 1))
