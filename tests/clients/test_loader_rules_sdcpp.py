"""stable-diffusion.cpp does with files what the loader rules say.

Through cyllama, a wheel that carries a build of it. The UNet is SD1.5's, of its real widths and all
zeros: whether a file is loaded is what is judged, not what is drawn.
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffquant.core.tensors import TensorSpec
from diffquant.inspect.loaders import judge
from diffquant.io import GgufValue, open_sink

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

LDM = "model.diffusion_model."
LAYER = LDM + "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
SCALE = LAYER.replace("weight", "weight_scale")
SMALL = LDM + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
DATA = Path(__file__).parents[1] / "data" / "manifests.json.xz"
LATER_BLOCKS = re.compile(r"(blocks|layers)\.([1-9]|0\d)")
Shapes = dict[str, tuple[int, ...]]


def shapes_of(manifest: str) -> Shapes:
    found = json.loads(lzma.decompress(DATA.read_bytes()))[manifest]
    return {key: tuple(shape) for key, shape in found.items()}


def write_zeros(
    path: Path,
    shapes: Shapes,
    said: Mapping[str, Any] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Path:
    """A checkpoint of zeros in F16, but for the keys in `dtypes`."""
    specs = [
        TensorSpec(key, (dtypes or {}).get(key, "I64" if "position_ids" in key else "F16"), shape)
        for key, shape in shapes.items()
    ]
    zeros = np.zeros(1 << 24, np.uint8)
    with open_sink(path, specs, said or {}, force=True) as sink:
        for spec in specs:
            for start in range(0, spec.nbytes, zeros.size):
                sink.write(spec.key, start, zeros[: spec.nbytes - start])
        sink.commit()
    return path


@pytest.fixture(scope="module")
def loads(
    tmp_path_factory: pytest.TempPathFactory, client: Callable[[str], Any]
) -> Callable[..., bool]:
    """Whether a context can be made of these files."""
    sd = client("cyllama.sd")

    def made(**files: Path) -> bool:
        parameters = sd.SDContextParams()
        for name, path in files.items():
            setattr(parameters, name, str(path))
        parameters.n_threads = 2
        try:
            context = sd.SDContext(parameters)
        except RuntimeError:
            return False
        valid: bool = context.is_valid
        context.close()
        return valid

    return made


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD1.5's VAE and text encoder."""
    whole = shapes_of("sd15.checkpoint.ldm-webui-fp16")
    rest = {key: shape for key, shape in whole.items() if not key.startswith(LDM)}
    return write_zeros(tmp_path_factory.mktemp("others") / "rest.safetensors", rest)


def unet(prefix: str = LDM) -> Shapes:
    return {prefix + key: shape for key, shape in shapes_of("sd15.unet.ldm").items()}


def int8_layer() -> tuple[Shapes, dict[str, str]]:
    return {**unet(), SCALE: (1280, 1)}, {LAYER: "I8", SCALE: "F32"}


def fp8_layer() -> tuple[Shapes, dict[str, str]]:
    return {**unet(), SCALE: ()}, {LAYER: "F8_E4M3", SCALE: "F32"}


DEEP = {"deep.weight": (2, 2, 2, 2, 2)}
ORIGINAL = {f"comfy.gguf.orig_shape.{SMALL}": GgufValue("i32", (320, 320))}

INT8 = {
    "_quantization_metadata": json.dumps(
        {"layers": {LAYER.removesuffix(".weight"): {"format": "int8_tensorwise"}}}
    )
}

# file name, names and shapes, header, dtypes -> whether it loads, a rule that says so
CASES = {
    "prefixed": ("a.gguf", unet, {}, {}, True, "sdcpp.model"),
    "bare": ("a.gguf", lambda: unet(""), {}, {}, True, "sdcpp.model"),
    "rows-of-256": (
        "a.gguf",
        lambda: {**unet(), SMALL: (400, 256)},
        ORIGINAL,
        {},
        False,
        "sdcpp.orig-shape",
    ),
    "five-dimensions": ("a.gguf", lambda: {**unet(), **DEEP}, {}, {}, True, "sdcpp.model"),
    "array-beside-them": (
        "a.gguf",
        lambda: {**unet(), **DEEP},
        {"some.array": GgufValue("i32", (1, 2))},
        {},
        False,
        "sdcpp.arrays-beside-5d",
    ),
    "diffusers-names": (
        "a.safetensors",
        lambda: shapes_of("sd15.unet.diffusers"),
        {},
        {},
        False,
        "sdcpp.diffusers-names",
    ),
    "int8": ("a.safetensors", lambda: int8_layer()[0], INT8, int8_layer()[1], False, "sdcpp.int8"),
    "fp8": ("a.safetensors", lambda: fp8_layer()[0], {}, fp8_layer()[1], True, "sdcpp.scaled-fp8"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_unet_loads_or_not_as_the_rules_say(
    case: str, tmp_path: Path, loads: Callable[..., bool], others: Path
) -> None:
    """int8 is read since pull request 1857, which this build is older than: a condition."""
    name, shapes, said, dtypes, expected, rule = CASES[case]
    file = write_zeros(tmp_path / name, shapes(), said, dtypes)
    found = next(one for one in judge(file) if one.loader == "sdcpp")
    assert rule in [reason.rule for reason in found.reasons]
    assert (found.verdict == "refuses") is (not expected and rule != "sdcpp.int8")
    assert loads(model_path=others, diffusion_model_path=file) is expected
    file.unlink()


@pytest.mark.parametrize(
    ("manifest", "expected"), [("clip-l.hf", True), ("clip-l.hf-transformers5", False)]
)
def test_clip_loads_under_the_names_it_knows(
    manifest: str, expected: bool, tmp_path: Path, loads: Callable[..., bool]
) -> None:
    flux = {
        key: shape
        for key, shape in shapes_of("flux-dev.transformer.original").items()
        if not LATER_BLOCKS.search(key)
    }
    clip = write_zeros(tmp_path / "clip.safetensors", shapes_of(manifest))
    found = next(one for one in judge(clip) if one.loader == "sdcpp")
    assert (found.verdict == "accepts") is expected
    assert (
        loads(
            diffusion_model_path=write_zeros(tmp_path / "flux.safetensors", flux),
            vae_path=write_zeros(tmp_path / "vae.safetensors", shapes_of("flux.vae.original")),
            clip_l_path=clip,
        )
        is expected
    )
