"""Every real model the runtime serves is built on the meta device: no key missing, none over.

Names and shapes of full-size checkpoints (tests/data), recognised and mapped as any file is;
`build` refuses a key set that is not the model's.
"""

import json
import lzma
from functools import cache
from pathlib import Path

import pytest
import torch

from diffquant.convert.detect import detect, detect_component
from diffquant.convert.match import to_layout
from diffquant.core.tensors import TensorSpec
from diffquant.runtime.families import FAMILIES
from diffquant.runtime.layers import PackedWeight
from diffquant.runtime.loading import MODELS, build, model_for

DATA = Path(__file__).parents[1] / "data" / "manifests.json.xz"
# Architectures, and kinds of parts that are files of their own, that the runtime does not run.
WITHOUT_RUNTIME = {
    *("auraflow", "chroma", "hidream", "kolors", "lumina2", "omnigen2", "pixart", "sd3", "wan"),
    "gemma2_text",
}


@cache
def manifests():
    return json.loads(lzma.decompress(DATA.read_bytes()))


def parts_of(name):
    """Parts of a manifest, as detection finds them."""
    specs = {key: TensorSpec(key, "F16", tuple(shape)) for key, shape in manifests()[name].items()}
    alone = detect_component(specs)
    if alone is not None:
        return (alone,)
    return detect(specs, {}, {}).parts


def meta_weights(part, layout):
    return {
        one.target: PackedWeight.of(torch.empty(one.shape, dtype=torch.float16, device="meta"))
        for one in to_layout(part, layout)
    }


NAMES = [name for name in manifests() if not name.startswith("lora.")]


@pytest.mark.parametrize("name", NAMES)
def test_every_part_of_a_real_model_is_built_whole_or_has_no_runtime(name):
    parts = parts_of(name)
    assert parts
    for part in parts:
        kind = model_for(part.kind)
        ours = kind is not None and (not part.architecture or part.architecture in FAMILIES)
        assert ours != ((part.architecture or part.kind) in WITHOUT_RUNTIME), part.kind
        if not ours:
            continue
        assert kind is not None
        weights = meta_weights(part, MODELS[kind].layout)
        hyper = {key: one.value for key, one in part.hyper.items()}
        with torch.device("meta"):
            model = build(kind, weights, hyper, dtype=torch.float16, device="meta")
        assert sum(1 for _ in model.modules()) > 10


@pytest.mark.parametrize("kind", ["lcm-dreamshaper", "lcm-sdxl"])
@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_full_latent_consistency_models_are_built_whole(kind, naming):
    stored = json.loads(lzma.decompress(DATA.with_name("more_manifests.json.xz").read_bytes()))
    shapes = stored[f"{kind}.unet.{naming}"]
    specs = {key: TensorSpec(key, "F16", tuple(shape)) for key, shape in shapes.items()}
    part = detect(specs, {}, {}).part("denoiser")
    hyper = {key: one.value for key, one in part.hyper.items()}
    with torch.device("meta"):
        weights = meta_weights(part, MODELS["unet"].layout)
        model = build("unet", weights, hyper, dtype=torch.float16, device="meta")
    assert len(weights) == len(shapes)
    assert model.config.guidance == 256
