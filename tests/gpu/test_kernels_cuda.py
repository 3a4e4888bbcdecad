"""Decoding on a GPU equals decoding on the CPU. Imports only what that machine has: torch, numpy.

Run by `scripts/test --gpu`; parts are random bytes, so no codec (and no numba) is needed.
"""

import math

import numpy as np
import pytest
import torch

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels import KERNELS
from diffquant.runtime.layers import PackedWeight, QuantLinear, Segment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
SHAPE = (64, 512)
TYPED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}
TYPED["F8_E5M2"] = "float8_e5m2"


def random_parts(name):
    generator = np.random.default_rng(7)
    parts = {}
    for part in FORMATS[name].parts:
        shape = part.shape(SHAPE)
        if part.dtype == "F32":
            values = generator.uniform(0.1, 1, shape).astype(np.float32)
            parts[part.name] = torch.from_numpy(np.asarray(values))
        elif part.dtype == "I8":
            parts[part.name] = torch.from_numpy(generator.integers(-127, 128, shape, np.int8))
        elif part.dtype in TYPED:
            values = torch.from_numpy(generator.standard_normal(shape).astype(np.float32))
            parts[part.name] = values.to(getattr(torch, TYPED[part.dtype]))
        elif FORMATS[name].is_padded:
            raw = generator.integers(100, 140, shape, np.uint8)  # exponents near 2**0
            parts[part.name] = torch.from_numpy(raw)
        else:
            nbytes = FORMATS[name].nbytes(SHAPE) if len(FORMATS[name].parts) == 1 else shape[0]
            raw = generator.integers(0, 100, nbytes, np.uint8)  # small bytes: finite f16 scales
            rows = SHAPE[0] if len(FORMATS[name].parts) == 1 else 1
            parts[part.name] = torch.from_numpy(raw).reshape(rows, -1)
            if name == "nf4":
                parts[part.name] = parts[part.name].reshape(-1)
    return parts


@pytest.mark.parametrize("name", [name for name in FORMATS if name in KERNELS])
def test_the_same_numbers_on_both_devices(name):
    if name.startswith(("iq1", "iq2", "iq3")):
        pytest.importorskip("gguf")  # carries their grids
    parts = random_parts(name)
    here = KERNELS[name](parts, SHAPE, torch.float32)
    there = KERNELS[name]({k: v.cuda() for k, v in parts.items()}, SHAPE, torch.float32)
    assert math.isfinite(float(here.abs().max()))
    assert torch.equal(here, there.cpu())


def test_a_packed_layer_moves_and_computes():
    layer = QuantLinear(SHAPE[1], SHAPE[0], bias=False)
    layer.bind(PackedWeight((Segment("q8_0", SHAPE, random_parts("q8_0")),)))
    x = torch.randn(4, SHAPE[1])
    expected = layer(x)
    torch.backends.cuda.matmul.allow_tf32 = False
    found = layer.cuda()(x.cuda()).cpu()
    assert float((found - expected).norm() / expected.norm()) < 1e-5
