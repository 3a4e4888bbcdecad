"""The sample grid is drawn with the original and every file; what cannot be drawn is named."""

from pathlib import Path

import pytest
from PIL import Image

from diffquant.convert.jobs import run_job
from diffquant.convert.request import Request
from diffquant.core.errors import UsageError
from diffquant.publish.draw import draw_release
from diffquant.quant.types import type_named

FLUX = Path(__file__).parents[2] / "examples" / "flux1-shapes"
PROMPTS = ("a small red circle on a blue background at the left",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("made")
    run_job(FLUX, made / "s-Q4_0.gguf", Request("gguf", type_named("q4_0")), verify="none")
    run_job(FLUX, made / "vae.safetensors", Request("safetensors", parts=("vae",)), verify="none")
    return made


def test_a_column_per_file_that_can_be_drawn_with(folder, tmp_path):
    grid = tmp_path / "grid.png"
    notes = draw_release((folder,), FLUX, grid, prompts=PROMPTS, steps=1)
    assert len(notes) == 1
    assert notes[0].startswith("vae.safetensors is not in the grid: ")
    with Image.open(grid) as picture:
        both = picture.width
    assert both > 400  # two columns beside the prompts


def test_nothing_to_draw_with_is_an_error(folder, tmp_path):
    grid = tmp_path / "grid.png"
    with pytest.raises(UsageError, match="can draw with none"):
        draw_release((folder / "vae.safetensors",), FLUX, grid, prompts=PROMPTS, steps=1)
    assert not grid.exists()
