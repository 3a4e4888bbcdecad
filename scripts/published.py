"""Write src/diffquant/convert/footprint/published.json: names and shapes of published denoisers.

    PYTHONPATH=src python scripts/published.py

One row per model that the bundled runtime runs, in the order people know them: what `doctor` plans
memory for. Names and shapes come from the manifests in tests/data. A test runs `written()` and
compares.
"""

from __future__ import annotations

import json
from pathlib import Path

from lora_bases import filled, folded, manifests

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "src/diffquant/convert/footprint/published.json"
_FLUX2 = ("double_blocks", "single_blocks")
# title, repository, manifest, stacks of which it holds blocks 0, 1 and the last alone
MODELS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("SD 1.5", "runwayml/stable-diffusion-v1-5", "sd15.unet.ldm", ()),
    ("SD 2.1", "stabilityai/stable-diffusion-2-1", "sd21.unet.ldm", ()),
    ("SDXL", "stabilityai/stable-diffusion-xl-base-1.0", "sdxl-base.unet.ldm", ()),
    ("SDXL refiner", "stabilityai/stable-diffusion-xl-refiner-1.0", "sdxl-refiner.unet.ldm", ()),
    ("Flux.1 dev", "black-forest-labs/FLUX.1-dev", "flux-dev.transformer.original", ()),
    (
        "Flux.2 klein 4B",
        "black-forest-labs/FLUX.2-klein-4B",
        "flux2-klein-4b.transformer.original",
        _FLUX2,
    ),
    (
        "Flux.2 klein 9B",
        "black-forest-labs/FLUX.2-klein-9B",
        "flux2-klein-9b.transformer.original",
        _FLUX2,
    ),
    ("Flux.2 dev", "black-forest-labs/FLUX.2-dev", "flux2-dev.transformer.original", ()),
    ("Z-Image", "Tongyi-MAI/Z-Image-Turbo", "z-image.transformer.comfy", ()),
    ("Qwen-Image", "Qwen/Qwen-Image", "qwen-image.transformer.diffusers", ()),
)


def written() -> str:
    """The file's text, one template a line."""
    known = manifests()
    rows = []
    for title, repository, name, cut in MODELS:
        shapes = {key: tuple(shape) for key, shape in known[name].items()}
        lines = ",\n".join(
            f"  {json.dumps(text)}: {json.dumps(numbers)}"
            for text, numbers in folded(filled(shapes, cut)).items()
        )
        head = f'"title": {json.dumps(title)}, "repository": {json.dumps(repository)}'
        rows.append("{" + head + f',\n "shapes": {{\n{lines}\n }}}}')
    return "[\n" + ",\n".join(rows) + "\n]\n"


if __name__ == "__main__":
    TARGET.write_text(written(), encoding="utf-8")
