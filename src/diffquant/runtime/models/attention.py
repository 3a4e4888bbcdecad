"""What models share: attention, and of diffusion transformers rotary positions and norms.

Queries and keys are rotated in neighbouring pairs, pair i of an axis by position / theta^(2i /
width): so a product of two of them knows only how far apart they are, along each axis.
Source: arXiv:2104.09864; several axes: black-forest-labs/flux src/flux/math.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffquant.runtime.kernels import tokens
from diffquant.runtime.kernels.rows import RowKind
from diffquant.runtime.layers import Activations, QuantLinear
from diffquant.runtime.models.facts import tanh_gelu

__all__ = [
    "SCORES_NBYTES",
    "Positions",
    "QkNorm",
    "RmsNorm",
    "Stream",
    "attend",
    "attention",
    "feed_forward",
    "gated",
    "modulated",
    "rotary",
    "taken_by",
]

SCORES_NBYTES = 256 << 20  # of a matrix of scores that is held
_SCORE_NBYTES = 8  # torch computes scores and their softmax in float32 where no kernel is fused
_TABLES = 8  # of positions that are kept: text, picture and both of the last sizes asked for
_BLOCK = 64  # queries and keys on which a kernel is asked whether it serves
_KERNELS = (
    torch.backends.cuda.can_use_flash_attention,
    torch.backends.cuda.can_use_efficient_attention,
)  # cuDNN's own comes after the plain one where these two do not serve

Positions = tuple[Tensor, Tensor]  # cosines and sines, from `rotary`


def rotary(
    ids: Tensor, axes: tuple[int, ...], theta: float, device: torch.device | None = None
) -> Positions:
    """Cosines and sines for positions (..., L, axes): float32 (..., L, head_dim / 2) each.

    Angles are computed in float64 on the CPU: float32 loses the fine ones, and MPS has no float64.
    The steps of a picture ask for the same tables again and get them again: keep `ids` on the CPU,
    so that looking at them waits for nothing.

    Args:
        ids: positions, float32.
        axes: rotary widths of the position axes; their sum is head_dim.
        theta: base of the angles.
        device: where the tables go; None: where `ids` are.
    """
    raw = ids.detach().cpu().float().contiguous().numpy().tobytes()
    return _tables(raw, tuple(ids.shape), axes, theta, device or ids.device)


@functools.lru_cache(maxsize=_TABLES)
def _tables(
    raw: bytes, shape: tuple[int, ...], axes: tuple[int, ...], theta: float, device: torch.device
) -> Positions:
    # Made outside of a caller's inference mode: later callers may want gradients through them.
    with torch.inference_mode(mode=False):
        ids = torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(shape).double()
        angles = []
        for axis, width in enumerate(axes):
            exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
            angles.append(ids[..., axis, None] / theta**exponent)
        angle = torch.cat(angles, dim=-1)
        return angle.cos().float().to(device), angle.sin().float().to(device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last dimension of (B, heads, L, head_dim)."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    first, second = pairs.unbind(-1)
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class Stream(NamedTuple):
    """Queries, keys and values of one stream of tokens, before their norms.

    Attributes:
        q, k, v: (B, heads, L, head_dim).
        query_norm, key_norm: of one head.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    query_norm: RmsNorm | nn.RMSNorm
    key_norm: RmsNorm | nn.RMSNorm


def attend(streams: Sequence[Stream], positions: Positions, mask: Tensor | None = None) -> Tensor:
    """Attention over the tokens of all streams, one after the other, with positions rotated in.

    Args:
        streams: in the order of their positions.
        positions: of every token; they broadcast against (B, heads, L, head_dim / 2).
        mask: bool, False where a key is nobody's; broadcasts against (B, heads, L, L).

    Returns:
        (B, L, heads * head_dim).
    """
    q, k, v = _together(streams, positions) or _separate(streams, positions)
    return attention(q, k, v, mask).transpose(1, 2).flatten(2)


def _separate(streams: Sequence[Stream], positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, join, rotate: (B, heads, L, head_dim) each."""
    q = _joined([one.query_norm(one.q) for one in streams])
    k = _joined([one.key_norm(one.k) for one in streams])
    v = _joined([one.v for one in streams])
    return _rotate(q, *positions), _rotate(k, *positions), v


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _together(
    streams: Sequence[Stream], positions: Positions
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`_separate` by one kernel for each stream's queries and keys; None where that is not served.

    Results lie in memory as (B, L, heads, head_dim), so that what attention returns is cut and
    flattened without a copy.
    """
    if not tokens.serves(streams[0].q):
        return None
    batch, heads, _, width = streams[0].q.shape
    length = sum(one.q.shape[2] for one in streams)
    alone = len(streams) == 1
    room = [one.new_empty(batch, length, heads, width).transpose(1, 2) for one in streams[0][:3]]
    q, k, v = room[0], room[1], None if alone else room[2]
    first = 0
    for one in streams:
        last = first + one.q.shape[2]
        places = (positions[0][..., first:last, :], positions[1][..., first:last, :])
        (q_eps, q_scale), (k_eps, k_scale) = _norm_of(one.query_norm), _norm_of(one.key_norm)
        cut = slice(first, last)
        out = (q[:, :, cut], k[:, :, cut], None if v is None else v[:, :, cut])
        given = (one.q, one.k, None if alone else one.v)
        if not tokens.rotated_heads(given, (q_scale, k_scale), places, (q_eps, k_eps), out):
            return None
        first = last
    return q, k, streams[0].v if v is None else v


def _norm_of(norm: RmsNorm | nn.RMSNorm) -> tuple[float, Tensor]:
    """Epsilon and scale."""
    if isinstance(norm, RmsNorm):
        return norm.eps, norm.scale
    assert norm.eps is not None
    return norm.eps, norm.weight


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot product attention whose matrix of scores stays within SCORES_NBYTES.

    Fused kernels hold no such matrix. Where none serves (MPS, or a dtype or head width that a CUDA
    device has none for), queries are cut: each finds what it would have found among all.

    Args:
        q: (B, heads, L, head_dim).
        k: (B, heads, S, head_dim).
        v: like k.
        mask: bool, False where a key is nobody's; broadcasts against (B, heads, L, S).

    Returns:
        (B, heads, L, head_dim).
    """
    rows = max(1, SCORES_NBYTES // (q.shape[0] * q.shape[1] * k.shape[2] * _SCORE_NBYTES))
    if rows >= q.shape[2] or _is_fused(q.device, q.dtype, q.shape[-1], mask is not None):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    parts = []
    for first in range(0, q.shape[2], rows):
        cut = mask
        if mask is not None and mask.shape[-2] > 1:
            cut = mask[..., first : first + rows, :]
        queries = q[:, :, first : first + rows]
        parts.append(functional.scaled_dot_product_attention(queries, k, v, attn_mask=cut))
    return torch.cat(parts, dim=2)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_fused(device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool) -> bool:
    """Whether a kernel serves that holds no matrix of scores.

    Asked on one block of queries: what decides is dtype, head width, mask and the device. A
    constant to torch.compile, which need not look inside.
    """
    return _fused(device, dtype, head_dim, masked)


@functools.cache
def _fused(device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool) -> bool:
    if device.type in ("cpu", "meta"):  # the CPU's flash kernel takes every dtype; meta: no numbers
        return True
    if device.type != "cuda":
        return False
    one = torch.empty(1, 1, _BLOCK, head_dim, dtype=dtype, device=device)
    mask = torch.ones(1, 1, _BLOCK, _BLOCK, dtype=torch.bool, device=device) if masked else None
    asked = torch.backends.cuda.SDPAParams(one, one, one, mask, 0.0, False, False)
    return any(serves(asked) for serves in _KERNELS)


@overload
def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float = ...) -> Tensor: ...
@overload
def modulated(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = ..., *, into: Sequence[QuantLinear]
) -> Activations: ...
def modulated(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, into: Sequence[QuantLinear] = ()
) -> Activations:
    """Layer norm without parameters, then the affine map that the timestep commands.

    `shift` and `scale` are (B, 1, width), or (B, L, width) as `x` is. `into` are the layers that
    take the result: what all of them would make of it first is part of the same pass.
    """
    kind = taken_by(into, x)
    for asked in (kind, None) if kind is not None else (None,):
        found = tokens.modulated(x, shift, scale, eps, asked)
        if found is not None:
            return found
    return functional.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def taken_by(layers: Sequence[QuantLinear], x: Tensor) -> RowKind | None:
    """What all of some layers would quantize rows like `x`'s to; see QuantLinear.takes."""
    kinds = {layer.takes(x) for layer in layers}
    return kinds.pop() if len(kinds) == 1 else None


def feed_forward(first: QuantLinear, second: QuantLinear, x: Activations) -> Tensor:
    """Two layers and GELU, by tanh, between them: (..., K) to (..., N)."""
    hidden = first(x)
    rows = tokens.activated(hidden, second.takes(hidden))
    y: Tensor = second(tanh_gelu(hidden) if rows is None else rows)
    return y


def gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """`x` + `gate` * `y` in one pass over memory, rounded once."""
    return torch.addcmul(x, gate, y)


class RmsNorm(nn.Module):
    """Root mean square norm, its scale named as Black Forest Labs name it."""

    def __init__(self, width: int, eps: float) -> None:
        """Declare the scale; its values are bound later."""
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension, in float32."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.scale


class QkNorm(nn.Module):
    """Norms of queries and keys, head by head."""

    def __init__(self, head_dim: int, eps: float) -> None:
        """Declare the two norms."""
        super().__init__()
        self.query_norm = RmsNorm(head_dim, eps)
        self.key_norm = RmsNorm(head_dim, eps)

    def forward(self, qkv: Tensor) -> Stream:
        """Split (B, L, 3 width) into heads; the norms are applied where they are attended to."""
        heads = qkv.reshape(*qkv.shape[:2], 3, -1, len(self.query_norm.scale))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        return Stream(q, k, v, self.query_norm, self.key_norm)
