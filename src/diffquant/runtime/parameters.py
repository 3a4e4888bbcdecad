"""Parameters inside a picture: A1111's text, which tools read back, and the same as JSON.

A1111 writes one PNG text chunk `parameters`: the prompt, a line `Negative prompt: ...`, and a line
of
`Key: value` pairs (AUTOMATIC1111/stable-diffusion-webui modules/processing.py, create_infotext).
The JSON goes into a second chunk, `diffquant`, under the same names as the command line's options.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant import __version__

__all__ = ["infotext", "save_png"]

_SAMPLERS = {"euler": "Euler", "ddim": "DDIM", "pndm": "PNDM", "flow_euler": "Euler"}


def infotext(facts: Mapping[str, Any]) -> str:
    """Write the parameters as A1111 does; absent facts are left out."""
    width, height = facts["size"]
    pairs = {
        "Steps": facts["steps"],
        "Sampler": _SAMPLERS.get(facts["sampler"], facts["sampler"]),
        "CFG scale": facts.get("cfg"),
        "Distilled CFG Scale": facts.get("guidance"),
        "Seed": facts["seed"],
        "Size": f"{width}x{height}",
        "Model": facts["model"],
        "Version": f"diffquant {__version__}",
    }
    lines = [facts["prompt"]]
    if facts.get("negative"):
        lines.append(f"Negative prompt: {facts['negative']}")
    lines.append(", ".join(f"{key}: {value}" for key, value in pairs.items() if value is not None))
    return "\n".join(lines)


def save_png(path: Path, picture: NDArray[np.float32], facts: Mapping[str, Any]) -> None:
    """Write (H, W, 3) in [0, 1] as an 8-bit PNG with its parameters, all or nothing."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("parameters", infotext(facts))
    chunks.add_text("diffquant", json.dumps(dict(facts), sort_keys=True))
    rounded = np.clip(np.rint(picture * 255.0), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rounded).save(buffer, "PNG", pnginfo=chunks)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(buffer.getvalue())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
