"""PEFT loads the folders that are written for it, and the model then does what a merge does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.lora.conversion import convert_lora
from diffquant.convert.lora.merge import LoraInput, merging
from diffquant.convert.request import Request
from diffquant.core.errors import UsageError

pytestmark = pytest.mark.oracle
EXAMPLES = Path(__file__).parents[2] / "examples"
FLUX = {  # kohya's name -> rows and columns, in widths of the model; fused ones are cut for PEFT
    "lora_unet_double_blocks_0_img_attn_qkv": (3, 1),
    "lora_unet_double_blocks_0_txt_attn_proj": (1, 1),
    "lora_unet_single_blocks_0_linear1": (7, 1),
    "lora_unet_single_blocks_0_linear2": (1, 5),
}
ATTN = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{}"
RNG = np.random.default_rng(3)


def numbers(*shape):
    return RNG.standard_normal(shape).astype(np.float32) * 0.2


def layer(name, rows, tail, rank, *, dora=False):
    ones = (1,) * len(tail[1:])
    tensors = {
        f"{name}.lora_down.weight": numbers(rank, *tail),
        f"{name}.lora_up.weight": numbers(rows, rank, *ones),
        f"{name}.alpha": np.array(rank / 2, np.float32),
    }
    return {**tensors, f"{name}.dora_scale": 3 + numbers(rows, 1, *ones)} if dora else tensors


def flux_lora(*, dora):
    tensors = {}
    width = json.loads((EXAMPLES / "flux1-shapes/transformer/config.json").read_text())
    size = width["num_attention_heads"] * width["attention_head_dim"]
    for rank, (name, (rows, columns)) in enumerate(FLUX.items(), 2):
        tensors |= layer(name, rows * size, (columns * size,), rank, dora=dora)
    # `proj_out` of the model, and of each block: a name that others end with
    last = "lora_unet_final_layer_linear"
    return tensors | layer(last, width["in_channels"], (size,), 8, dora=dora)


def sd15_lora(*, dora):
    tensors = {}
    for one in ("q", "v"):
        tensors |= layer(ATTN.format(one), 64, (64,), 4, dora=dora)
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    return tensors | layer(conv, 64, (64, 3, 3), 2, dora=dora)


def drawn(torch, model, name):
    """One call on fixed inputs."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    config = model.config
    with torch.no_grad():
        if name == "sd15-shapes":
            return model(
                noise(1, config.in_channels, 16, 16),
                torch.tensor([500]),
                noise(1, 7, config.cross_attention_dim),
            ).sample
        return model(
            hidden_states=noise(1, 16, config.in_channels),
            encoder_hidden_states=noise(1, 5, config.joint_attention_dim),
            pooled_projections=noise(1, config.pooled_projection_dim),
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([3.5]) if config.guidance_embeds else None,
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(5, 3),
        ).sample


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(
    ("name", "kind", "folder", "make"),
    [
        ("sd15-shapes", "UNet2DConditionModel", "unet", sd15_lora),
        ("flux1-shapes", "FluxTransformer2DModel", "transformer", flux_lora),
    ],
)
def test_peft_loads_the_folder_and_does_what_a_merge_does(
    tmp_path, client, silently, name, kind, folder, make, dora
):
    peft, torch, diffusers = client("peft"), client("torch"), client("diffusers")
    base = EXAMPLES / name
    lora = tmp_path / "lora.safetensors"
    save_file(make(dora=dora), lora)
    convert_lora(lora, tmp_path / "peft", to="peft", base=base)
    assert sorted(one.name for one in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with merging(base, (LoraInput(lora),)) as found:
        request = found.into(Request(container=container_for(tmp_path / "merged"), dtype="f32"))
        run_job(base, tmp_path / "merged", request, beside=found.paths)
    cls = getattr(diffusers, kind)
    merged = silently(cls.from_pretrained, tmp_path / "merged" / folder)
    model = silently(cls.from_pretrained, base / folder, torch_dtype=torch.float32)
    plain = drawn(torch, model, name)
    wanted = drawn(torch, merged, name)
    tuned = silently(peft.PeftModel.from_pretrained, model, tmp_path / "peft")
    result = drawn(torch, tuned.base_model.model, name)
    changed = (wanted - plain).norm()
    assert changed > 1e-2 * plain.norm()
    assert (result - wanted).norm() <= 1e-5 * wanted.norm()
    back = tmp_path / "back.safetensors"
    convert_lora(tmp_path / "peft", back, to="kohya", base=base)
    assert load_file(back).keys() == load_file(lora).keys()


def test_each_part_has_a_folder_of_its_own(tmp_path, client, silently):
    peft, torch, transformers = client("peft"), client("torch"), client("transformers")
    base = EXAMPLES / "sd15-shapes"
    key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    model = silently(transformers.CLIPTextModel.from_pretrained, base / "text_encoder").float()
    rows = model.config.hidden_size
    tensors = {**sd15_lora(dora=False), **layer(key, rows, (rows,), 3)}
    lora, out = tmp_path / "lora.safetensors", tmp_path / "both"
    save_file(tensors, lora)
    report = convert_lora(lora, out, to="peft", base=base)
    assert "transformers 5" in " ".join(report.notes)
    assert sorted(one.name for one in out.iterdir()) == ["text_encoder", "unet"]
    holder = torch.nn.Module()  # transformers 4's CLIPTextModel, which 5 is without
    holder.text_model = model
    tuned = silently(peft.PeftModel.from_pretrained, holder, out / "text_encoder")
    delta = 0.5 * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
    [wrapped] = [one for one in tuned.modules() if hasattr(one, "lora_A")]
    found = wrapped.get_delta_weight("default").detach()
    np.testing.assert_allclose(found.numpy(), delta, atol=1e-6)
    with pytest.raises(UsageError, match="exists; use --force"):
        convert_lora(lora, out, to="peft", base=base)
    convert_lora(lora, out, to="peft", base=base, force=True)
    (out / "unet" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds unet.mine\.txt, which is no LoRA's"):
        convert_lora(lora, out, to="peft", base=base, force=True)
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]


def test_dora_for_some_layers_is_refused_before_anything_is_written(tmp_path):
    tensors = {**layer(ATTN.format("q"), 64, (64,), 2), **layer(ATTN.format("k"), 64, (64,), 2)}
    tensors[f"{ATTN.format('k')}.dora_scale"] = 1 + numbers(64, 1)
    lora = tmp_path / "lora.safetensors"
    save_file(tensors, lora)
    with pytest.raises(UsageError, match=r"1 of 2 layers for denoiser are DoRA.*--to kohya"):
        convert_lora(lora, tmp_path / "peft", to="peft", base=EXAMPLES / "sd15-shapes")
    assert not (tmp_path / "peft").exists()
