"""read_recipe(): how a picture was made, from whatever chunk it carries.

Ours is read first, since it says everything; then A1111's `parameters`; then ComfyUI's `prompt`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffquant.core.errors import UsageError
from diffquant.runtime.comfy_prompt import from_comfy
from diffquant.runtime.infotext import from_infotext
from diffquant.runtime.parameters import from_parameters
from diffquant.runtime.png_text import png_texts
from diffquant.runtime.recipe import Recipe

__all__ = ["read_recipe"]

_READERS: tuple[tuple[str, Callable[[str, object], Recipe]], ...] = (
    ("diffquant", from_parameters),
    ("parameters", from_infotext),
    ("prompt", from_comfy),
)


def read_recipe(path: Path) -> Recipe:
    """Read how a PNG was made.

    Raises:
        UsageError: no PNG, one without parameters, or a graph that is not understood.
        MalformedFile: parameters that contradict themselves.
    """
    texts = png_texts(path)
    for keyword, read in _READERS:
        if keyword in texts:
            return read(texts[keyword], path)
    raise UsageError(
        f"{path}: carries no parameters (looked for {', '.join(name for name, _ in _READERS)}); "
        "programs that save it again often drop them"
    )
