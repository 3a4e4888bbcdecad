"""Pictures from files, as runs take them; whatever the file is, its size is checked first."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffquant.core.errors import MalformedFile, UsageError

__all__ = ["picture_file"]

_LARGEST = 1 << 26  # pixels: 8192 x 8192


def picture_file(path: Path, kind: str) -> Tensor:
    """Read a picture.

    Args:
        path: anything PIL reads.
        kind: "image" for (1, H, W, 3), "mask" for (1, H, W); both float32 in [0, 1]. Transparent
            pixels of an image are laid on white; a mask is its brightness.

    Raises:
        UsageError: no such file, no picture, or an absurdly large one.
        MalformedFile: a picture that is damaged.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise UsageError(f"{path}: no such picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                if opened.width * opened.height > _LARGEST:
                    size = f"{opened.width}x{opened.height}"
                    raise UsageError(f"{path}: {size}, at most {_LARGEST} pixels are read")
                turned = ImageOps.exif_transpose(opened)
                if kind == "mask":
                    picture = turned.convert("L")
                else:
                    layered = turned.convert("RGBA")
                    white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
                    picture = Image.alpha_composite(white, layered).convert("RGB")
    except UnidentifiedImageError:
        raise UsageError(f"{path}: not a picture") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UsageError(f"{path}: too large, at most {_LARGEST} pixels are read") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise MalformedFile(f"a damaged picture: {error}", path=path) from None
    return torch.from_numpy(np.asarray(picture, np.float32) / 255.0)[None]
