"""Decoding and encoding in strips against doing it whole, for every autoencoder."""

import math

import pytest
import torch

from diffquant.convert.footprint.reach import CONV, DOUBLE, HALVE, POINT, Reach
from diffquant.core.errors import UsageError
from diffquant.runtime.layers import PackedLayer, PackedWeight
from diffquant.runtime.models import feature_map, taesd, vae_flux2, vae_kl, vae_qwen
from diffquant.runtime.strips import Decoding, decode_in, encode_in

KL = vae_kl.VaeConfig(
    encoder=(
        vae_kl.VaeLevel(((8, 8),), resamples=True),
        vae_kl.VaeLevel(((8, 12), (12, 12)), resamples=True),
        vae_kl.VaeLevel(((12, 12),), resamples=False),
    ),
    decoder=(
        vae_kl.VaeLevel(((12, 8),), resamples=False),
        vae_kl.VaeLevel(((12, 12), (12, 12)), resamples=True),
        vae_kl.VaeLevel(((12, 12),), resamples=True),
    ),
    encoder_attention=True,
    decoder_attention=True,
    pixels=3,
    latents=4,
    moments=8,
    quant_conv=True,
    post_quant_conv=True,
    groups=4,
    eps=1e-6,
    scaling_factor=1.0,
    shift_factor=0.0,
)
QWEN = vae_qwen.QwenVaeConfig(
    encoder=tuple(
        vae_qwen.VaeLayer(*row) for row in ((6, 6), (6, 6, True), (6, 8), (8, 8, True), (8, 8))
    ),
    decoder=(
        (vae_qwen.VaeLayer(8, 8), vae_qwen.VaeLayer(8, 4, resamples=True)),
        (vae_qwen.VaeLayer(4, 8), vae_qwen.VaeLayer(8, 4, resamples=True)),
        (vae_qwen.VaeLayer(4, 6),),
    ),
    pixels=3,
    latents=5,
    mean=(0.0,) * 5,
    std=(1.0,) * 5,
)


def tiny(*, pool=0, fold=1):
    layer, wide = taesd.TinyLayer, (8, 8)
    encoder = (
        layer("0", "conv", (3, 8)),
        layer("1", "block", wide),
        layer("2", "conv", wide, stride=2, bias=False),
        layer("3", "block", wide, pool=pool),
        layer("4", "conv", wide, stride=2, bias=False),
        layer("5", "block", (8, 12)),
        layer("6", "conv", (12, 4)),
    )
    decoder = (
        layer("1", "conv", (4, 8)),
        layer("2", "relu"),
        layer("3", "block", wide, pool=pool),
        layer("4", "double"),
        layer("5", "conv", wide, bias=False),
        layer("6", "block", (8, 12)),
        layer("7", "double"),
        layer("8", "conv", (12, 8)),
        layer("9", "block", wide),
        layer("10", "conv", (8, 3)),
    )
    return taesd.TaesdConfig(encoder, decoder, False, 4, fold, 4 * fold)


def filled(model, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        for one in model.parameters():
            # Means far from zero: statistics of a strip must not pass for the map's.
            one.copy_(0.5 + 0.3 * random(*one.shape))
            one.abs_()
        for layer in model.modules():
            if isinstance(layer, PackedLayer):
                shape = layer.logical_shape
                layer.bind(PackedWeight.of(random(*shape) / math.sqrt(math.prod(shape[1:]))))
    return model.eval()


MODELS = {
    "kl": lambda: vae_kl.AutoencoderKL(KL),
    "flux2": lambda: vae_flux2.AutoencoderFlux2(vae_flux2.VaeFlux2Config(KL, 16, 8, 1e-4)),
    "qwen": lambda: vae_qwen.QwenVae(QWEN),
    "tiny": lambda: taesd.Taesd(tiny()),
    "tiny that pools": lambda: taesd.Taesd(tiny(pool=8, fold=2)),
}
# Rows of the latents; 0: as many as keep a strip small, here fewer than a picture has.
CASES = [("strips", 0), ("strips", 1), ("strips", 3), ("host", 0), ("host", 2)]


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return filled(MODELS[request.param]())


@pytest.fixture(autouse=True)
def small_strips(monkeypatch):
    monkeypatch.setattr("diffquant.convert.footprint.reach.STRIP_NBYTES", 20_000)


def latents(model, height, width, batch=2):
    generator = torch.Generator().manual_seed(1)
    return 1.5 * torch.randn(batch, model.config.latents, height, width, generator=generator)


def pictures(model, height, width, batch=2):
    factor = model.config.factor
    shape = (batch, 3, factor * height, factor * width)
    # Brighter downwards: no strip has the map's statistics.
    slope = torch.linspace(-1, 1, shape[2])[:, None]
    return 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(2)) + slope


def off(found, wanted):
    """Largest difference, in the largest number that was wanted."""
    return float((found.float() - wanted.float()).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("size", [(7, 4), (5, 9)], ids=str)
@pytest.mark.parametrize(("mode", "rows"), CASES)
def test_strips_decode_what_the_whole_decodes(model, mode, rows, size):
    z = latents(model, *size)
    kept = z.clone()
    with torch.no_grad():
        wanted = model.decode(z)
    found = decode_in(model, z, Decoding(mode, rows))
    assert found.shape == wanted.shape
    assert off(found, wanted) < 1e-5
    assert torch.equal(z, kept)


@pytest.mark.parametrize("size", [(7, 4), (5, 9)], ids=str)
@pytest.mark.parametrize(("mode", "rows"), CASES)
def test_strips_encode_what_the_whole_encodes(model, mode, rows, size):
    pixels = pictures(model, *size)
    kept = pixels.clone()
    with torch.no_grad():
        wanted = model.encode(pixels)
    found = encode_in(model, pixels, Decoding(mode, rows))
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert off(one, other) < 1e-5
    assert torch.equal(pixels, kept)


def test_a_mode_of_whole_is_the_model_s_own(model):
    z, pixels = latents(model, 3, 3), pictures(model, 3, 3)
    with torch.no_grad():
        assert torch.equal(decode_in(model, z, Decoding()), model.decode(z))
        assert torch.equal(encode_in(model, pixels, Decoding())[0], model.encode(pixels)[0])


@pytest.mark.parametrize("mode", ["strips", "host"])
def test_half_precision_loses_no_more_in_strips(model, mode):
    z = latents(model, 6, 5)
    with torch.no_grad():
        exact = model.decode(z)
        half = model.to(torch.bfloat16)
        whole = half.decode(z.bfloat16())
    strips = decode_in(half, z.bfloat16(), Decoding(mode, 1))
    assert strips.dtype == torch.bfloat16
    lost = [float((one.float() - exact).square().mean().sqrt()) for one in (strips, whole)]
    assert lost[0] <= 1.5 * lost[1]


@pytest.mark.parametrize("name", ["kl", "tiny"])
def test_sides_that_halve_to_odd_ones_are_encoded_alike(name):
    model = filled(MODELS[name]())
    pixels = torch.randn(1, 3, 30, 22, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = model.encode(pixels)[0]
    assert off(encode_in(model, pixels, Decoding("strips", 1))[0], wanted) < 1e-5


def test_a_group_norm_far_from_zero_keeps_its_digits():
    """A sum of squares would lose them: a mean a thousand times the deviation."""
    norm = torch.nn.GroupNorm(2, 4)
    x = 1000 + torch.randn(2, 4, 40, 6, generator=torch.Generator().manual_seed(4))
    plan = feature_map.StripPlan(torch.device("cpu"), host=False, rows=3, latent_rows=40)
    whole = feature_map.FeatureMap.of(x, plan)
    copied = whole.map(torch.Tensor.clone, 4, measured=True)
    with torch.no_grad():
        wanted = norm.double()(x.double())
        norm.float()
        for one in (whole, copied):
            assert float((one.group_norm(norm)(x) - wanted).abs().max()) < 1e-3


def test_strips_of_less_than_no_rows_are_refused():
    with pytest.raises(UsageError, match="strips of -1 rows"):
        Decoding("strips", -1)


REACHES = {
    "pixel": (POINT, torch.nn.Identity()),
    "convolution": (CONV, torch.nn.Conv2d(1, 1, 3, padding=1)),
    "doubling": (
        DOUBLE,
        torch.nn.Sequential(torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(1, 1, 3, padding=1)),
    ),
    "halving, far sides": (
        HALVE,
        torch.nn.Sequential(torch.nn.ZeroPad2d((0, 1, 0, 1)), torch.nn.Conv2d(1, 1, 3, stride=2)),
    ),
    "halving, both sides": (
        Reach(2, down=2, ceil=True),
        torch.nn.Conv2d(1, 1, 3, stride=2, padding=1),
    ),
}


@pytest.mark.parametrize("height", [1, 2, 5, 8])
@pytest.mark.parametrize("name", REACHES)
def test_rows_needed_are_those_that_change_the_output(name, height):
    reach, layer = REACHES[name]
    if name.startswith("halving") and height == 1:
        pytest.skip("nothing to halve")
    x = torch.randn(1, 1, height, 3, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = layer(x)
        assert wanted.shape[2] == reach.size(height)
        for first in range(wanted.shape[2]):
            for last in range(first + 1, wanted.shape[2] + 1):
                start, stop, skipped = reach.needed(first, last, height)
                found = layer(x[:, :, start:stop])[:, :, skipped : skipped + last - first]
                assert torch.allclose(found, wanted[:, :, first:last], atol=1e-6)
