"""Triton's token kernels under its interpreter, to what models do without them: JSON on stdout.

Run by test_token_kernels.py in a process of its own, since the interpreter is chosen when triton
is imported. Values are largest absolute differences in float32, of numbers of about one.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.nn import functional

from diffquant.runtime.kernels import rows as reference
from diffquant.runtime.kernels.triton import rows, tokens
from diffquant.runtime.models import attention


def stream(batch, length, heads, width, norm):
    """Heads as a model has them: views into one matrix product's result."""
    qkv = torch.randn(batch, length, 3 * heads * width)
    norms = [norm(width), norm(width)]
    for one in norms:
        for parameter in one.parameters():
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    q, k, v = qkv.reshape(batch, length, 3, heads, width).permute(2, 0, 3, 1, 4)
    return attention.Stream(q, k, v, *norms)


def norms(width):
    return attention.RmsNorm(width, 1e-6)


def torch_norms(width):
    return torch.nn.RMSNorm(width, eps=1e-5)


def angles(*shape):
    angle = torch.rand(shape) * 6
    return angle.cos(), angle.sin()


def served(*given):
    tokens.rotated_heads(*given)
    return True


def heads(streams, positions):
    """What attention gets, joined by the kernel and by torch."""
    attention.tokens.serves = lambda _x: True
    attention.tokens.rotated_heads = served
    found = attention._together(streams, positions)
    wanted = attention._separate(streams, positions)
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def modulated(shape, steps, width=None):
    """`shape` of tokens, `steps` rows of shift and scale; a cut of a wider product, or whole."""
    commands = torch.randn(shape[0], steps, 2 * shape[2])
    shift, scale = commands.chunk(2, dim=-1)
    x = torch.randn(*shape[:2], width or shape[2])[..., : shape[2]] * 3 + 1
    found = tokens.modulated(x, shift, scale, 1e-6)
    wanted = functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
    return float((found - wanted).abs().max())


def behind(shape, width):
    """GELU of a cut of a wider product, behind `width` columns or none."""
    first = torch.randn(*shape[:2], width + 8)[..., :width]
    x = torch.randn(*shape[:2], shape[2] + 5)[..., 5:] * 3
    wanted = torch.cat((first, functional.gelu(x, approximate="tanh")), dim=-1)
    return float((tokens.gelu_behind(first, x) - wanted).abs().max())


def gated(shape):
    """Halves of a wider product."""
    x, gate = torch.randn(*shape[:2], 2 * shape[2]).chunk(2, dim=-1)
    return float((tokens.gelu_gated(x, gate) - x * functional.gelu(gate)).abs().max())


def rows_of(name, kind, rotation):
    """Codes and scales of what came before, fused: to the reference of the same numbers.

    Sums and exponentials differ in their last bits, so a number between two codes may get the other
    one: the largest distance in steps of a row, and the share of codes that differ.
    """
    x, batch = torch.randn(2, 5, 512) * 2 + 1, 2
    shift, scale = torch.randn(batch, 1, 1024).chunk(2, dim=-1)
    if name == "modulated":
        wanted = functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        q, size = rows.modulated_rows(x, shift, scale, 1e-6, kind, rotation)
    elif name == "normed":
        weight, bias = torch.randn(2, 512)
        wanted = functional.layer_norm(x, (512,), weight, bias, 1e-5)
        q, size = rows.normed_rows(x, weight, bias, 1e-5, kind, rotation)
    elif name == "gated":
        value, gate = torch.randn(2, 5, 1024).chunk(2, dim=-1)
        wanted = value * functional.gelu(gate)
        q, size = rows.gated_rows(value, gate, kind, rotation)
    else:
        first, more = (x[..., :256], x[..., 256:]) if name == "behind" else (x[..., :0], x)
        wanted = torch.cat((first, functional.gelu(more, approximate="tanh")), dim=-1)
        way = rows.Way(4, held=rotation > 0 or kind == "fp8")
        q, size = rows.activated_rows(first, more, kind, rotation, way)
    wanted_q, wanted_size = reference.quantize_rows(wanted.flatten(0, 1), kind, rotation=rotation)
    off = float((size / wanted_size - 1).abs().max())
    different = (q.float() != wanted_q.float()).float().mean()
    gap = (q.float() * size - wanted_q.float() * wanted_size).abs() / wanted_size
    return [off, float(different), float(gap.max())]


@torch.no_grad()
def main():
    torch.manual_seed(0)
    results = {
        "one stream": heads([stream(1, 5, 3, 16, norms)], angles(5, 8)),
        "two streams, batch": heads(
            [stream(2, 3, 2, 32, norms), stream(2, 6, 2, 32, norms)], angles(9, 16)
        ),
        "torch's norms, tables of four": heads(
            [stream(2, 7, 2, 64, torch_norms)], angles(2, 1, 7, 32)
        ),
        "tables that broadcast": heads([stream(2, 4, 1, 16, norms)], angles(1, 1, 4, 8)),
        "nine heads": heads([stream(1, 1, 9, 16, norms)], angles(1, 8)),
        "modulated": modulated((2, 5, 96), 1),
        "modulated by token": modulated((2, 5, 48), 5),
        "modulated, cut": modulated((1, 3, 100), 1, width=160),
        "gelu": behind((2, 5, 100), 0),
        "gelu behind": behind((2, 3, 2100), 60),
        "gelu gated": gated((2, 3, 2100)),
    }
    results["rows"] = {
        f"{name} {kind} {rotation}": rows_of(name, kind, rotation)
        for name in ("modulated", "normed", "gated", "alone", "behind")
        for kind, rotation in (("fp8", 0), ("int8", 0), ("int8", 256), ("int8", 16))
    }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
