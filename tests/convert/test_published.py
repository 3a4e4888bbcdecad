"""Published shapes that ship with the package: what the script writes, and the models they are."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest

from diffquant.convert.detect import detect
from diffquant.convert.footprint.published import published
from diffquant.convert.templates import expanded, shapes_of, template

ROOT = Path(__file__).parents[2]

# Weights of the denoiser in billions, as the makers count them: model cards and papers (SD 1.5's
# and SDXL's: arXiv 2307.01952, table 1, "860M" and "2.6B"; FLUX.1 "12 billion"; FLUX.2 dev "32B";
# klein 4B and 9B; Z-Image "6B"; Qwen-Image "20B").
BILLIONS = {
    "SD 1.5": ("sd15", 0.86),
    "SD 2.1": ("sd2", 0.87),
    "SDXL": ("sdxl", 2.57),
    "SDXL refiner": ("sdxl_refiner", 2.3),
    "Flux.1 dev": ("flux1", 11.9),
    "Flux.2 klein 4B": ("flux2", 3.9),
    "Flux.2 klein 9B": ("flux2", 9.1),
    "Flux.2 dev": ("flux2", 32.2),
    "Z-Image": ("z_image", 6.15),
    "Qwen-Image": ("qwen_image", 20.4),
}


@pytest.fixture(scope="module")
def script():
    """scripts/published.py as a module."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        spec = importlib.util.spec_from_file_location("published", ROOT / "scripts/published.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return module


def test_the_file_is_what_its_script_writes(script):
    assert script.TARGET.read_text(encoding="utf-8") == script.written()


def test_every_shape_of_a_whole_manifest_comes_back(script):
    known = script.manifests()
    for model, (title, _, name, cut) in zip(published(), script.MODELS, strict=True):
        assert model.title == title
        shapes = shapes_of(model.shapes)
        wanted = {key: tuple(shape) for key, shape in known[name].items()}
        assert {key: shapes.get(key) for key in wanted} == wanted
        assert cut or len(shapes) == len(wanted)


@pytest.mark.parametrize("model", published(), ids=lambda model: model.title)
def test_each_is_recognised_and_as_large_as_its_makers_say(model):
    slug, billions = BILLIONS[model.title]
    specs = model.header().specs
    assert detect(specs).architecture == slug
    size = sum(math.prod(spec.shape) for spec in specs.values())
    assert size / 1e9 == pytest.approx(billions, rel=0.02)


def test_a_header_states_its_bytes_and_has_none_to_read():
    header = published()[0].header("F32")
    assert header.nbytes == 2 * published()[0].header("F16").nbytes
    with header, pytest.raises(AssertionError, match="a table of shapes"):
        header.read(next(iter(header.specs)))


def test_products_of_ranges_are_read():
    assert list(expanded("1-2 0, 4 0+2")) == [(1, 0), (2, 0), (4, 0), (4, 2)]
    assert shapes_of({"a.#.b": {"0-1": "2x3"}, "c": {"": "4"}}) == {
        "a.0.b": (2, 3),
        "a.1.b": (2, 3),
        "c": (4,),
    }
    assert template("a.1.b") == ("a.#.b", (1,))
