"""Philox against Random123's published vectors, and noise against what A1111 documents."""

import numpy as np
import pytest
import torch

from diffquant.runtime.noise import NoiseSource, philox4x32

# DEShawResearch/random123 tests/kat_vectors, philox4x32 10: counter, key, output
VECTORS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "wanted"), VECTORS)
def test_philox_equals_the_published_vectors(counter, key, wanted):
    arrays = [np.array([word], np.uint32) for word in words(counter)]
    found = philox4x32(arrays, tuple(words(key)))
    assert [int(one[0]) for one in found] == words(wanted)


def test_philox_noise_is_what_a1111_documents_for_seed_0():
    # AUTOMATIC1111/stable-diffusion-webui@82a973c:modules/rng_philox.py, its docstring
    wanted = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    found = NoiseSource([0], "philox").draw((1, 3, 4))[0]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-6, rtol=0)


def test_streams_go_on_from_draw_to_draw_and_do_not_mix():
    source = NoiseSource([3, 2**63 + 7], "philox")
    first, second = source.draw((2, 4, 8, 8)), source.draw((2, 4, 8, 8))
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)
    alone = NoiseSource([2**63 + 7], "philox")
    assert torch.equal(alone.draw((1, 4, 8, 8)), first[1:])
    assert torch.equal(alone.draw((1, 4, 8, 8)), second[1:])


def test_philox_noise_is_normal():
    drawn = NoiseSource([1], "philox").draw((1, 100_000)).double()
    assert abs(float(drawn.mean())) < 0.02
    assert abs(float(drawn.std()) - 1) < 0.01
