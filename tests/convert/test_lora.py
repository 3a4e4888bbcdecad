"""LoRA names and shapes: what a file holds, and which weights of a base those are."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.binding import bind
from diffquant.convert.detect import detect, to_canonical
from diffquant.convert.lora.match import looks_like, match_lora
from diffquant.convert.lora.parse import factors, parse_lora
from diffquant.core.errors import ArchitectureError, MalformedFile
from diffquant.core.tensors import TensorSpec

MANIFESTS = Path(__file__).parents[3] / "shared" / "data" / "manifests"

UNET = {  # LDM names: one level with attention, its downsampler, the middle, the way up
    "time_embed.0.weight": (32, 8),
    "input_blocks.0.0.weight": (8, 4, 3, 3),
    "input_blocks.1.0.in_layers.0.weight": (8,),
    "input_blocks.1.0.in_layers.2.weight": (8, 8, 3, 3),
    "input_blocks.1.0.emb_layers.1.weight": (8, 32),
    "input_blocks.1.1.proj_in.weight": (8, 8, 1, 1),
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (8, 8),
    "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.weight": (8, 8),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 768),
    "input_blocks.2.0.op.weight": (8, 8, 3, 3),
    "input_blocks.3.0.in_layers.0.weight": (8,),
    "input_blocks.3.0.in_layers.2.weight": (16, 8, 3, 3),
    "middle_block.1.transformer_blocks.0.ff.net.2.weight": (16, 64),
    "output_blocks.0.0.in_layers.0.weight": (24,),
    "output_blocks.0.0.skip_connection.weight": (16, 24, 1, 1),
    "output_blocks.0.1.conv.weight": (16, 16, 3, 3),
    "out.2.weight": (4, 8, 3, 3),
}
CLIP = {
    "text_model.embeddings.token_embedding.weight": (100, 8),
    "text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8),
    "text_model.encoder.layers.0.self_attn.out_proj.weight": (8, 8),
    "text_model.encoder.layers.0.mlp.fc1.weight": (32, 8),
}
FLUX = {
    "img_in.weight": (8, 16),
    "double_blocks.0.img_attn.qkv.weight": (24, 8),
    "double_blocks.0.img_attn.proj.weight": (8, 8),
    "double_blocks.0.txt_attn.qkv.weight": (24, 8),
    "single_blocks.0.linear1.weight": (56, 8),
    "single_blocks.0.linear2.weight": (8, 40),
    "single_blocks.0.modulation.lin.weight": (24, 8),
    "final_layer.adaLN_modulation.1.weight": (16, 8),
}
T5 = {"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}
SD15_PARTS = {"denoiser": UNET, "text_encoder": CLIP}
FLUX_PARTS = {"denoiser": FLUX, "text_encoder": CLIP, "text_encoder_2": T5}


class Source:
    """A checkpoint in memory: key -> array, or key -> (dtype, shape) of zeros."""

    def __init__(self, tensors, metadata=None, path="some.safetensors"):
        self.path = Path(path)
        self.container = "safetensors"
        self.metadata = metadata or {}
        self.configs = {}
        self.tensors = tensors
        kinds = {"float32": "F32", "float16": "F16", "int64": "I64", "uint16": "BF16"}
        self.specs = {}
        for key, value in tensors.items():
            if isinstance(value, tuple | list):
                self.specs[key] = TensorSpec(key, value[0], tuple(value[1]))
            else:
                self.specs[key] = TensorSpec(key, kinds[value.dtype.name], value.shape)

    def read(self, key, rows=None):
        value = self.tensors[key]
        if isinstance(value, tuple | list):
            return np.ones(self.specs[key].nbytes, np.uint8)
        value = value[slice(*rows)] if rows else value
        return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def pair(down, up, shape, rank=2, alpha=None):
    """The keys of one layer for a weight of `shape`, of zeros."""
    inner = shape[1:]
    tail = (1, 1) if len(inner) > 1 else ()
    found = {down: ("F16", (rank, *inner)), up: ("F16", (shape[0], rank, *tail))}
    if alpha is not None:
        found[down.split(".lora_down")[0] + ".alpha"] = np.array(alpha, np.float32)
    return found


def kohya(name, shape, **rest):
    return pair(f"{name}.lora_down.weight", f"{name}.lora_up.weight", shape, **rest)


def peft(name, shape, adapter="", **rest):
    return pair(f"{name}.lora_A{adapter}.weight", f"{name}.lora_B{adapter}.weight", shape, **rest)


def matched(tensors, architecture, parts):
    found = match_lora(parse_lora(Source(tensors)).layers, ARCHITECTURES[architecture], parts)
    return [(t.part, t.key, t.rows, t.up_rows) for t in found.targets], found


ATTN1 = "input_blocks.1.1.transformer_blocks.0.attn1"
SD15_NAMES = {
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": f"{ATTN1}.to_q.weight",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0": (
        f"{ATTN1}.to_out.0.weight"
    ),
    "lora_unet_down_blocks_0_attentions_0_proj_in": "input_blocks.1.1.proj_in.weight",
    "lora_unet_down_blocks_0_resnets_0_conv1": "input_blocks.1.0.in_layers.2.weight",
    "lora_unet_down_blocks_0_resnets_0_time_emb_proj": "input_blocks.1.0.emb_layers.1.weight",
    "lora_unet_down_blocks_0_downsamplers_0_conv": "input_blocks.2.0.op.weight",
    "lora_unet_down_blocks_1_resnets_0_conv1": "input_blocks.3.0.in_layers.2.weight",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2": (
        "middle_block.1.transformer_blocks.0.ff.net.2.weight"
    ),
    "lora_unet_up_blocks_0_resnets_0_conv_shortcut": "output_blocks.0.0.skip_connection.weight",
    "lora_unet_up_blocks_0_upsamplers_0_conv": "output_blocks.0.1.conv.weight",
    "lycoris_conv_in": "input_blocks.0.0.weight",
}


@pytest.mark.parametrize("name", SD15_NAMES)
def test_kohya_names_of_a_unet_find_their_weight(name):
    key = SD15_NAMES[name]
    targets, found = matched(kohya(name, UNET[key]), "sd15", SD15_PARTS)
    assert targets == [("denoiser", key, None, None)]
    assert (found.matched, found.unmatched, found.shape_mismatch) == (1, (), ())


DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
DOTTED = {
    f"unet.{DOWN}.to_q": f"{ATTN1}.to_q.weight",
    f"base_model.model.{DOWN}.to_q": f"{ATTN1}.to_q.weight",
    f"unet.base_model.model.{DOWN}.to_q": f"{ATTN1}.to_q.weight",
    f"{DOWN}.to_out.0": f"{ATTN1}.to_out.0.weight",
    f"diffusion_model.{ATTN1}.to_q": f"{ATTN1}.to_q.weight",
    "unet.conv_out": "out.2.weight",
}


@pytest.mark.parametrize("adapter", ["", ".default", ".style_1"])
@pytest.mark.parametrize("name", DOTTED)
def test_dotted_names_of_a_unet_find_their_weight(name, adapter):
    key = DOTTED[name]
    targets, _ = matched(peft(name, UNET[key], adapter), "sd15", SD15_PARTS)
    assert targets == [("denoiser", key, None, None)]


@pytest.mark.parametrize(
    ("stem", "key"),
    [
        (f"{DOWN}.processor.to_q_lora", f"{ATTN1}.to_q.weight"),
        (f"{DOWN}.processor.to_out_lora", f"{ATTN1}.to_out.0.weight"),
        (f"unet.{DOWN}.to_q.lora", f"{ATTN1}.to_q.weight"),
        (f"unet.{DOWN}.processor.to_out.0.lora", f"{ATTN1}.to_out.0.weight"),
    ],
)
def test_older_diffusers_suffixes_of_a_unet(stem, key):
    tensors = pair(f"{stem}.down.weight", f"{stem}.up.weight", UNET[key])
    assert matched(tensors, "sd15", SD15_PARTS)[0] == [("denoiser", key, None, None)]


LAYER = "encoder.layers.0.self_attn"


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_te_text_model_encoder_layers_0_self_attn_{}.lora_down.weight", "lora_up"),
        ("lora_te1_text_model_encoder_layers_0_self_attn_{}.lora_down.weight", "lora_up"),
        (f"text_encoder.text_model.{LAYER}.{{}}.lora_A.weight", "lora_B"),
        (f"text_encoder.{LAYER}.{{}}.lora_A.weight", "lora_B"),  # transformers 5
        (f"base_model.model.text_model.{LAYER}.{{}}.lora_A.weight", "lora_B"),
        (f"text_encoder.text_model.{LAYER}.{{}}.lora_linear_layer.down.weight", "layer.up"),
    ],
)
@pytest.mark.parametrize("module", ["q_proj", "out_proj"])
def test_names_of_a_clip_encoder(down, up, module):
    down = down.format(module)
    up = down.replace("lora_down", up).replace("lora_A", up).replace("layer.down", up)
    targets, _ = matched(pair(down, up, (8, 8)), "sd15", SD15_PARTS)
    assert targets == [("text_encoder", f"text_model.{LAYER}.{module}.weight", None, None)]


def test_oldest_diffusers_names_of_a_clip_encoder():
    stem = f"text_encoder.text_model.{LAYER}.to_out_lora"
    targets, _ = matched(
        pair(f"{stem}.down.weight", f"{stem}.up.weight", (8, 8)), "sd15", SD15_PARTS
    )
    assert targets == [("text_encoder", f"text_model.{LAYER}.out_proj.weight", None, None)]


@pytest.mark.parametrize("prefix", ["lora_te2_", "lora_te3_"])
def test_t5_is_the_second_encoder_of_flux_in_either_count(prefix):
    tensors = kohya(f"{prefix}encoder_block_0_layer_0_SelfAttention_q", (8, 8))
    [target], _ = matched(tensors, "flux1", FLUX_PARTS)
    assert target[:2] == ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q.weight")


QKV, LINEAR1 = "double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"
FLUX_NAMES = [
    ("transformer_blocks.0.attn.to_q", (8, 8), QKV, (0, 8)),
    ("transformer_blocks.0.attn.to_v", (8, 8), QKV, (16, 24)),
    (
        "transformer_blocks.0.attn.add_k_proj",
        (8, 8),
        "double_blocks.0.txt_attn.qkv.weight",
        (8, 16),
    ),
    ("transformer_blocks.0.attn.to_out.0", (8, 8), "double_blocks.0.img_attn.proj.weight", None),
    ("single_transformer_blocks.0.attn.to_k", (8, 8), LINEAR1, (8, 16)),
    ("single_transformer_blocks.0.proj_mlp", (32, 8), LINEAR1, (24, 56)),
    ("single_transformer_blocks.0.proj_out", (8, 40), "single_blocks.0.linear2.weight", None),
    ("x_embedder", (8, 16), "img_in.weight", None),
    ("double_blocks.0.img_attn.qkv", (24, 8), QKV, None),
    ("single_blocks.0.linear1", (56, 8), LINEAR1, None),
]


@pytest.mark.parametrize(("name", "shape", "key", "rows"), FLUX_NAMES)
@pytest.mark.parametrize("style", ["transformer.", "diffusion_model.", "", "lora_unet_"])
def test_flux_names_find_rows_of_fused_weights(name, shape, key, rows, style):
    if style == "lora_unet_":
        tensors = kohya(style + name.replace(".", "_"), shape)
    else:
        tensors = peft(style + name, shape)
    assert matched(tensors, "flux1", FLUX_PARTS)[0] == [("denoiser", key, rows, None)]


def test_reordered_rows_become_two_targets():
    # Diffusers' norm_out.linear is (scale, shift), BFL's adaLN_modulation.1 (shift, scale).
    targets, found = matched(peft("transformer.norm_out.linear", (16, 8)), "flux1", FLUX_PARTS)
    key = "final_layer.adaLN_modulation.1.weight"
    assert targets == [("denoiser", key, (8, 16), (0, 8)), ("denoiser", key, (0, 8), (8, 16))]
    assert found.matched == 1


def test_misfits_are_sorted_by_cause():
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    tensors = {
        **kohya(name, (8, 2048)),
        **kohya("lora_unet_input_blocks_9_0_in_layers_2", (8, 8, 3, 3)),
        **kohya("lora_te2_text_model_encoder_layers_0_mlp_fc1", (32, 8)),
    }
    targets, found = matched(tensors, "sd15", SD15_PARTS)
    assert targets == []
    assert found.shape_mismatch == (
        (name, "it is for a weight of shape (8, 2048), the model has (8, 768)"),
    )
    assert [why for _, why in found.unmatched] == [
        "the denoiser has no such layer",
        "the model has no text_encoder_2",
    ]


def test_a_kernel_of_another_size_does_not_fit():
    tensors = kohya("lora_unet_down_blocks_0_resnets_0_conv1", (8, 8, 1, 1))
    assert len(matched(tensors, "sd15", SD15_PARTS)[1].shape_mismatch) == 1


def test_matrix_and_1x1_convolution_are_the_same():
    tensors = kohya("lora_unet_input_blocks_1_1_proj_in", (8, 8))
    assert len(matched(tensors, "sd15", SD15_PARTS)[0]) == 1


def test_two_names_of_one_weight_are_not_added_twice():
    names = ("lora_unet_conv_out", "lora_unet_out_2")
    tensors = {k: v for name in names for k, v in kohya(name, (4, 8, 3, 3)).items()}
    targets, found = matched(tensors, "sd15", SD15_PARTS)
    assert len(targets) == 1
    assert found.unmatched == ((names[1], f"{names[0]} already means the same weight"),)


def test_an_underscored_name_of_two_weights_is_not_guessed():
    parts = {"denoiser": {**UNET, "a.b_c.weight": (8, 8), "a_b.c.weight": (8, 8)}}
    _, found = matched(kohya("lora_unet_a_b_c", (8, 8)), "sd15", parts)
    assert found.unmatched == (("lora_unet_a_b_c", "the name means more than one weight"),)
    assert len(matched(peft("unet.a.b_c", (8, 8)), "sd15", parts)[0]) == 1


@pytest.mark.parametrize(
    ("alpha", "value"),
    [
        (np.array(8, np.float16), 8.0),
        (np.array([3], np.int64), 3.0),
        (np.array(0x4080, np.uint16), 4.0),  # bfloat16
        (np.array(0.5, np.float32), 0.5),
    ],
)
def test_alpha_of_any_dtype(alpha, value):
    tensors = {**kohya("lora_unet_conv_in", (8, 4, 3, 3), rank=4), "lora_unet_conv_in.alpha": alpha}
    [layer] = parse_lora(Source(tensors)).layers
    assert (layer.alpha, layer.rank, layer.scale, layer.kind) == (value, 4, value / 4, "conv")


def test_missing_alpha_means_rank():
    [layer] = parse_lora(Source(peft("unet.conv_in", (8, 4), rank=4))).layers
    assert (layer.alpha, layer.scale, layer.kind) == (None, 1.0, "linear")


def test_alpha_of_peft_metadata():
    config = {
        "unet.lora_alpha": 2,
        "unet.alpha_pattern": {"conv_out": 12},
        "unet.use_rslora": True,
    }
    tensors = {
        **peft("unet.conv_in", (8, 4), rank=4),
        **peft("unet.conv_out", (4, 8), rank=4),
        **peft("text_encoder.x", (4, 8), rank=4),
    }
    source = Source(tensors, {"lora_adapter_metadata": json.dumps(config)})
    scales = {layer.name: layer.scale for layer in parse_lora(source).layers}
    assert scales == {"unet.conv_in": 1.0, "unet.conv_out": 6.0, "text_encoder.x": 1.0}


def test_alpha_of_the_config_beside_a_peft_file(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8, "r": 4}')
    tensors = peft("base_model.model.conv_in", (8, 4), rank=4)
    source = Source(tensors, path=tmp_path / "adapter_model.safetensors")
    assert parse_lora(source).layers[0].scale == 2.0


def test_factors_are_read_in_their_own_shape():
    down = np.arange(24, dtype=np.float16).reshape(2, 3, 2, 2)
    up = np.arange(8, dtype=np.float32).reshape(4, 2, 1, 1)
    source = Source({"lora_unet_a.lora_down.weight": down, "lora_unet_a.lora_up.weight": up})
    found = factors(bind(source), parse_lora(source).layers[0])
    assert [one.dtype for one in found] == [np.float32, np.float32]
    np.testing.assert_array_equal(found[0], down)
    np.testing.assert_array_equal(found[1], up)
    assert all(one.flags.owndata or one.base.flags.owndata for one in found)
    up[0] = np.nan
    with pytest.raises(MalformedFile, match="NaN or infinity"):
        factors(bind(source), parse_lora(source).layers[0])


HALVES = {"lora_down.weight": (2, 8), "lora_up.weight": (8, 2)}
OTHERS = {
    "DoRA": {**HALVES, "dora_scale": (8, 1)},
    "LoHa": {
        f"hada_w{n}_{side}": shape for n in "12" for side, shape in (("a", (8, 2)), ("b", (2, 8)))
    },
    "LoKr": {"lokr_w1": (2, 2), "lokr_w2": (4, 4)},
    "OFT": {"oft_blocks": (4, 2, 2)},
    "IA3": {"weight": (8,), "on_input": ()},
    "Tucker": {
        "lora_down.weight": (2, 8, 1, 1),
        "lora_up.weight": (8, 2, 1, 1),
        "lora_mid.weight": (2, 2, 3, 3),
    },
    "full difference": {"diff": (8, 8), "diff_b": (8,)},
    "LoRA with a bias": {"lora_A.weight": (2, 8), "lora_B.weight": (8, 2), "lora_B.bias": (8,)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_adapters_are_refused_by_name(what):
    tensors = {f"lora_unet_a.{end}": ("F16", shape) for end, shape in OTHERS[what].items()}
    with pytest.raises(ArchitectureError, match=f"is .*{what}.*; only LoRA is supported yet"):
        parse_lora(Source(tensors))


def test_two_kinds_in_one_layer_are_malformed():
    tensors = {**kohya("lora_unet_a", (8, 8)), "lora_unet_a.lokr_w1": ("F16", (2, 2))}
    with pytest.raises(MalformedFile, match="parts of LoRA and LoKr in one layer"):
        parse_lora(Source(tensors))


def test_numbered_layers_without_a_name_are_refused():
    with pytest.raises(ArchitectureError, match="numbered layers"):
        parse_lora(Source(pair("unet:0:down", "unet:0:up", (8, 8))))


def test_a_file_without_lora_is_refused():
    with pytest.raises(ArchitectureError, match=r"no LoRA in it \(first tensor: conv_in.weight\)"):
        parse_lora(Source({"conv_in.weight": ("F16", (8, 4, 3, 3))}))


def test_leftovers_are_listed():
    tensors = {
        **kohya("lora_unet_a", (8, 8)),
        "lora_unet_b.lora_down.weight": ("F16", (2, 8)),
        "lora_unet_c.alpha": np.array(1, np.float32),
        "<s1>": ("F32", (8,)),
    }
    file = parse_lora(Source(tensors))
    assert [layer.name for layer in file.layers] == ["lora_unet_a"]
    assert dict(file.ignored) == {
        "<s1>": "a token's vectors, which are not loaded with a LoRA",
        "lora_unet_b.lora_down.weight": "the up factor of this layer is missing",
        "lora_unet_c.alpha": "alpha of a layer without factors",
    }


@pytest.mark.parametrize(
    "change",
    [
        {"lora_unet_a.lora_up.weight": ("F16", (8, 3))},
        {"lora_unet_a.lora_up.weight": ("F16", (8,))},
        {
            "lora_unet_a.lora_down.weight": ("F16", (0, 8)),
            "lora_unet_a.lora_up.weight": ("F16", (8, 0)),
        },
        {"lora_unet_a.alpha": np.ones(2, np.float32)},
        {"lora_unet_a.alpha": np.array(np.inf, np.float32)},
    ],
)
def test_contradictions_are_malformed(change):
    with pytest.raises(MalformedFile):
        parse_lora(Source({**kohya("lora_unet_a", (8, 8)), **change}))


@pytest.mark.parametrize(
    ("tensors", "families"),
    [
        (kohya("lora_unet_double_blocks_0_img_mod_lin", (18432, 3072)), ("flux1", "hunyuan")),
        (
            kohya("lora_unet_double_blocks_0_img_mlp_0", (12288, 3072)),
            ("flux1", "chroma", "hunyuan"),
        ),
        (peft("transformer_blocks.0.img_mlp.net.2", (8, 8)), ("qwen_image",)),
        (
            kohya("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", (640, 2048)),
            ("sdxl", "kolors"),
        ),
        (peft(f"unet.{DOWN.replace('attn1', 'attn2')}.to_v", (320, 768)), ("sd15",)),
        (peft(f"unet.{DOWN}.to_v", (320, 320)), ("sd15", "sd2")),
        (kohya("lora_te_text_model_encoder_layers_0_mlp_fc1", (8, 8)), ()),
    ],
)
def test_family_by_names_and_shapes(tensors, families):
    assert looks_like(parse_lora(Source(tensors)).layers) == families


def test_no_torch_is_loaded():
    code = (
        "import sys, diffquant.convert.lora.parse, diffquant.convert.lora.match;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _manifest(name):
    with gzip.open(MANIFESTS / f"{name}.json.gz") as file:
        return json.load(file)


BASES = {
    "sd15.checkpoint.ldm-pruned-emaonly": "sd15",
    "sd15.unet.diffusers": "sd15",
    "flux-dev.checkpoint-comfy-fp8": "flux1",
    "flux-dev.transformer.diffusers": "flux1",
}
REAL = {
    "lora.sd15-kohya-r16": ("sd15", 192, 72),
    "lora.sd15-kohya-locon-r16-conv8": ("sd15", 278, 72),
    "lora.sd15-diffusers-peft-r4": ("sd15", 128, 0),
    "lora.lcm-sd15-r64": ("sd15", 278, 0),
    "lora.real.catundchat_sd15": ("sd15", 128, 0),
    "lora.real.cloneofsimo_analog_svd_rank4": ("sd15", 144, 48),
    "lora.real.cloneofsimo_lora_disney": ("sd15", 144, 48),
    "lora.flux-xlabs-r16": ("flux1", 76, 0),
    "lora.flux-kohya-r16": ("flux1", 304, 72),
    "lora.flux-diffusers-peft-r16": ("flux1", 190, 0),
    "lora.sdxl-kohya-r16": ("sdxl", None, None),
    "lora.qwen-image-lightning-r64": ("qwen_image", None, None),
}


@pytest.mark.oracle
@pytest.mark.skipif(not MANIFESTS.is_dir(), reason="the reference data is not here")
@pytest.mark.parametrize("lora", REAL)
@pytest.mark.parametrize("base", BASES)
def test_real_key_sets_match_their_base_in_full_and_no_other(base, lora):
    specs = {k: TensorSpec(k, d, tuple(s)) for k, (d, s) in _manifest(base)["tensors"].items()}
    parts = {
        part.name: {one.target: one.shape for one in to_canonical(part)}
        for part in detect(specs).parts
        if part.name != "vae"
    }
    manifest = _manifest(lora)
    layers = parse_lora(Source(manifest["tensors"], manifest["metadata"])).layers
    found = match_lora(layers, ARCHITECTURES[BASES[base]], parts)
    family, unet, text = REAL[lora]
    assert looks_like(layers)[0] == family
    fits = sum(layer.part != "text_encoder" for layer in {t.layer for t in found.targets})
    if family == BASES[base]:
        assert fits == unet
        assert found.matched == unet + (text if "text_encoder" in parts else 0)
        assert not found.shape_mismatch
    else:
        assert 2 * fits < sum(not layer.part.startswith("text") for layer in layers)
