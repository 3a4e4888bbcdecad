"""Memory arithmetic against the models themselves: every live tensor of a run is counted.

Models run at full width on torch's meta device, which holds no numbers, so that a peak of
gigabytes costs nothing. Attention counts as tiled kernels do it: its output, no matrix of scores.
"""

import json
import lzma
import weakref
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.links import translate
from diffquant.convert.architectures.parts import PARTS
from diffquant.convert.detect import detect, detect_part
from diffquant.convert.footprint.decode import decode_nbytes
from diffquant.convert.footprint.moments import peak
from diffquant.convert.footprint.strips import strip_moments
from diffquant.convert.footprint.transformer import row_for, transformer_moments
from diffquant.convert.footprint.unet import unet_moments
from diffquant.convert.footprint.vae import decode_moments
from diffquant.core.dtypes import STORAGE
from diffquant.core.tensors import TensorSpec
from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels import KERNELS
from diffquant.runtime.layers import PackedLayer, PackedWeight
from diffquant.runtime.loading import MODELS
from diffquant.runtime.models import flux, unet, vae_kl
from diffquant.runtime.models.feature_map import StripPlan
from diffquant.runtime.strips import Decoding, decode_in

DATA = Path(__file__).parents[1] / "data"
DTYPE = torch.bfloat16
TOKENS = 4096  # a picture of 1024 x 1024 in patches of 16 pixels


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are alive, except of those it is told to ignore.

    Attributes:
        elsewhere: storages that stand for another device's.
    """

    elsewhere = ()

    def __init__(self, ignored=()):
        super().__init__()
        self.now = self.peak = 0
        self.ignored = [one.untyped_storage() for one in ignored]
        self.seen = {id(one): None for one in self.ignored}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor):
                self._note(one.untyped_storage())
        return out

    def _note(self, storage):
        key, nbytes = id(storage), storage.nbytes()
        if key in self.seen or any(storage is one for one in self.elsewhere):
            return

        def gone(_):
            if self.seen.pop(key, None) is not None:
                self.now -= nbytes

        self.seen[key] = weakref.ref(storage, gone)
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def tiled_attention(query, key, value, *_, **__):
    batch, heads, tokens, _ = query.shape
    shape = (batch, tokens, heads, value.shape[-1])  # as the kernels lay it out
    return torch.empty(shape, dtype=query.dtype, device=query.device).transpose(1, 2)


@pytest.fixture
def peak_of(monkeypatch):
    """Bytes alive at the worst moment of a call, beyond the tensors it is given."""
    monkeypatch.setattr(functional, "scaled_dot_product_attention", tiled_attention)

    def run(model, given, call):
        held = [*model.parameters(), *model.buffers(), *given]
        for layer in model.modules():
            if isinstance(layer, PackedLayer):
                held += layer.bound().segments[0].parts.values()
        with torch.no_grad(), Live(held) as live:
            call()
        return live.peak

    return run


def meta(*shape, dtype=DTYPE):
    return torch.empty(*shape, dtype=dtype, device="meta")


def shapes_of(name):
    found = json.loads(lzma.decompress((DATA / "manifests.json.xz").read_bytes()))[name]
    return {key: tuple(shape) for key, shape in found.items()}


def built(make, dtype=DTYPE):
    with torch.device("meta"):
        model = make().to(dtype).eval()
    for layer in model.modules():
        if isinstance(layer, PackedLayer):
            layer.bind(PackedWeight.of(meta(*layer.logical_shape, dtype=dtype)))
    return model


UNETS = [
    ("sd15.unet.ldm", {}, 512, 2),
    ("sd15.unet.ldm", {}, 1024, 1),
    ("sd21.unet.ldm", {"attention_head_dim": (5, 10, 20, 20)}, 768, 2),
    ("sdxl-base.unet.ldm", {"attention_head_dim": (5, 10, 20)}, 1024, 2),
    ("sdxl-refiner.unet.ldm", {"attention_head_dim": (6, 12, 24, 24)}, 1024, 2),
    ("sdxs-512.unet.ldm", {}, 512, 1),
]


@pytest.mark.parametrize(("name", "hyper", "pixels", "batch"), UNETS)
def test_unet_activations_are_those_of_the_runtime(peak_of, name, hyper, pixels, batch):
    shapes, side = shapes_of(name), pixels // 8
    model = built(lambda: unet.UNet(unet.config_from(shapes, hyper)))
    width = next(shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight"))
    x, context = meta(batch, 4, side, side), meta(batch, 77, width)
    label = shapes.get("label_emb.0.0.weight")
    extra = None if label is None else meta(batch, label[1])
    t = meta(batch, dtype=torch.float32)
    counted = peak_of(model, (x, context), lambda: model(x, t, context, extra))
    found = peak(unet_moments(shapes, height=side, width=side, batch=batch, itemsize=2))
    assert found.nbytes == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [("sd.vae-kl-f8.ldm", 4, (512, 512)), ("flux.vae.original", 16, (768, 1344))],
)
def test_decoding_is_that_of_the_runtime(peak_of, name, channels, size):
    shapes, (height, width) = shapes_of(name), (side // 8 for side in size)
    model = built(lambda: vae_kl.AutoencoderKL(vae_kl.config_from(shapes, {})))
    z = meta(1, channels, height, width)
    counted = peak_of(model, (z,), lambda: model.decode(z))
    found = peak(decode_moments("vae_kl", shapes, height=height, width=width, itemsize=2))
    assert found.nbytes == pytest.approx(counted, rel=0.01)


STRIPS = [
    ("vae_kl", "sd.vae-kl-f8.ldm", 4, (320, 448), torch.float32),
    ("vae_kl", "flux.vae.original", 16, (512, 640), torch.bfloat16),
    ("vae_flux2", "flux2.vae.original", 32, (256, 512), torch.bfloat16),
    ("vae_qwen", "qwen-image.vae.diffusers", 16, (320, 448), torch.float32),
    ("vae_qwen", "qwen-image.vae.diffusers", 16, (384, 512), torch.bfloat16),
    ("taesd", "taesd.decoder.original", 4, (768, 640), torch.bfloat16),
]


@pytest.mark.parametrize("mode", ["strips", "host"])
@pytest.mark.parametrize(("kind", "name", "channels", "size", "dtype"), STRIPS)
def test_decoding_in_strips_takes_what_is_said(
    peak_of, monkeypatch, kind, name, channels, size, dtype, mode
):
    shapes, (height, width) = shapes_of(name), (side // 8 for side in size)
    row = MODELS[kind]
    model = built(lambda: row.module(row.config_from(shapes, {})), dtype)
    z = meta(1, channels, height, width, dtype=dtype)
    if kind == "vae_flux2":  # of the loop: 2x2 pixels in one
        z = meta(1, 4 * channels, height // 2, width // 2, dtype=dtype)
    if mode == "host":

        def empty(plan, shape, dtype):
            with _disable_current_modes():
                made = meta(*shape, dtype=dtype)
            Live.elsewhere.append(made.untyped_storage())
            return made

        monkeypatch.setattr(Live, "elsewhere", [])
        monkeypatch.setattr(StripPlan, "store", property(lambda plan: plan.device))
        monkeypatch.setattr(StripPlan, "empty", empty)
    counted = peak_of(model, (z,), lambda: decode_in(model, z, Decoding(mode)))
    part = "vae_tiny_decoder" if kind == "taesd" else kind
    found = peak(
        strip_moments(
            part,
            shapes,
            height=height,
            width=width,
            itemsize=dtype.itemsize,
            host=mode == "host",
        )
    )
    assert found.nbytes == pytest.approx(counted, rel=0.02)


def test_flux_activations_are_those_of_the_runtime(peak_of, monkeypatch):
    def early(key):
        first, number, *_ = f"{key}..".split(".")
        return not first.endswith("_blocks") or number == "0"

    shapes = {k: v for k, v in shapes_of("flux-dev.transformer.original").items() if early(k)}
    model = built(lambda: flux.Flux(flux.config_from(shapes, {})))
    tables = tuple(meta(TOKENS + 512, 64, dtype=torch.float32) for _ in range(2))
    monkeypatch.setattr(flux, "rotary", lambda *_: tables)  # made on the CPU, and small
    img, txt, one = meta(1, TOKENS, 64), meta(1, 512, 4096), meta(1, dtype=torch.float32)
    ids = meta(TOKENS, 3), meta(512, 3)
    counted = peak_of(
        model, (img, txt, *tables), lambda: model(img, one, txt, meta(1, 768), *ids, one)
    )
    found = peak(
        transformer_moments(
            row_for("flux", shapes, ours=True),
            shapes,
            image_tokens=TOKENS,
            text_tokens=512,
            batch=1,
            itemsize=2,
        )
    )
    assert found.nbytes == pytest.approx(counted, rel=0.01)


_TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
}


def stored(fmt, shape):
    """Zeros in the stored parts of a weight."""
    for part in FORMATS[fmt].parts:
        row, size = STORAGE[part.dtype], list(part.shape(shape))
        if row.is_block:
            size[-1] = size[-1] // row.block_size * row.block_nbytes
        yield part.name, torch.zeros(size, dtype=_TORCH.get(part.dtype, torch.uint8))


@pytest.mark.parametrize("compute", ["BF16", "F32"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_decoding_a_weight_takes_what_the_reference_takes(fmt, compute):
    shape = (256, 2048)
    parts = dict(stored(fmt, shape))
    with Live(parts.values()) as live:
        KERNELS[fmt](parts, shape, _TORCH[compute])
    found = decode_nbytes(fmt, 256 * 2048, compute=compute)
    assert live.peak <= found * 1.02 + 4096
    assert found <= live.peak * 1.1


# Class, arguments of a shallow model of full width, batch, text tokens, inputs.
DENOISERS = {
    "chroma": (
        "ChromaTransformer2DModel",
        {"num_layers": 1, "num_single_layers": 2},
        (1, 512),
        lambda b, t: {
            "hidden_states": meta(b, TOKENS, 64),
            "encoder_hidden_states": meta(b, t, 4096),
            "timestep": meta(b),
            "img_ids": meta(TOKENS, 3),
            "txt_ids": meta(t, 3),
        },
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {"num_layers": 1, "num_single_layers": 2},
        (1, 512),
        lambda b, t: {
            "hidden_states": meta(b, TOKENS, 128),
            "encoder_hidden_states": meta(b, t, 15360),
            "timestep": meta(b),
            "img_ids": meta(TOKENS, 4),
            "txt_ids": meta(t, 4),
            "guidance": meta(b),
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "num_layers": 2,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "sample_size": 128,
            "pos_embed_max_size": 192,
            "caption_projection_dim": 1536,
            "out_channels": 16,
        },
        (2, 333),
        lambda b, t: {
            "hidden_states": meta(b, 16, 128, 128),
            "encoder_hidden_states": meta(b, t, 4096),
            "pooled_projections": meta(b, 2048),
            "timestep": meta(b),
        },
    ),
    "sd3.5_medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 3,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "sample_size": 128,
            "pos_embed_max_size": 384,
            "caption_projection_dim": 1536,
            "out_channels": 16,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
        (2, 333),
        lambda b, t: {
            "hidden_states": meta(b, 16, 128, 128),
            "encoder_hidden_states": meta(b, t, 4096),
            "pooled_projections": meta(b, 2048),
            "timestep": meta(b),
        },
    ),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        {"num_layers": 2},
        (1, 512),
        lambda b, t: {
            "hidden_states": meta(b, TOKENS, 64),
            "encoder_hidden_states": meta(b, t, 3584),
            "timestep": meta(b),
            "img_shapes": [(1, 64, 64)],
        },
    ),
    "z_image": (
        "ZImageTransformer2DModel",
        {"n_layers": 2, "n_refiner_layers": 1},
        (1, 512),
        lambda b, t: {
            "x": [meta(16, 1, 128, 128)] * b,
            "t": meta(b),
            "cap_feats": [meta(t, 2560)] * b,
        },
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {"hidden_size": 2304, "num_layers": 2, "num_refiner_layers": 1, "cap_feat_dim": 2304},
        (1, 256),
        lambda b, t: {
            "hidden_states": meta(b, 16, 128, 128),
            "timestep": meta(b),
            "encoder_hidden_states": meta(b, t, 2304),
            "encoder_attention_mask": torch.ones(b, t, dtype=torch.bool),
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            "num_layers": 2,
            "sample_size": 128,
            "caption_channels": 4096,
            "out_channels": 8,
            "use_additional_conditions": False,
        },
        (2, 300),
        lambda b, t: {
            "hidden_states": meta(b, 4, 128, 128),
            "encoder_hidden_states": meta(b, t, 4096),
            "timestep": meta(b),
        },
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        {"num_mmdit_layers": 1, "num_single_dit_layers": 2, "pos_embed_max_size": 9216},
        (2, 264),
        lambda b, t: {
            "hidden_states": meta(b, 4, 128, 128),
            "encoder_hidden_states": meta(b, t - 8, 2048),
            "timestep": meta(b),
        },
    ),
    "wan_14b": (
        "WanTransformer3DModel",
        {"num_layers": 2},
        (1, 512),
        lambda b, t: {
            "hidden_states": meta(b, 16, 1, 128, 128),
            "encoder_hidden_states": meta(b, t, 4096),
            "timestep": meta(b),
        },
    ),
    "wan_1.3b": (
        "WanTransformer3DModel",
        {"num_layers": 2, "num_attention_heads": 12, "ffn_dim": 8960},
        (1, 512),
        lambda b, t: {
            "hidden_states": meta(b, 16, 1, 128, 128),
            "encoder_hidden_states": meta(b, t, 4096),
            "timestep": meta(b),
        },
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {"num_layers": 2},
        (1, 256),
        lambda b, t: {
            "hidden_states": meta(b, TOKENS, 128),
            "encoder_hidden_states": meta(b, t, 4096),
            "timestep": meta(b),
            "encoder_attention_mask": meta(b, t),
            "num_frames": 4,
            "height": 32,
            "width": 32,
        },
    ),
    "krea2": (
        "Krea2Transformer2DModel",
        {"num_layers": 2},
        (1, 512),
        lambda b, t: {
            "hidden_states": meta(b, TOKENS, 64),
            "encoder_hidden_states": meta(b, t, 12, 2560),
            "timestep": meta(b),
            "position_ids": meta(TOKENS + t, 3),
        },
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        {"num_layers": 1, "num_single_layers": 2, "num_refiner_layers": 1},
        (1, 256),
        lambda b, t: {
            "hidden_states": meta(b, 16, 1, 128, 128),
            "encoder_hidden_states": meta(b, t, 4096),
            "timestep": meta(b),
            "encoder_attention_mask": meta(b, t),
            "pooled_projections": meta(b, 768),
            "guidance": meta(b),
        },
    ),
}


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Mismatch dtype:UserWarning")
@pytest.mark.parametrize("name", DENOISERS)
def test_transformer_activations_are_those_of_diffusers(peak_of, oracle, name):
    kind, arguments, (batch, text), call = DENOISERS[name]
    model = built(lambda: getattr(oracle.diffusers, kind)(**arguments))
    if name == "qwen_image":  # a table of complex numbers, which .to(bfloat16) would spoil
        model.pos_embed = type(model.pos_embed)(10000, axes_dim=[16, 56, 56], scale_rope=True)
    inputs = call(batch, text)
    given = [one for one in tree_leaves(inputs) if isinstance(one, torch.Tensor)]
    counted = peak_of(model, given, lambda: model(**inputs))
    shapes = {key: tuple(one.shape) for key, one in model.state_dict().items()}
    match = detect({key: TensorSpec(key, "BF16", shape) for key, shape in shapes.items()})
    part = match.parts[0]
    component = ARCHITECTURES[match.architecture].component("denoiser", part.kind)
    shapes = part.shapes
    if component.links is not None:
        shapes = translate(component.rules(shapes, part.layout, "canonical"), shapes)
    row = row_for(part.kind, shapes)
    found = peak(
        transformer_moments(
            row, shapes, image_tokens=TOKENS, text_tokens=text, batch=batch, itemsize=2
        )
    )
    assert row.measured
    assert found.nbytes == pytest.approx(counted, rel=0.03)
    thumb = row_for("a kind nobody measured", shapes)
    rough = peak(
        transformer_moments(
            thumb, shapes, image_tokens=TOKENS, text_tokens=text, batch=batch, itemsize=2
        )
    )
    assert 0.9 * counted < rough.nbytes < 2.3 * counted


LEVELS = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
DECODERS = [
    ("sd.vae-kl-f8.diffusers", "AutoencoderKL", {**LEVELS, "latent_channels": 4}, 4),
    ("flux.vae.original", "AutoencoderKL", {**LEVELS, "latent_channels": 16}, 16),
    ("flux2.vae.diffusers", "AutoencoderKLFlux2", {}, 32),
    ("qwen-image.vae.diffusers", "AutoencoderKLQwenImage", {}, 16),
    ("wan21.vae.original", "AutoencoderKLWan", {}, 16),
    ("taesd.decoder.original", "AutoencoderTiny", {}, 4),
    ("taesd.vae.diffusers", "AutoencoderTiny", {}, 4),
]


@pytest.mark.oracle
@pytest.mark.parametrize(("name", "kind", "arguments", "channels"), DECODERS)
def test_decoding_is_that_of_diffusers(peak_of, oracle, name, kind, arguments, channels):
    model = built(lambda: getattr(oracle.diffusers, kind)(**arguments))
    shapes = {key: TensorSpec(key, "BF16", shape) for key, shape in shapes_of(name).items()}
    part = detect_part(shapes).parts[0]
    component = PARTS[part.kind].components[0]
    local = translate(component.rules(part.shapes, part.layout, "canonical"), part.shapes)
    height, width = 96, 168
    frames = (1,) if part.kind == "vae_qwen" else ()
    z = meta(1, channels, *frames, height, width)
    counted = peak_of(model, (z,), lambda: model.decode(z))
    found = peak(decode_moments(part.kind, local, height=height, width=width, itemsize=2))
    assert found.nbytes == pytest.approx(counted, rel=0.01)
