"""LPIPS 0.1 with AlexNet: distance of deep features, weighted channel by channel.

::

    [0, 1] -> [-1, 1] -> (x - shift) / scale -> conv 11/4 -> relu 1 -> pool -> conv 5 -> relu 2
      -> pool -> conv 3 -> relu 3 -> conv 3 -> relu 4 -> conv 3 -> relu 5
    each relu: unit length over channels, squared difference, weighted sum, mean over pixels; summed

Weights are not ours to ship. They come from the file that was named, else AlexNet's from where
torchvision keeps it and the heads from the `lpips` package, which is looked up and not imported.
Torch files are read by io/torch_pickle.py: nothing in them is run.

Sources: richzhang/PerceptualSimilarity lpips 0.1.4 lpips/lpips.py (ScalingLayer, forward),
lpips/pretrained_networks.py (alexnet), lpips/__init__.py (normalize_tensor);
pytorch/vision torchvision/models/alexnet.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from diffquant.core.errors import MissingKeys, UnsupportedDtype, UnsupportedShape, shorten
from diffquant.core.floats import float32_of
from diffquant.core.tensors import TensorSource
from diffquant.io import open_source
from diffquant.runtime.devices import full_float32
from diffquant.runtime.metrics import Judge, MetricNeeds, Missing

__all__ = ["Lpips", "open_lpips"]

Picture = NDArray[np.float32]
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
_SMALLEST = 31  # pixels along a side: under it the second pooling leaves nothing


@dataclass(frozen=True, slots=True)
class _Conv:
    """A convolution of AlexNet: index in torchvision's `features`, shape, stride, padding."""

    index: int
    shape: tuple[int, int, int, int]
    stride: int
    padding: int
    pooled: bool  # a maximum over 3x3 with stride 2 comes before it


_CONVS = (
    _Conv(0, (64, 3, 11, 11), 4, 2, pooled=False),
    _Conv(3, (192, 64, 5, 5), 1, 2, pooled=True),
    _Conv(6, (384, 192, 3, 3), 1, 1, pooled=True),
    _Conv(8, (256, 384, 3, 3), 1, 1, pooled=False),
    _Conv(10, (256, 256, 3, 3), 1, 1, pooled=False),
)
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10


def _wanted() -> Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Our name -> (shape, names it has in files: torchvision's, the lpips package's)."""
    found: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for place, conv in enumerate(_CONVS):
        for leaf, shape in (("weight", conv.shape), ("bias", conv.shape[:1])):
            names = (f"features.{conv.index}.{leaf}", f"net.slice{place + 1}.{conv.index}.{leaf}")
            found[f"conv{place}.{leaf}"] = (shape, names)
        heads = (f"lin{place}.model.1.weight", f"lins.{place}.model.1.weight", f"lin{place}.weight")
        found[f"head{place}"] = ((1, conv.shape[0], 1, 1), heads)
    return found


_WANTED = _wanted()


class Lpips:
    """The metric with its weights."""

    def __init__(self, weights: Mapping[str, Tensor], device: str = "cpu") -> None:
        """Take weights by our names, float32."""
        self._weights = {name: one.to(device) for name, one in weights.items()}
        self._device = device

    @torch.no_grad()
    @full_float32()
    def __call__(self, reference: Picture, candidate: Picture) -> float:
        """Distance of two pictures (H, W, 3) in [0, 1], 0 for identical ones."""
        pair = torch.from_numpy(np.stack((reference, candidate))).to(self._device, torch.float32)
        x = pair.permute(0, 3, 1, 2) * 2 - 1  # (2, 3, H, W)
        shift, scale = (x.new_tensor(row)[:, None, None] for row in (_SHIFT, _SCALE))
        x = (x - shift) / scale
        total = 0.0
        for place, conv in enumerate(_CONVS):
            if conv.pooled:
                x = functional.max_pool2d(x, 3, 2)
            weight, bias = (self._weights[f"conv{place}.{leaf}"] for leaf in ("weight", "bias"))
            x = functional.relu(functional.conv2d(x, weight, bias, conv.stride, conv.padding))
            unit = x / ((x**2).sum(1, keepdim=True).sqrt() + _EPSILON)
            away = (unit[:1] - unit[1:]) ** 2
            total += float(functional.conv2d(away, self._weights[f"head{place}"]).mean())
        return total


def open_lpips(needs: MetricNeeds) -> Judge | Missing:
    """LPIPS, where its weights are found.

    Raises:
        CheckpointError, MissingKeys, UnsupportedShape: of a file that was named.
    """
    if min(needs.size) < _SMALLEST:
        width, height = needs.size
        return Missing(
            f"pictures are {width}x{height}, LPIPS takes {_SMALLEST}x{_SMALLEST} or more"
        )
    backbone = needs.lpips_weights or _of_torchvision()
    if backbone is None:
        return Missing(
            f"no weights of AlexNet: give them with --lpips-weights FILE, or put {ALEXNET} where "
            f"torchvision keeps its own ({_told(_checkpoints())})"
        )
    heads = _of_package()
    weights = _read([backbone, *([heads] if heads else [])])
    if any(f"head{place}" not in weights for place in range(len(_CONVS))):
        return Missing(
            f"{backbone.name} has AlexNet without LPIPS's heads: pip install --no-deps lpips "
            "(nothing of it is run), or give a file of both with --lpips-weights"
        )
    metric = Lpips(weights, needs.device)
    return lambda reference, candidate, _prompt: metric(reference, candidate)


def _checkpoints() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _told(folder: Path) -> str:
    """A folder as reports may tell it: they are published, and a path says whose machine it was."""
    home = Path.home()
    if folder.is_relative_to(home):
        return f"~/{folder.relative_to(home).as_posix()}"
    return "hub/checkpoints in TORCH_HOME"


def _of_torchvision() -> Path | None:
    """AlexNet as torchvision downloads it."""
    return next(iter(sorted(_checkpoints().glob("alexnet-owt-*.pth"))), None)


def _of_package() -> Path | None:
    """The heads inside an installed `lpips` package."""
    spec = importlib.util.find_spec("lpips")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "weights" / "v0.1" / "alex.pth"
    return path if path.is_file() else None


def _read(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Take every wanted weight from the first file that has it; heads may be nowhere.

    Raises:
        MissingKeys: the first file has not all of AlexNet.
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        with open_source(path) as source:
            for name, (shape, spellings) in _WANTED.items():
                key = next((one for one in spellings if one in source.specs), None)
                if key is not None and name not in found:
                    found[name] = _tensor(source, key, shape)
    lacking = [row[1][0] for name, row in _WANTED.items() if name not in found and "conv" in name]
    if lacking:
        raise MissingKeys(
            f"{paths[0]}: not LPIPS with AlexNet: no {shorten(lacking)}", keys=tuple(lacking)
        )
    return found


def _tensor(source: TensorSource, key: str, shape: tuple[int, ...]) -> Tensor:
    """Read one weight; its shape is checked before anything is read."""
    spec = source.specs[key]
    if spec.shape != shape:
        raise UnsupportedShape(
            f"{source.path}: {key}: expected {shape} of LPIPS with AlexNet, found {spec.shape}"
        )
    if spec.dtype not in ("F32", "F16", "BF16"):
        raise UnsupportedDtype(f"{source.path}: {key}: expected floats, found {spec.dtype}")
    numbers = float32_of(source.read(key), spec.dtype)
    return torch.from_numpy(np.array(numbers, np.float32).reshape(shape))
