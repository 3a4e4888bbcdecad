"""Configs made for single files: those that were published, field for field."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from diffquant.convert.detect import detect
from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.made_configs import INDEX, made_configs
from diffquant.convert.request import Request
from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink, open_source

DATA = Path(__file__).parents[1] / "data" / "manifests.json.xz"
CONFIGS = Path(__file__).parents[3] / "shared" / "data" / "configs"
# Fields of the files that say nothing of the model, or by whom it was saved.
ASIDE = {"_diffusers_version", "_name_or_path", "torch_dtype", "transformers_version", "dtype"}
# Two ways to write one thing: a number for every level, a fused function of the same formula.
ALIKE = {
    ("transformer_layers_per_block", 4): [1, 4, 4, 1],  # the levels of 1 have no attention
    ("dense_act_fn", "gelu_pytorch_tanh"): "gelu_new",
}
PUBLISHED = [
    ("sd15.checkpoint.ldm-webui-fp16", "sd15"),
    ("sd21.checkpoint.ldm", "sd21"),
    ("sdxl-base.checkpoint.ldm", "sdxl-base"),
    ("sdxl-refiner.checkpoint.ldm", "sdxl-refiner"),
    ("sd3-medium.checkpoint-incl-clips-t5", "sd3-medium"),
    ("flux-dev.checkpoint-comfy-fp8", "flux-dev"),
    ("flux-schnell.transformer.original", "flux-schnell"),
]


def made(name):
    shapes = json.loads(lzma.decompress(DATA.read_bytes()))[name]
    specs = {key: TensorSpec(key, "F16", tuple(shape)) for key, shape in shapes.items()}
    return made_configs(detect(specs))


@pytest.mark.oracle
@pytest.mark.parametrize(("manifest", "folder"), PUBLISHED)
def test_what_is_made_is_what_was_published(manifest, folder):
    if not CONFIGS.is_dir():
        pytest.skip("the reference configs are not here")
    compared = 0
    for path, ours in made(manifest).items():
        real = CONFIGS / folder / path
        if not real.is_file():
            continue
        published = json.loads(real.read_text())
        compared += 1
        for field, value in published.items():
            if field in ours and field not in ASIDE:
                hashable = value if isinstance(value, int | str) else ""
                assert ours[field] in (value, ALIKE.get((field, hashable))), (path, field)
    assert compared > 1 or "transformer" in manifest


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("manifest", "folder"), [row for row in PUBLISHED if "checkpoint" in row[0]]
)
def test_the_index_names_the_published_classes(manifest, folder):
    if not CONFIGS.is_dir():
        pytest.skip("the reference configs are not here")
    ours = made(manifest)[INDEX]
    published = json.loads((CONFIGS / folder / INDEX).read_text())
    for name, value in ours.items():
        if name in published and name not in ("scheduler", "_class_name"):
            assert value == published[name], name
    assert ours["_class_name"] == published["_class_name"]


def test_a_single_file_of_another_program_becomes_a_folder_that_diffusers_loads(examples, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    single, bare, folder = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "out"))
    source = examples / "sd15-shapes"
    run_job(source, single, Request(container=container_for(single)))
    with open_source(single) as ours, open_sink(bare, ours.specs.values(), {}) as sink:
        for key in ours.specs:  # the same file without the configs that we write into headers
            sink.write(key, 0, ours.read(key))
        sink.commit()
    report = run_job(bare, folder, Request(container="folder"))
    assert any("vae/config.json" in note and "made from shapes" in note for note in report.notes)
    assert report.missing == ("tokenizer/",)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    config = json.loads((source / "vae" / "config.json").read_text())
    assert vae.config.block_out_channels == config["block_out_channels"]
    index = json.loads((folder / INDEX).read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert (folder / "scheduler" / "scheduler_config.json").is_file()


def test_an_autoencoder_alone_gets_none(examples, tmp_path):
    """Nothing in it says whose scaling factor it needs."""
    single, bare, folder = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "out"))
    run_job(examples / "sdxl-shapes", single, Request("safetensors", parts=("vae",)))
    with open_source(single) as ours, open_sink(bare, ours.specs.values(), {}) as sink:
        for key in ours.specs:
            sink.write(key, 0, ours.read(key))
        sink.commit()
    report = run_job(bare, folder, Request(container="folder"))
    assert report.missing == (INDEX, "vae/config.json")
    assert not (folder / INDEX).exists()
