"""Titles: what headers and folders call a model, and the preset that is told by them."""

import pytest
import torch
from safetensors.torch import save_file

from diffquant.runtime.presets import Clues, preset_named
from diffquant.runtime.titles import titles_of, titles_of_file


def test_every_name_of_a_header_counts_once_and_in_order():
    metadata = {
        "general.name": "b",
        "modelspec.title": "a",
        "ss_output_name": "a",
        "general.finetune": 7,
        "modelspec.author": "lcm",
    }
    assert titles_of(metadata) == ("a", "b")
    assert titles_of({"modelspec.title": "x" * 1000}) == ("x" * 200,)
    assert titles_of({}) == ()


def test_a_folder_is_called_by_the_repository_it_came_from():
    configs = {
        "model_index.json": {"_name_or_path": "stabilityai/sdxl-turbo"},
        "unet/config.json": {"_name_or_path": None},
        "transformer/config.json": [],
    }
    assert titles_of({}, configs) == ("sdxl-turbo",)


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"modelspec.title": "SDXL Turbo fp16"}, "sdxl_turbo"),
        ({"diffquant.merged": "sdxl_lightning_4step_lora.safetensors:1 ab12"}, "sdxl_lightning"),
        ({"modelspec.title": "Juggernaut"}, "default"),
    ],
)
def test_a_title_tells_the_preset_where_the_file_name_does_not(metadata, name, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(1)}, path, metadata)
    titles = titles_of_file(path)
    assert titles == tuple(metadata.values())
    found = preset_named("auto", Clues("sdxl", names=(path.stem, *titles)))
    assert (found.name, found.why != "") == (name, True)
