"""Reading key sets: how long a module list is, how wide a layer.

Recognition asks this of the same names many times: `Named` shapes count their lists once.
"""

from __future__ import annotations

import re

from diffquant.convert.rules import Shape, Shapes

__all__ = ["USUAL", "Named", "channels_read", "count", "index_of", "usual_heads", "width"]

# A fact of this name maps config fields to what every published member has at such shapes, and the
# shapes do not say; a config may say otherwise.
USUAL = "_usual"

_MAX_DIGITS = 3  # no module list in use has a thousand members
_HEAD = re.compile(r".*\.\d+(?![^.])")  # up to the last index: far fewer than keys
_INDEX = re.compile(r"\.(\d+)(?![^.])")


class Named(dict[str, Shape]):
    """Shapes by key, with the lengths of all module lists, counted when first asked for."""

    _found: dict[str, int] | None = None

    def length(self, prefix: str) -> int:
        """Length of the module list at `prefix`, 0 when there is none."""
        if self._found is None:
            self._found = _lengths(self)
        return self._found.get(prefix, 0)


def _lengths(shapes: Shapes) -> dict[str, int]:
    found: dict[str, int] = {}
    heads = {head[0] for key in shapes if (head := _HEAD.match(key)) is not None}
    for key in heads:
        for index in _INDEX.finditer(key):
            number = index_of(index[1])
            prefix = key[: index.start()]
            if number is not None and found.get(prefix, 0) <= number:
                found[prefix] = number + 1
    return found


def index_of(text: str) -> int | None:
    """The number of a module in its list, None where `text` is none.

    Names come from files: a number without end, or one in other digits than ours, is just a name,
    and no list is taken to be as long as that.
    """
    if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS:
        return int(text)
    return None


def count(shapes: Shapes, prefix: str) -> int:
    """Length of the module list at `prefix`: one more than its highest index, 0 when absent."""
    if isinstance(shapes, Named):
        return shapes.length(prefix)
    head = f"{prefix}."
    size = len(head)
    found = {key[size:].partition(".")[0] for key in shapes if key.startswith(head)}
    return max((at + 1 for one in found if (at := index_of(one)) is not None), default=0)


def width(shapes: Shapes, key: str, axis: int) -> int | None:
    """Size of one axis of `key`, negative ones from the end; None where there is no such axis."""
    shape = shapes.get(key, ())
    return shape[axis] if -len(shape) <= axis < len(shape) else None


def usual_heads(hidden: int | None, size: int) -> dict[str, int]:
    """Attention heads of a model whose published members all have heads of `size`."""
    if not hidden or hidden % size:
        return {}
    return {"attention_head_dim": size, "num_attention_heads": hidden // size}


def channels_read(shapes: Shapes, key: str, made: int | None) -> int | None:
    """Input channels of a convolution over frames that makes `made` channels.

    GGUF files of stable-diffusion.cpp, which has four axes at most, hold (out * in, ...)
    (leejet/stable-diffusion.cpp@97d2990:src/safetensors_io.cpp:277-283).
    """
    shape = shapes.get(key, ())
    if len(shape) == 4 and made and shape[0] % made == 0:
        return shape[0] // made
    return shape[1] if len(shape) > 1 else None
