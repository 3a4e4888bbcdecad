"""LoRAs beside packed weights against peft, diffusers' own loading, and weights merged by hand."""

import copy
import importlib.util
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.core.errors import ArchitectureError, MalformedFile
from diffquant.runtime.layers import PackedLayer
from diffquant.runtime.loading import build
from diffquant.runtime.lora import attach
from diffquant.runtime.lora_reach import view_of
from diffquant.runtime.models import flux
from diffquant.runtime.opening import Opened, open_pipeline

TOLERANCE = 1e-4
SHARED = Path(__file__).parents[3] / "shared"
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 48,
    "attention_head_dim": 8,
    "layers_per_block": 2,
}
FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
}
CLIP = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
T5 = {"vocab_size": 100, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}
ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
UNET_MODULES = {  # Diffusers name -> canonical (LDM) name, written out here
    f"{ATTN}.to_q": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.1.proj_in": "input_blocks.2.1.proj_in",
    "down_blocks.0.resnets.1.conv2": "input_blocks.2.0.out_layers.3",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (
        "middle_block.1.transformer_blocks.0.ff.net.0.proj"
    ),
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    "up_blocks.1.resnets.2.time_emb_proj": "output_blocks.5.0.emb_layers.1",
    "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v": (
        "output_blocks.5.1.transformer_blocks.0.attn2.to_v"
    ),
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0": (
        "output_blocks.3.1.transformer_blocks.0.attn2.to_out.0"
    ),
    "time_embedding.linear_1": "time_embed.0",
    "conv_out": "out.2",
}
FLUX_MODULES = (
    "x_embedder",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_v",
    "transformer_blocks.1.attn.add_k_proj",
    "transformer_blocks.1.attn.to_add_out",
    "transformer_blocks.0.norm1.linear",
    "transformer_blocks.0.ff_context.net.2",
    "single_transformer_blocks.0.attn.to_k",
    "single_transformer_blocks.1.proj_mlp",
    "single_transformer_blocks.1.proj_out",
    "norm_out.linear",
    "proj_out",
)


@pytest.fixture(scope="module")
def sd15(oracle):
    """Diffusers' models and ours, the latter to be copied before use."""
    unet = oracle.randomize(oracle.diffusers.UNet2DConditionModel(**UNET), seed=1)
    settings = oracle.transformers.CLIPTextConfig(**CLIP)
    clip = oracle.randomize(oracle.transformers.CLIPTextModel(settings), seed=2)
    ours = (
        build("unet", oracle.unet_weights(unet), unet.config),
        build("clip", oracle.clip_weights(clip), settings.to_dict()),
    )
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 12, generator=generator)
    t, context = torch.tensor([801.0, 23.0]), torch.randn(2, 7, 48, generator=generator)
    ids = torch.randint(0, 97, (2, 77), generator=generator)
    return SimpleNamespace(
        slug="sd15",
        denoiser=unet,
        text=clip,
        ours=ours,
        theirs=lambda model: model(x, t, context).sample,
        call=lambda opened: opened.pipeline.parts.denoiser(x, t, context),
        theirs_text=lambda model: model(ids).last_hidden_state,
        call_text=lambda opened: opened.pipeline.parts.text_encoders[0](ids).last,
    )


@pytest.fixture(scope="module")
def flux1(oracle):
    transformer = oracle.diffusers.FluxTransformer2DModel(**FLUX)
    oracle.randomize(transformer, seed=3)
    settings = oracle.transformers.CLIPTextConfig(**CLIP)
    clip = oracle.randomize(oracle.transformers.CLIPTextModel(settings), seed=2)
    t5_settings = oracle.transformers.T5Config(**T5)
    t5 = oracle.randomize(oracle.transformers.T5EncoderModel(t5_settings), seed=4)
    ours = (
        build("flux", oracle.flux_weights(transformer), transformer.config),
        build("clip", oracle.clip_weights(clip), settings.to_dict()),
        build("t5", oracle.t5_weights(t5), t5_settings.to_dict()),
    )
    generator = torch.Generator().manual_seed(1)
    img = torch.randn(1, 15, 16, generator=generator)
    txt, pooled = (
        torch.randn(1, 5, 24, generator=generator),
        torch.randn(1, 20, generator=generator),
    )
    t, guidance = torch.tensor([0.75]), torch.tensor([3.5])
    img_ids, txt_ids = flux.image_ids(6, 10), torch.zeros(5, 3)
    ids = torch.randint(0, 97, (1, 9), generator=generator)
    return SimpleNamespace(
        slug="flux1",
        denoiser=transformer,
        text=t5,
        ours=ours,
        theirs=lambda model: (
            model(
                hidden_states=img,
                timestep=t,
                guidance=guidance,
                pooled_projections=pooled,
                encoder_hidden_states=txt,
                txt_ids=txt_ids,
                img_ids=img_ids,
            ).sample
        ),
        call=lambda opened: opened.pipeline.parts.denoiser(
            img, t, txt, pooled, img_ids, txt_ids, guidance
        ),
        theirs_text=lambda model: model(ids).last_hidden_state,
        call_text=lambda opened: opened.pipeline.parts.text_encoders[1](ids),
    )


def opened(family):
    """A fresh copy of our models, as `attach` sees them."""
    denoiser, *encoders = copy.deepcopy(family.ours)
    parts = SimpleNamespace(denoiser=denoiser, text_encoders=tuple(encoders))
    return Opened(SimpleNamespace(parts=parts), family.slug, "", (), (64, 64), ())


def adapters(one):
    modules = (one.pipeline.parts.denoiser, *one.pipeline.parts.text_encoders)
    layers = [m for model in modules for m in model.modules() if isinstance(m, PackedLayer)]
    return sum(len(layer.adapters) for layer in layers)


def pair(shape, rank, seed):
    """Factors (down, up) of a delta about as large as the weight it changes."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator) / shape[1:].numel() ** 0.5
    up = torch.randn(shape[0], rank, *([1] * (len(shape) - 2)), generator=generator)
    return down, up / rank**0.5


def merged(model, deltas):
    """A copy of a diffusers or transformers model with `deltas` added to its weights."""
    model = copy.deepcopy(model)
    state = model.state_dict()
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = state[f"{name}.weight"]
            weight += delta.reshape(weight.shape)
    return model


def product(down, up):
    return up.flatten(1) @ down.flatten(1)


@torch.no_grad()
def assert_same(found, wanted, base):
    assert float((wanted - base).abs().max()) > 0.05, "the LoRA should change something"
    error = float((found - wanted).abs().max())
    assert error < TOLERANCE * max(1.0, float(wanted.abs().max())), f"largest error {error:.3g}"


def peft_pair(name, down, up, adapter=""):
    return {f"{name}.lora_A{adapter}.weight": down, f"{name}.lora_B{adapter}.weight": up}


def kohya_pair(name, down, up, alpha):
    return {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(float(alpha)),
    }


@pytest.mark.oracle
@torch.no_grad()
@pytest.mark.parametrize("naming", ["diffusers", "ldm"])
def test_kohya_of_a_unet_equals_merged_weights(sd15, tmp_path, naming):
    state, tensors, deltas = sd15.denoiser.state_dict(), {}, {}
    for i, (name, ldm) in enumerate(UNET_MODULES.items()):
        down, up = pair(state[f"{name}.weight"].shape, 4, i)
        written = (name if naming == "diffusers" else ldm).replace(".", "_")
        tensors |= kohya_pair(f"lora_unet_{written}", down, up, 2)
        deltas[name] = 0.7 * 2 / 4 * product(down, up)
    save_file(tensors, tmp_path / "a.safetensors")
    ours = opened(sd15)
    [use] = attach(ours, ((tmp_path / "a.safetensors", 0.7),))
    wanted = sd15.theirs(merged(sd15.denoiser, deltas))
    assert_same(sd15.call(ours), wanted, sd15.theirs(sd15.denoiser))
    assert (use.matched, use.unmatched, use.warnings) == (len(UNET_MODULES), (), ())
    assert (use.rank, use.alpha_stated, use.weight) == (4, True, 0.7)
    assert use.path == str(tmp_path / "a.safetensors")


def _peft_model(oracle, model, modules, folder, **config):
    """A copy of a model with a random adapter of peft's own making, saved by diffusers."""
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(peft.LoraConfig(target_modules=list(modules), **config))
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)
                parameter.data /= parameter[0].numel() ** 0.5
        model.save_lora_adapter(folder)
    return model.eval(), folder / "pytorch_lora_weights.safetensors"


PEFT_CONFIGS = {
    "alpha is rank": {"r": 4, "lora_alpha": 4},
    "alpha in the header": {"r": 4, "lora_alpha": 8},
    "alpha by module": {"r": 4, "lora_alpha": 2, "alpha_pattern": {"conv_out": 8, "proj_out": 8}},
    "rank-stabilised": {"r": 4, "lora_alpha": 3, "use_rslora": True},
}


@pytest.mark.oracle
@torch.no_grad()
@pytest.mark.parametrize("config", PEFT_CONFIGS)
@pytest.mark.parametrize("family", ["sd15", "flux1"])
def test_what_diffusers_saves_equals_peft(oracle, sd15, flux1, tmp_path, family, config):
    family = {"sd15": sd15, "flux1": flux1}[family]
    modules = UNET_MODULES if family is sd15 else FLUX_MODULES
    settings = PEFT_CONFIGS[config]
    theirs, file = _peft_model(oracle, family.denoiser, modules, tmp_path, **settings)
    ours = opened(family)
    [use] = attach(ours, ((file, 1.0),))
    assert use.matched == len(load_file(file)) // 2 >= len(modules)  # peft takes names as endings
    assert (use.unmatched, use.rank) == ((), 4)
    assert_same(family.call(ours), family.theirs(theirs), family.theirs(family.denoiser))


@pytest.mark.oracle
@torch.no_grad()
@pytest.mark.parametrize(
    ("prefix", "adapter"), [("transformer.", ""), ("base_model.model.", ".default")]
)
def test_dotted_flux_equals_merged_weights(flux1, tmp_path, prefix, adapter):
    state, tensors, deltas = flux1.denoiser.state_dict(), {}, {}
    for i, name in enumerate(FLUX_MODULES):
        down, up = pair(state[f"{name}.weight"].shape, 4, i)
        tensors |= peft_pair(prefix + name, down, up, adapter)
        deltas[name] = product(down, up)
    save_file(tensors, tmp_path / "a.safetensors")
    ours = opened(flux1)
    [use] = attach(ours, ((tmp_path / "a.safetensors", 1.0),))
    wanted = flux1.theirs(merged(flux1.denoiser, deltas))
    assert_same(flux1.call(ours), wanted, flux1.theirs(flux1.denoiser))
    assert (use.matched, use.alpha_stated) == (len(FLUX_MODULES), False)
    assert adapters(ours) == len(FLUX_MODULES) + 1  # norm_out is in two pieces


@pytest.mark.oracle
@torch.no_grad()
def test_kohya_flux_of_fused_layers_equals_merged_weights(flux1, tmp_path):
    double, single = "transformer_blocks.1", "single_transformer_blocks.0"
    fused = {  # BFL name, underscored -> Diffusers names of its rows, in order
        "double_blocks_1_img_attn_qkv": [f"{double}.attn.to_{x}" for x in "qkv"],
        "double_blocks_1_txt_attn_qkv": [f"{double}.attn.add_{x}_proj" for x in "qkv"],
        "double_blocks_1_img_mod_lin": [f"{double}.norm1.linear"],
        "single_blocks_0_linear1": [
            *(f"{single}.attn.to_{x}" for x in "qkv"),
            f"{single}.proj_mlp",
        ],
        "single_blocks_0_linear2": [f"{single}.proj_out"],
        "vector_in_in_layer": ["time_text_embed.text_embedder.linear_1"],
    }
    state, tensors, deltas = flux1.denoiser.state_dict(), {}, {}
    for i, (name, members) in enumerate(fused.items()):
        rows = [state[f"{member}.weight"].shape[0] for member in members]
        inner = state[f"{members[0]}.weight"].shape[1]
        down, up = pair(torch.Size((sum(rows), inner)), 4, i)
        tensors |= kohya_pair(f"lora_unet_{name}", down, up, 8)
        deltas |= dict(zip(members, (2 * product(down, up)).split(rows), strict=True))
    save_file(tensors, tmp_path / "a.safetensors")
    ours = opened(flux1)
    [use] = attach(ours, ((tmp_path / "a.safetensors", 1.0),))
    wanted = flux1.theirs(merged(flux1.denoiser, deltas))
    assert_same(flux1.call(ours), wanted, flux1.theirs(flux1.denoiser))
    assert (use.matched, use.unmatched) == (len(fused), ())


CLIP_LAYER, T5_LAYER = "encoder.layers.1.", "encoder.block.1.layer."
TEXTS = [
    ("sd15", "lora_te_text_model_", CLIP_LAYER, ("self_attn.q_proj", "mlp.fc2")),
    ("sd15", "text_encoder.text_model.", CLIP_LAYER, ("self_attn.out_proj", "mlp.fc1")),
    ("sd15", "text_encoder.", CLIP_LAYER, ("self_attn.v_proj",)),
    ("flux1", "lora_te3_", T5_LAYER, ("0.SelfAttention.v", "1.DenseReluDense.wo")),
    ("flux1", "text_encoder_2.", T5_LAYER, ("0.SelfAttention.o",)),
]


@pytest.mark.oracle
@torch.no_grad()
@pytest.mark.parametrize(("family", "prefix", "layer", "modules"), TEXTS)
def test_text_encoders_equal_merged_weights(sd15, flux1, tmp_path, family, prefix, layer, modules):
    family = {"sd15": sd15, "flux1": flux1}[family]
    state, tensors, deltas = family.text.state_dict(), {}, {}
    for i, module in enumerate(modules):
        name = next(k for k in state if k.endswith(f"{layer}{module}.weight"))
        down, up = pair(state[name].shape, 2, i)
        if prefix.endswith("_"):
            written = prefix + (layer + module).replace(".", "_")
            tensors |= kohya_pair(written, down, up, 1)
        else:
            tensors |= peft_pair(prefix + layer + module, down, up)
        scale = 0.5 if prefix.endswith("_") else 1.0
        deltas[name.removesuffix(".weight")] = scale * product(down, up)
    save_file(tensors, tmp_path / "a.safetensors")
    ours = opened(family)
    [use] = attach(ours, ((tmp_path / "a.safetensors", 1.0),))
    assert use.matched == len(modules)
    wanted = family.theirs_text(merged(family.text, deltas))
    assert_same(family.call_text(ours), wanted, family.theirs_text(family.text))


@pytest.fixture(scope="module")
def sdxl(oracle, sd15, tmp_path_factory):
    """OpenCLIP-bigG in small, from transformers' folder and from open_clip's fused names."""
    settings = oracle.transformers.CLIPTextConfig(**CLIP, projection_dim=24, hidden_act="gelu")
    text = oracle.transformers.CLIPTextModelWithProjection(settings)
    oracle.randomize(text, seed=6)
    encoder = build("open_clip", oracle.clip_weights(text), settings.to_dict())
    ids = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(3))
    return SimpleNamespace(
        slug="sdxl",
        text=text,
        ours=(sd15.ours[0], sd15.ours[1], encoder),
        theirs_text=lambda model: torch.cat(
            [model(ids).last_hidden_state.flatten(1), model(ids).text_embeds], dim=1
        ),
        call_text=lambda opened: (
            lambda out: torch.cat([out.last.flatten(1), out.projected], dim=1)
        )(opened.pipeline.parts.text_encoders[1](ids)),
    )


SECOND = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1")


@pytest.mark.oracle
@torch.no_grad()
@pytest.mark.parametrize("prefix", ["lora_te2_text_model_", "text_encoder_2.text_model."])
@pytest.mark.parametrize("count", [1, 3])
def test_second_encoder_of_sdxl_equals_merged_weights(sdxl, tmp_path, prefix, count):
    """open_clip's canonical names are fused; the module has q, k and v apart."""
    state, deltas, files = sdxl.text.state_dict(), {}, []
    for number in range(count):
        tensors = {}
        for i, module in enumerate([f"{CLIP_LAYER}{one}" for one in SECOND]):
            name = next(k for k in state if k.endswith(f"{module}.weight"))
            down, up = pair(state[name].shape, 2, i + 10 * number)
            if prefix.endswith("_"):
                tensors |= kohya_pair(prefix + module.replace(".", "_"), down, up, 1)
            else:
                tensors |= peft_pair(prefix + module, down, up)
            scale = 0.5 if prefix.endswith("_") else 1.0
            key = name.removesuffix(".weight")
            deltas[key] = deltas.get(key, 0) + (number + 1) * scale * product(down, up)
        files.append((tmp_path / f"{number}.safetensors", float(number + 1)))
        save_file(tensors, files[-1][0])
    ours = opened(sdxl)
    uses = attach(ours, tuple(files))
    assert [(use.matched, use.unmatched) for use in uses] == [(len(SECOND), ())] * count
    wanted = sdxl.theirs_text(merged(sdxl.text, deltas))
    assert_same(sdxl.call_text(ours), wanted, sdxl.theirs_text(sdxl.text))


def test_rows_of_a_fused_weight_are_told_to_each_layer(sdxl):
    encoder = sdxl.ours[2]
    view = view_of(encoder, ARCHITECTURES["sdxl"].component("text_encoder_2"))
    key = "transformer.resblocks.1.attn.in_proj_weight"
    assert view.shapes[key] == (144, 48)
    attention = encoder.text_model.encoder.layers[1].self_attn
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj

    def reached(rows):
        return [(one.layer, one.rows, one.start, one.stop) for one in view.reach(key, rows)]

    assert reached(None) == [(q, None, 0, 48), (k, None, 48, 96), (v, None, 96, 144)]
    assert reached((48, 96)) == [(k, None, 0, 48)]
    assert reached((40, 100)) == [(q, (40, 48), 0, 8), (k, None, 8, 56), (v, (0, 4), 56, 60)]
    [norm] = view.reach("ln_final.weight", None)
    assert norm.layer is None


@pytest.mark.oracle
@torch.no_grad()
@pytest.mark.parametrize("name", ["lora_te2_text_projection", "text_encoder_2.text_projection"])
def test_projection_of_the_second_encoder_equals_merged_weights(sdxl, tmp_path, name):
    state = sdxl.text.state_dict()
    down, up = pair(state["text_projection.weight"].shape, 2, 5)
    made = kohya_pair(name, down, up, 2) if name.startswith("lora") else peft_pair(name, down, up)
    save_file(made, tmp_path / "a.safetensors")
    ours = opened(sdxl)
    [use] = attach(ours, ((tmp_path / "a.safetensors", 1.0),))
    assert use.matched == 1
    wanted = sdxl.theirs_text(merged(sdxl.text, {"text_projection": product(down, up)}))
    assert_same(sdxl.call_text(ours), wanted, sdxl.theirs_text(sdxl.text))


@pytest.mark.oracle
@torch.no_grad()
def test_two_loras_add_up_and_half_precision_is_kept(sd15, tmp_path):
    name = f"{ATTN}.to_q"
    shape = sd15.denoiser.state_dict()[f"{name}.weight"].shape
    total, loras = 0, []
    for i, (dtype, weight) in enumerate([(torch.float16, 1.0), (torch.bfloat16, -0.5)]):
        down, up = (one.to(dtype) for one in pair(shape, 4, i))
        file = tmp_path / f"{i}.safetensors"
        save_file(peft_pair(f"unet.{name}", down, up), file)
        loras.append((file, weight))
        total = total + weight * product(down.float(), up.float())
    ours = opened(sd15)
    attach(ours, tuple(loras))
    wanted = sd15.theirs(merged(sd15.denoiser, {name: total}))
    assert_same(sd15.call(ours), wanted, sd15.theirs(sd15.denoiser))
    layer = ours.pipeline.parts.denoiser.get_submodule(UNET_MODULES[name])
    assert [one.up.dtype for one in layer.adapters] == [torch.float16, torch.bfloat16]


def _zeros(name, shape, rank=2):
    return peft_pair(name, torch.ones(rank, *shape[1:]), torch.zeros(shape[0], rank))


@pytest.mark.oracle
def test_another_family_is_refused_in_one_line(sd15, flux1, tmp_path):
    flux_file, unet_file = tmp_path / "flux.safetensors", tmp_path / "sdxl.safetensors"
    save_file(_zeros("transformer.single_transformer_blocks.0.attn.to_q", (32, 32)), flux_file)
    attention = "attentions.0.transformer_blocks"
    names = [
        f"unet.down_blocks.1.{attention}.0.attn2.to_k",
        f"unet.mid_block.{attention}.1.attn1.to_q",
    ]
    save_file({k: v for n in names for k, v in _zeros(n, (32, 2048)).items()}, unet_file)
    for family, file, wanted in [
        (sd15, flux_file, "looks like flux1, the model is sd15"),
        (sd15, unet_file, "looks like sdxl, the model is sd15"),
        (flux1, unet_file, "looks like sdxl, the model is flux1"),
    ]:
        with pytest.raises(ArchitectureError, match=f"fits none of the model's layers.*{wanted}"):
            attach(opened(family), ((file, 1.0),))


@pytest.mark.oracle
def test_a_relative_with_other_text_width_is_refused(sd15, tmp_path):
    # SD2 on SD1.5: all but the layers that read text would fit.
    names = {f"unet.{ATTN}.to_{x}": (32, 32) for x in "qkv"}
    names[f"unet.{ATTN.replace('attn1', 'attn2')}.to_k"] = (32, 1024)
    file = tmp_path / "sd2.safetensors"
    save_file({k: v for name, shape in names.items() for k, v in _zeros(name, shape).items()}, file)
    with pytest.raises(ArchitectureError, match=r"only 3 of 4 .*looks like sd2, the model is sd15"):
        attach(opened(sd15), ((file, 1.0),))


@pytest.mark.oracle
def test_a_partial_match_is_a_warning(sd15, tmp_path):
    file = tmp_path / "part.safetensors"
    tensors = {
        **peft_pair(f"unet.{ATTN}.to_q", torch.ones(2, 32), torch.ones(32, 2)),
        **peft_pair("unet.mid_block.attentions.7.proj_in", torch.ones(2, 64), torch.ones(64, 2)),
        **peft_pair(
            "text_encoder.text_model.embeddings.token_embedding",
            torch.ones(2, 48),
            torch.ones(100, 2),
        ),
        "extra": torch.ones(3),
    }
    save_file(tensors, file)
    ours = opened(sd15)
    [use] = attach(ours, ((file, 1.0),))
    assert (use.matched, adapters(ours), use.alpha_stated) == (1, 1, False)
    assert [why for _, why in use.unmatched] == [
        "the denoiser has no such layer",
        "a table of embeddings takes no LoRA yet",
    ]
    layers, leftovers = use.warnings
    assert layers.startswith("part.safetensors: 2 of 3 layers are not used: unet.mid_block.att")
    assert leftovers.startswith("part.safetensors: 1 tensors are not used: extra (")


@pytest.mark.oracle
def test_zeros_are_a_warning(sd15, tmp_path):
    save_file(_zeros(f"unet.{ATTN}.to_q", (32, 32)), tmp_path / "a.safetensors")
    [use] = attach(opened(sd15), ((tmp_path / "a.safetensors", 1.0),))
    assert use.warnings == ("a.safetensors: every up factor is zero, so the LoRA changes nothing",)


@pytest.mark.oracle
def test_a_refused_file_leaves_the_model_alone(sd15, tmp_path):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    name, down, up = f"unet.{ATTN}.to_q", torch.ones(2, 32), torch.ones(32, 2)
    save_file(peft_pair(name, down, up), good)
    save_file(peft_pair(name, down, up * float("nan")), bad)
    ours = opened(sd15)
    with pytest.raises(MalformedFile, match=r"bad.safetensors.*NaN or infinity"):
        attach(ours, ((good, 1.0), (bad, 1.0)))
    assert adapters(ours) == 0
    assert attach(ours, ()) == ()


@pytest.fixture(scope="module")
def maker(oracle):
    """The tool that builds the pipelines which the fixtures in lora_fixtures/ were made for."""
    path = SHARED / "tools/make_fixture.py"
    if not path.is_file() or not (SHARED / "data/lora_fixtures").is_dir():
        pytest.skip("the reference data is not here")
    spec = importlib.util.spec_from_file_location("make_fixture", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fixture(maker, oracle, family, folder):
    """Build a pipeline with the tool; its folder, and diffusers' own opening of it in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = SimpleNamespace(seed=0, dtype="fp16", dist="normal")
        maker.build(family, maker.FAMILIES[family], settings, str(folder))
        pipe = oracle.diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    return pipe


PROMPT, NEGATIVE = "a photo of a red fox in the snow, 35mm", "blurry, low quality"


@pytest.mark.oracle
@torch.no_grad()
def test_locon_fixture_of_lycoris(maker, oracle, tmp_path):
    pipe = _fixture(maker, oracle, "sd15", tmp_path / "sd15")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context = torch.cat(pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)[::-1])
    x = maker.randn(0, "sd15", "unet_in", shape=(2, 4, 8, 16))
    ours, file = open_pipeline(tmp_path / "sd15"), SHARED / "data/lora_fixtures/sd15_locon"
    denoiser, inputs = ours.pipeline.parts.denoiser, (x, torch.tensor([801.0, 23.0]), context)
    base = denoiser(*inputs)
    [use] = attach(ours, ((file.with_suffix(".safetensors"), 1.0),))
    wanted = load_file(file.with_suffix(".oracle.safetensors"))["net.out"]
    assert_same(denoiser(*inputs), wanted, base)
    assert (use.matched, use.unmatched, use.rank, use.warnings) == (278, (), 4, ())
    for other, word in (("dora", "DoRA"), ("loha", "LoHa"), ("lokr", "LoKr")):
        with pytest.raises(ArchitectureError, match=f"is {word}; only LoRA is supported yet"):
            attach(ours, ((file.with_name(f"sd15_{other}.safetensors"), 1.0),))


@pytest.mark.oracle
@torch.no_grad()
def test_peft_fixture_of_flux(maker, oracle, tmp_path):
    pipe = _fixture(maker, oracle, "flux_dev", tmp_path / "flux_dev")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompt, pooled, txt_ids = pipe.encode_prompt(
            PROMPT, None, device="cpu", max_sequence_length=64
        )
        raw = maker.randn(0, "flux_dev", "latents", shape=(1, 16, 8, 16))
        x = pipe._pack_latents(raw, 1, 16, 8, 16)
        img_ids = pipe._prepare_latent_image_ids(1, 4, 8, "cpu", torch.float32)
    ours, file = open_pipeline(tmp_path / "flux_dev"), SHARED / "data/lora_fixtures/flux_dev_peft"
    denoiser, t = ours.pipeline.parts.denoiser, torch.tensor([0.75])
    inputs = (x, t, prompt, pooled, img_ids, txt_ids, torch.tensor([3.5]))
    base = denoiser(*inputs)
    tensors = load_file(file.with_suffix(".safetensors"))
    deltas = {
        key.removeprefix("transformer.").removesuffix(".lora_A.weight"): product(
            down.float(), tensors[key.replace("lora_A", "lora_B")].float()
        )
        for key, down in tensors.items()
        if "lora_A" in key
    }
    exact = merged(pipe.transformer, deltas)(
        hidden_states=x,
        timestep=t,
        guidance=torch.tensor([3.5]),
        pooled_projections=pooled,
        encoder_hidden_states=prompt,
        txt_ids=txt_ids,
        img_ids=img_ids,
    ).sample
    [use] = attach(ours, ((file.with_suffix(".safetensors"), 1.0),))
    found = denoiser(*inputs)
    assert_same(found, exact, base)
    # The oracle was recorded before its factors were rounded to float16: 2e-4 of its own.
    wanted = load_file(file.with_suffix(".oracle.safetensors"))["net.out"]
    assert float((found - wanted).abs().max()) < 5e-4
    assert (use.matched, use.unmatched, use.alpha_stated) == (22, (), False)


@pytest.mark.oracle
@torch.no_grad()
def test_diffusers_pipeline_loads_the_same_real_file(oracle, sd15, tmp_path):
    """A whole pipeline's LoRA as diffusers writes it: denoiser and text encoder in one file."""
    peft = pytest.importorskip("peft")
    unet, text = copy.deepcopy(sd15.denoiser), copy.deepcopy(sd15.text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model, modules in ((unet, ["to_k", "to_out.0"]), (text, ["q_proj", "fc1"])):
            model.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=modules))
            oracle_seed = torch.Generator().manual_seed(9)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = torch.randn(parameter.shape, generator=oracle_seed)
                    parameter.data *= 0.3 / parameter[0].numel() ** 0.5
        layers = [peft.get_peft_model_state_dict(model) for model in (unet, text)]
        configs = [model.peft_config["default"].to_dict() for model in (unet, text)]
        configs = [{k: v for k, v in one.items() if _plain(v)} for one in configs]
        oracle.diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=layers[0],
            text_encoder_lora_layers=layers[1],
            unet_lora_adapter_metadata=configs[0],
            text_encoder_lora_adapter_metadata=configs[1],
        )
    ours = opened(sd15)
    [use] = attach(ours, ((tmp_path / "pytorch_lora_weights.safetensors", 1.0),))
    assert use.unmatched == ()
    assert use.alpha_stated
    assert_same(sd15.call(ours), sd15.theirs(unet.eval()), sd15.theirs(sd15.denoiser))
    assert_same(sd15.call_text(ours), sd15.theirs_text(text.eval()), sd15.theirs_text(sd15.text))


def _plain(value):
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
