"""Merged checkpoints against the same LoRA as a side branch, and against recorded outputs."""

import importlib.util
import inspect
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.lora.merge import LoraInput, merging
from diffquant.convert.request import Request
from diffquant.runtime.layers import PackedLayer
from diffquant.runtime.lora import attach
from diffquant.runtime.models import flux
from diffquant.runtime.opening import open_pipeline

TOLERANCE = 1e-4
EXAMPLES = Path(__file__).parents[2] / "examples"
SHARED = Path(__file__).parents[3] / "shared"


def merge(base, out, *loras):
    request = Request(container=container_for(out), dtype="f32")
    with merging(base, loras) as found:
        return found.told(run_job(base, out, found.into(request), force=True))


def close(found, wanted, base):
    """Equal relative to the output, where the LoRA changes that by at least a hundredth."""
    effect = float((wanted - base).norm() / base.norm())
    error = float((found - wanted).norm() / wanted.norm())
    assert effect > 1e-2
    assert error < TOLERANCE, (error, effect)


def lora_for(module, path):
    """A LoRA of every packed matrix and kernel, in canonical dotted names."""
    seed = torch.Generator().manual_seed(2)
    tensors = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, PackedLayer) or len(layer.bound().shape) not in (2, 4):
            continue
        rows, *inner = layer.bound().shape
        tail = [1] * max(len(inner) - 1, 0)
        prefix = f"diffusion_model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = 0.05 * torch.randn((3, *inner), generator=seed)
        tensors[f"{prefix}.lora_B.weight"] = 0.05 * torch.randn((rows, 3, *tail), generator=seed)
    save_file(tensors, path)
    return len(tensors) // 2


def sd15_inputs(folder):
    seed = torch.Generator().manual_seed(4)
    width = json.loads((folder / "unet/config.json").read_text())["cross_attention_dim"]
    x, context = torch.randn(1, 4, 8, 8, generator=seed), torch.randn(1, 9, width, generator=seed)
    return x, torch.tensor([500.0]), context


def flux1_inputs(folder):
    seed = torch.Generator().manual_seed(4)
    config = json.loads((folder / "transformer/config.json").read_text())
    img = torch.randn(1, 12, config["in_channels"], generator=seed)
    txt = torch.randn(1, 7, config["joint_attention_dim"], generator=seed)
    pooled = torch.randn(1, config["pooled_projection_dim"], generator=seed)
    ids = (flux.image_ids(6, 8), torch.zeros(7, 3))
    return img, torch.tensor([0.7]), txt, pooled, *ids, torch.tensor([3.5])


INPUTS = {"sd15": sd15_inputs, "flux1": flux1_inputs}


@torch.no_grad()
@pytest.mark.parametrize("family", INPUTS)
def test_a_merged_lora_equals_the_side_branch(family, tmp_path):
    base, lora = EXAMPLES / f"{family}-shapes", tmp_path / "x.safetensors"
    opened, inputs = open_pipeline(base), INPUTS[family](base)
    count = lora_for(opened.pipeline.parts.denoiser, lora)
    plain = opened.pipeline.parts.denoiser(*inputs)
    attach(opened, ((lora, 0.7),))
    beside = opened.pipeline.parts.denoiser(*inputs)
    report = merge(base, tmp_path / "merged", LoraInput(lora, 0.7))
    assert report.merged.loras[0].written == count
    close(open_pipeline(tmp_path / "merged").pipeline.parts.denoiser(*inputs), beside, plain)


# --- files of lycoris and peft, with their own outputs --------------------------------------------


@pytest.fixture(scope="module")
def pipelines(oracle, tmp_path_factory):
    """Build a pipeline that fixtures were made for: its folder, and diffusers' opening of it."""
    path = SHARED / "tools/make_fixture.py"
    if not path.is_file() or not (SHARED / "data/lora_fixtures").is_dir():
        pytest.skip("the reference data is not here")
    spec = importlib.util.spec_from_file_location("make_fixture", path)
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    made = {}

    def build(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("pipelines") / family
            settings = SimpleNamespace(seed=0, dtype="fp16", dist="normal")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                maker.build(family, maker.FAMILIES[family], settings, str(folder))
                pipe = oracle.diffusers.DiffusionPipeline.from_pretrained(
                    folder, torch_dtype=torch.float32
                )
            made[family] = (maker, folder, pipe)
        return made[family]

    return build


PROMPT, NEGATIVE = "a photo of a red fox in the snow, 35mm", "blurry, low quality"


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["locon", "dora", "loha", "lokr"])
@torch.no_grad()
def test_sd15_fixtures_of_lycoris(kind, pipelines, oracle, tmp_path):
    maker, folder, pipe = pipelines("sd15")
    file = SHARED / f"data/lora_fixtures/sd15_{kind}.safetensors"
    wanted = load_file(file.with_suffix(".oracle.safetensors"))
    report = merge(folder, tmp_path / "out", LoraInput(file))
    assert report.merged.loras[0].skipped == ()
    unet = oracle.diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out/unet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context = torch.cat(pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)[::-1])
    x, t = maker.randn(0, "sd15", "unet_in", shape=(2, 4, 8, 16)), torch.tensor([801.0, 23.0])
    close(unet(x, t, context).sample, wanted["net.out"], pipe.unet(x, t, context).sample)
    weights = unet.state_dict()
    for key, value in wanted.items():
        name = key.removeprefix("merged.")
        if name != key and kind in ("locon", "dora"):  # of the others the scale counts twice there
            error = (weights[name] - value.float()).norm() / value.float().norm()
            assert error < TOLERANCE, (key, error)


@pytest.mark.oracle
@torch.no_grad()
def test_qwen_image_fixture_of_bare_names(pipelines, oracle, tmp_path):
    maker, folder, pipe = pipelines("qwen_image")
    file = SHARED / "data/lora_fixtures/qwen_image_lightning.safetensors"
    report = merge(folder, tmp_path / "out", LoraInput(file))
    [row] = report.merged.loras
    assert row.skipped == ()
    assert "Qwen-Image-Lightning" in row.recipe
    model = oracle.diffusers.QwenImageTransformer2DModel.from_pretrained(
        tmp_path / "out/transformer"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompt, _ = pipe.encode_prompt(PROMPT, device="cpu")
        raw = maker.randn(0, "qwen_image", "latents", shape=(1, 1, 16, 8, 16))
        inputs = {
            "hidden_states": pipe._pack_latents(raw, 1, 16, 8, 16),
            "timestep": torch.tensor([0.75]),
            "encoder_hidden_states": prompt,
            "encoder_hidden_states_mask": torch.ones(prompt.shape[:2], dtype=torch.long),
            "img_shapes": [[(1, 4, 8)]],
        }
        if "txt_seq_lens" in inspect.signature(model.forward).parameters:
            inputs["txt_seq_lens"] = [prompt.shape[1]]
        plain, found = pipe.transformer(**inputs).sample, model(**inputs).sample
    wanted = load_file(file.with_suffix(".oracle.safetensors"))["net.out"]
    close(found, wanted, plain)


@pytest.mark.oracle
@torch.no_grad()
def test_flux_fixture_of_peft_equals_its_side_branch(pipelines, tmp_path):
    """Recorded before its factors were rounded to float16, so the exact reference is the branch."""
    _, folder, _ = pipelines("flux_dev")
    file = SHARED / "data/lora_fixtures/flux_dev_peft.safetensors"
    opened, inputs = open_pipeline(folder), flux1_inputs(folder)
    plain = opened.pipeline.parts.denoiser(*inputs)
    attach(opened, ((file, 1.0),))
    beside = opened.pipeline.parts.denoiser(*inputs)
    merge(folder, tmp_path / "out", LoraInput(file))
    close(open_pipeline(tmp_path / "out").pipeline.parts.denoiser(*inputs), beside, plain)
