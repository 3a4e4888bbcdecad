"""The Flux.1 transformer, named as Black Forest Labs name it.

Picture tokens (2x2 latent pixels each) and text tokens run side by side through `double_blocks`,
each with its own weights but one attention over both; then joined, text first, through
`single_blocks`. Widths, depths and the head width come from shapes: any img_in width (Fill, Canny,
Depth) is served.
Source: black-forest-labs/flux src/flux/model.py, math.py, modules/layers.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffquant.core.errors import UsageError
from diffquant.runtime.kernels import tokens
from diffquant.runtime.layers import QuantLinear
from diffquant.runtime.models.attention import (
    Positions,
    QkNorm,
    Stream,
    attend,
    feed_forward,
    gated,
    modulated,
    rotary,
)
from diffquant.runtime.models.facts import (
    Hyper,
    Shapes,
    count,
    number,
    param_dtype,
    rotary_axes,
    shape_of,
    tanh_gelu,
    timestep_embedding,
)

__all__ = [
    "Embedder",
    "Flux",
    "FluxConfig",
    "Modulation",
    "config_from",
    "image_ids",
    "in_range",
    "pack",
    "unpack",
]

_DEFAULT_AXES = (16, 56, 56)


@dataclass(frozen=True, slots=True)
class FluxConfig:
    """Sizes of a Flux transformer.

    Attributes:
        in_channels, out_channels: per token: latent channels times 4 (more for Fill and Control).
        context, vector: widths of T5 states and of the pooled CLIP state.
        time: width of the timestep sinusoids.
        guidance: whether the model takes a distilled guidance strength (dev) or not (schnell).
        axes: rotary widths of the three position axes; their sum is head_dim.
    """

    in_channels: int
    out_channels: int
    width: int
    hidden: int
    single_hidden: int
    head_dim: int
    context: int
    vector: int
    time: int
    double_depth: int
    single_depth: int
    guidance: bool
    axes: tuple[int, ...]
    theta: float
    eps: float


def config_from(shapes: Shapes, hyper: Hyper) -> FluxConfig:
    """Read sizes from keys; hyper: axes_dims_rope, theta, eps.

    Raises:
        ArchitectureError: the rotary axes do not fill a head.
    """
    width, in_channels = shape_of(shapes, "img_in.weight")
    (head_dim,) = shape_of(shapes, "double_blocks.0.img_attn.norm.query_norm.scale")
    axes = rotary_axes(hyper, "axes_dims_rope", _DEFAULT_AXES, head_dim)
    single = count(shapes, "single_blocks")
    linear2 = shape_of(shapes, "single_blocks.0.linear2.weight")[1] if single else width
    return FluxConfig(
        in_channels=in_channels,
        out_channels=shape_of(shapes, "final_layer.linear.weight")[0],
        width=width,
        hidden=shape_of(shapes, "double_blocks.0.img_mlp.0.weight")[0],
        single_hidden=linear2 - width,
        head_dim=head_dim,
        context=shape_of(shapes, "txt_in.weight")[1],
        vector=shape_of(shapes, "vector_in.in_layer.weight")[1],
        time=shape_of(shapes, "time_in.in_layer.weight")[1],
        double_depth=count(shapes, "double_blocks"),
        single_depth=single,
        guidance="guidance_in.in_layer.weight" in shapes,
        axes=axes,
        theta=number(hyper, "theta", 10000.0),
        eps=number(hyper, "eps", 1e-6),
    )


def pack(latents: Tensor) -> Tensor:
    """Fold 2x2 latent pixels into tokens: (B, C, h, w) to (B, h/2 * w/2, 4 C)."""
    batch, channels, height, width = latents.shape
    x = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `pack`; height and width in latent pixels."""
    batch, _, channels = tokens.shape
    x = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


def image_ids(height: int, width: int) -> Tensor:
    """Positions (0, row, column) of picture tokens: (h/2 * w/2, 3) float32; sizes in latents."""
    rows = torch.arange(height // 2, dtype=torch.float32)
    columns = torch.arange(width // 2, dtype=torch.float32)
    grid = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((torch.zeros_like(grid[0]), *grid), dim=-1).reshape(-1, 3)


class Embedder(nn.Module):
    """Two layers that make a vector of a timestep, a strength or a pooled text."""

    def __init__(self, before: int, width: int, *, bias: bool = True) -> None:
        """Declare the layers."""
        super().__init__()
        self.in_layer = QuantLinear(before, width, bias=bias)
        self.out_layer = QuantLinear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, before) to (B, width)."""
        out: Tensor = self.out_layer(functional.silu(self.in_layer(x)))
        return out


class Modulation(nn.Module):
    """What the timestep commands: shift, scale and gate, once or twice."""

    def __init__(self, width: int, count: int, *, bias: bool = True) -> None:
        """Declare the layer; `count` is 3 or 6."""
        super().__init__()
        self.lin = QuantLinear(width, count * width, bias=bias)
        self.count = count

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Rows of (shift, scale, gate), each (B, 1, width)."""
        out: Tensor = self.lin(functional.silu(vector))
        return out[:, None].chunk(self.count, dim=-1)


class _Attention(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.qkv = QuantLinear(config.width, 3 * config.width)
        self.norm = QkNorm(config.head_dim, config.eps)
        self.proj = QuantLinear(config.width, config.width)

    def heads(self, x: Tensor, shift: Tensor, scale: Tensor) -> Stream:
        """Queries, keys and values of tokens (B, L, width)."""
        found: Stream = self.norm(self.qkv(modulated(x, shift, scale, into=[self.qkv])))
        return found


class _DoubleBlock(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden
        self.img_mod, self.txt_mod = Modulation(width, 6), Modulation(width, 6)
        self.img_attn, self.txt_attn = _Attention(config), _Attention(config)
        gelu = nn.GELU(approximate="tanh")
        self.img_mlp = nn.Sequential(QuantLinear(width, hidden), gelu, QuantLinear(hidden, width))
        self.txt_mlp = nn.Sequential(QuantLinear(width, hidden), gelu, QuantLinear(hidden, width))

    def forward(
        self, img: Tensor, txt: Tensor, vector: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img_mod(vector), self.txt_mod(vector)  # shift, scale, gate; twice
        joined = attend(
            (self.txt_attn.heads(txt, *txt_mod[:2]), self.img_attn.heads(img, *img_mod[:2])),
            positions,
        )
        length = txt.shape[1]
        img = gated(img, img_mod[2], self.img_attn.proj(joined[:, length:]))
        img = gated(img, img_mod[5], _mlp(self.img_mlp, img, *img_mod[3:5]))
        txt = gated(txt, txt_mod[2], self.txt_attn.proj(joined[:, :length]))
        txt = gated(txt, txt_mod[5], _mlp(self.txt_mlp, txt, *txt_mod[3:5]))
        return img, in_range(txt)


def _mlp(layers: nn.Sequential, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    first, second = layers[0], layers[2]
    assert isinstance(first, QuantLinear)
    assert isinstance(second, QuantLinear)
    return feed_forward(first, second, modulated(x, shift, scale, into=[first]))


class _SingleBlock(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.single_hidden
        self.split = (3 * width, hidden)
        self.modulation = Modulation(width, 3)
        self.linear1 = QuantLinear(width, 3 * width + hidden)
        self.norm = QkNorm(config.head_dim, config.eps)
        self.linear2 = QuantLinear(width + hidden, width)

    def forward(self, x: Tensor, vector: Tensor, positions: Positions) -> Tensor:
        shift, scale, gate = self.modulation(vector)
        hidden = self.linear1(modulated(x, shift, scale, into=[self.linear1]))
        qkv, mlp = hidden.split(self.split, dim=-1)
        attended = attend((self.norm(qkv),), positions)
        both = tokens.gelu_behind(attended, mlp, self.linear2.takes(mlp))
        if both is None:
            both = torch.cat((attended, tanh_gelu(mlp)), dim=-1)
        return in_range(gated(x, gate, self.linear2(both)))


class _FinalLayer(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.linear = QuantLinear(config.width, config.out_channels)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), QuantLinear(config.width, 2 * config.width)
        )

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vector)[:, None].chunk(2, dim=-1)
        out: Tensor = self.linear(modulated(x, shift, scale))
        return out


def in_range(x: Tensor) -> Tensor:
    """Keep float16 activations finite: the text stream of dev leaves its range."""
    return x.clamp(-65504.0, 65504.0) if x.dtype == torch.float16 else x


class Flux(nn.Module):
    """The denoiser of Flux.1 dev, schnell and their relatives."""

    def __init__(self, config: FluxConfig) -> None:
        """Build the modules; weights are bound later."""
        super().__init__()
        self.config = config
        width = config.width
        self.img_in = QuantLinear(config.in_channels, width)
        self.txt_in = QuantLinear(config.context, width)
        self.time_in = Embedder(config.time, width)
        self.vector_in = Embedder(config.vector, width)
        self.guidance_in = Embedder(config.time, width) if config.guidance else None
        self.double_blocks = nn.ModuleList(_DoubleBlock(config) for _ in range(config.double_depth))
        self.single_blocks = nn.ModuleList(_SingleBlock(config) for _ in range(config.single_depth))
        self.final_layer = _FinalLayer(config)

    def forward(
        self,
        img: Tensor,
        t: Tensor,
        txt: Tensor,
        pooled: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity of the flow.

        Args:
            img: (B, L, in_channels) packed latents.
            t: (B,) flow time in [0, 1], 1 is noise.
            txt: (B, T, context) T5 states.
            pooled: (B, vector) pooled CLIP state.
            img_ids: (L, 3) positions, from `image_ids`; like those of the text, best on the CPU.
            txt_ids: (T, 3) positions, zeros.
            guidance: (B,) distilled guidance strength, where the model takes one.

        Returns:
            (B, L, out_channels).

        Raises:
            UsageError: guidance is given and the model takes none, or the other way round.
        """
        config, dtype = self.config, param_dtype(self)
        vector = self.time_in(timestep_embedding(t * 1000.0, config.time).to(dtype))
        if (guidance is None) == config.guidance:
            raise UsageError(
                f"this model {'needs' if config.guidance else 'takes no'} guidance strength"
            )
        if self.guidance_in is not None and guidance is not None:
            strength = timestep_embedding(guidance * 1000.0, config.time)
            vector = vector + self.guidance_in(strength.to(dtype))
        vector = vector + self.vector_in(pooled.to(dtype))
        ids = torch.cat((txt_ids, img_ids))
        positions = rotary(ids, config.axes, config.theta, img.device)
        img, txt = self.img_in(img.to(dtype)), self.txt_in(txt.to(dtype))
        for block in self.double_blocks:
            img, txt = block(img, txt, vector, positions)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, vector, positions)
        out: Tensor = self.final_layer(x[:, txt.shape[1] :], vector)
        return out
