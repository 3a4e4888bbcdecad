"""The philox stream against torch.randn on a GPU."""

import pytest
import torch

from diffquant.runtime.noise import NoiseSource

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("seed", [0, 42, 2**40 + 3])
@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (1, 16, 96, 96), (1, 4, 7, 5)])
def test_philox_equals_cuda(seed, shape):
    generator = torch.Generator("cuda").manual_seed(seed)
    source = NoiseSource([seed], "philox")
    for _ in range(3):  # a stream goes on
        wanted = torch.randn(shape, generator=generator, device="cuda").cpu()
        # near a radius of 0 float32 on the GPU rounds the logarithm's argument to 1
        torch.testing.assert_close(source.draw(shape), wanted, atol=1e-3, rtol=1e-5)
