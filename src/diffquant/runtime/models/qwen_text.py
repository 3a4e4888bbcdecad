"""The Qwen language models as text encoders: the text half of Qwen2.5-VL, and Qwen3.

A decoder of pre-normed blocks with grouped queries, rotary positions and a gated feed-forward; each
token sees those before it. The two differ in what their files hold: Qwen2.5 has biases on q, k and
v, Qwen3 norms every head of q and k instead. Qwen2.5-VL counts positions along three axes, which
for text alone are the same number three times: plain rotary positions.

Pipelines read inner states, so `layers` says which, counted as transformers counts `hidden_states`:
0 is the embedding, i what block i - 1 left, the last one is normed. Blocks that nobody reads are
not run.
Source: huggingface/transformers 5.23.0 models/qwen2_5_vl/modeling_qwen2_5_vl.py,
models/qwen3/modeling_qwen3.py, utils/output_capturing.py (what the last state is).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.runtime.layers import QuantEmbedding, QuantLinear
from diffquant.runtime.models.facts import (
    Hyper,
    Shapes,
    count,
    number,
    param_dtype,
    require,
    shape_of,
)

__all__ = ["QwenText", "QwenTextConfig", "config_from", "visible_keys"]

# Positions that are angles times the position, unscaled; "mrope" is that for text alone.
_PLAIN_ROPE = ("default", "mrope")


@dataclass(frozen=True, slots=True)
class QwenTextConfig:
    """Sizes of a Qwen language model.

    Attributes:
        heads, groups: heads of q, and of k and v; each of the latter serves heads / groups of q.
        biased: whether q, k and v have a bias (Qwen2.5).
        normed: whether heads of q and k are normed (Qwen3).
    """

    vocabulary: int
    width: int
    hidden: int
    depth: int
    heads: int
    groups: int
    head_dim: int
    biased: bool
    normed: bool
    theta: float
    eps: float


def _theta(hyper: Hyper) -> float:
    """Base of the rotary angles; transformers 4 keeps it beside `rope_scaling`, 5 inside."""
    stated: Mapping[str, Any] = hyper.get("rope_parameters") or hyper.get("rope_scaling") or {}
    require({"rope_type": stated.get("rope_type", stated.get("type"))}, "rope_type", _PLAIN_ROPE)
    return number(stated, "rope_theta", number(hyper, "rope_theta", 1e6))


def config_from(shapes: Shapes, hyper: Hyper) -> QwenTextConfig:
    """Read sizes from keys.

    Hyper: rms_norm_eps, rope_theta or rope_parameters, and for models without q_norm
    num_attention_heads.

    Raises:
        ArchitectureError: heads that do not fill q or k, or a field the runtime does not implement.
    """
    require(hyper, "hidden_act", ("silu",))
    require(hyper, "use_sliding_window", (False,))
    attention = "model.layers.0.self_attn"
    q, k = (shape_of(shapes, f"{attention}.{one}_proj.weight")[0] for one in "qk")
    normed = f"{attention}.q_norm.weight" in shapes
    if normed:
        (head_dim,) = shape_of(shapes, f"{attention}.q_norm.weight")
    else:
        head_dim = q // max(1, int(number(hyper, "num_attention_heads", 28)))
    if head_dim < 2 or head_dim % 2 or q % head_dim or k % head_dim or q % k:
        raise ArchitectureError(
            f"q has {q} rows and k has {k}: expected whole heads of {head_dim}, an even number; "
            "num_attention_heads says how many there are"
        )
    vocabulary, width = shape_of(shapes, "model.embed_tokens.weight")
    return QwenTextConfig(
        vocabulary=vocabulary,
        width=width,
        hidden=shape_of(shapes, "model.layers.0.mlp.gate_proj.weight")[0],
        depth=count(shapes, "model.layers"),
        heads=q // head_dim,
        groups=k // head_dim,
        head_dim=head_dim,
        biased=f"{attention}.q_proj.bias" in shapes,
        normed=normed,
        theta=_theta(hyper),
        eps=number(hyper, "rms_norm_eps", 1e-6),
    )


def _angles(length: int, config: QwenTextConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 to length - 1: float32 (length, head_dim / 2) each.

    Angles are rounded to float32 where transformers rounds them, as the models were trained.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.theta**exponent
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2) of the last dimension of (B, heads, T, head_dim)."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def visible_keys(mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Which keys a query sees: bool (B or 1, 1, T, T).

    A token sees what counts before it: padding behind a text sees the text, which some models read.
    Padding before a text would see nothing and turn into NaN, and NaN times an attention of zero is
    NaN: it sees itself.
    """
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if mask is None:
        return causal[None, None]
    seen = causal & mask[:, None, None, :]
    itself = torch.eye(length, dtype=torch.bool, device=device)
    return seen | (itself & ~seen.any(-1, keepdim=True))


class _Attention(nn.Module):
    def __init__(self, config: QwenTextConfig) -> None:
        super().__init__()
        self.config = config
        width, inner = config.width, config.heads * config.head_dim
        grouped = config.groups * config.head_dim
        self.q_proj = QuantLinear(width, inner, bias=config.biased)
        self.k_proj = QuantLinear(width, grouped, bias=config.biased)
        self.v_proj = QuantLinear(width, grouped, bias=config.biased)
        self.o_proj = QuantLinear(inner, width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.eps) if config.normed else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.eps) if config.normed else None

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, heads, T, head_dim), (B, groups, T, head_dim) twice
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        q, k = _rotate(q, *positions), _rotate(k, *positions)
        shared = self.config.heads // self.config.groups
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        y = scaled_dot_product_attention(q, k, v, attn_mask=visible)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out


class _FeedForward(nn.Module):
    def __init__(self, config: QwenTextConfig) -> None:
        super().__init__()
        self.gate_proj = QuantLinear(config.width, config.hidden, bias=False)
        self.up_proj = QuantLinear(config.width, config.hidden, bias=False)
        self.down_proj = QuantLinear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Block(nn.Module):
    def __init__(self, config: QwenTextConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.eps)
        self.mlp = _FeedForward(config)

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions, visible)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _Stack(nn.Module):
    def __init__(self, config: QwenTextConfig) -> None:
        super().__init__()
        self.embed_tokens = QuantEmbedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=config.eps)


class QwenText(nn.Module):
    """The language model without its output head, which encoders do not need."""

    def __init__(self, config: QwenTextConfig) -> None:
        """Build the modules; weights are bound later."""
        super().__init__()
        self.config = config
        self.model = _Stack(config)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, layers: Sequence[int] = (-1,)
    ) -> tuple[Tensor, ...]:
        """Encode token ids.

        Args:
            ids: (B, T) int64, padded on either side.
            mask: (B, T) bool, False at padding; None: no padding.
            layers: states to return, 0 (the embedding) to depth (the last, normed), or negative to
                count from the end.

        Returns:
            one (B, T, width) per entry of `layers`; what stands at padding before a text means
            nothing.

        Raises:
            UsageError: a state the model does not have.
        """
        config, stack, dtype = self.config, self.model, param_dtype(self)
        last = config.depth
        wanted = [layer + last + 1 if layer < 0 else layer for layer in layers]
        if unknown := [one for one, at in zip(layers, wanted, strict=True) if not 0 <= at <= last]:
            raise UsageError(
                f"this text encoder has states 0 to {last}, asked for {unknown}: "
                "it is not the one this model was trained with"
            )
        length = ids.shape[1]
        cos, sin = (one.to(ids.device) for one in _angles(length, config))
        visible = visible_keys(mask, length, ids.device)
        x: Tensor = stack.embed_tokens(ids, dtype)
        states = {0: x}
        for index in range(max(wanted)):
            x = stack.layers[index](x, (cos, sin), visible)
            states[index + 1] = x
        if last in wanted:
            states[last] = stack.norm(x)
        return tuple(states[at] for at in wanted)
