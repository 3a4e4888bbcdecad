"""One sample checkpoint per container: the parametrized suites run over them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from diffquant.core.tensors import TensorSpec
from diffquant.io import CONTAINERS, open_sink

_RNG = np.random.default_rng(7)


def _bytes(count: int) -> np.ndarray:
    return _RNG.integers(0, 256, count, dtype=np.uint8)


# key -> (dtype, shape): aligned and odd sizes, empty, scalar, leading 1, odd names.
_LAYOUT = {
    "blocks.0.weight": ("F32", (6, 5)),
    "blocks.0.bias": ("F16", (3,)),
    "scalar": ("F32", ()),
    "empty": ("F32", (0, 4)),
    "pad token": ("BF16", (1, 7)),
    "größe 重み": ("I8", (3, 1, 2)),
}


@dataclass(frozen=True)
class Sample:
    """A checkpoint on disk, what it holds, and the file that a test may damage."""

    path: Path
    victim: Path
    tensors: Mapping[str, np.ndarray]
    specs: tuple[TensorSpec, ...]


def write_all(path: Path, tensors: Mapping[str, np.ndarray], specs, metadata=None, **options):
    """Write and commit; returns the committed paths."""
    with open_sink(path, specs, metadata or {}, **options) as sink:
        for key, data in tensors.items():
            sink.write(key, 0, data)
        return sink.commit()


def plan(prefix: str = "", layout: Mapping[str, tuple[str, tuple[int, ...]]] = _LAYOUT):
    """Return (specs, key -> bytes) for a layout."""
    specs = tuple(TensorSpec(prefix + key, dtype, shape) for key, (dtype, shape) in layout.items())
    return specs, {spec.key: _bytes(spec.nbytes) for spec in specs}


def _single(folder: Path, name: str, metadata: Mapping[str, object]) -> Sample:
    specs, tensors = plan()
    write_all(folder / name, tensors, specs, metadata)
    return Sample(folder / name, folder / name, tensors, specs)


def _safetensors(folder: Path) -> Sample:
    return _single(folder, "model.safetensors", {"format": "pt", "note": "x" * 8})


def _gguf(folder: Path) -> Sample:
    metadata = {
        "general.architecture": "flux",
        "general.quantization_version": 2,
        "tokens": ("a", "bc", "größe"),
        "shape": (3, 4),
        "flag": True,
        "scale": 0.5,
    }
    return _single(folder, "model.gguf", metadata)


def _folder(folder: Path) -> Sample:
    unet, unet_tensors = plan("unet/")
    text, text_tensors = plan("text_encoder/", {"embed": ("F16", (4, 4)), "ids": ("I64", (1, 4))})
    configs = {
        "model_index.json": {"unet": ["diffusers", "U"], "text_encoder": ["transformers", "T"]},
        "unet/config.json": {"in_channels": 4},
        "text_encoder/config.json": {"hidden_size": 4},
    }
    tensors = {**unet_tensors, **text_tensors}
    write_all(folder / "pipe", tensors, unet + text, configs=configs)
    victim = folder / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    return Sample(folder / "pipe", victim, tensors, unet + text)


def _sharded(folder: Path) -> Sample:
    specs, tensors = plan()
    weight_map = {}
    for index, part in enumerate((specs[:3], specs[3:])):
        name = f"model-{index + 1:05}-of-00002.safetensors"
        write_all(folder / name, {spec.key: tensors[spec.key] for spec in part}, part)
        weight_map |= {spec.key: name for spec in part}
    index_path = folder / "model.safetensors.index.json"
    index_path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return Sample(index_path, index_path, tensors, specs)


def _torch_pickle(folder: Path) -> Sample:
    import torch

    specs, tensors = plan()
    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}
    state = {}
    for spec in specs:
        state[spec.key] = torch.empty(spec.shape, dtype=names[spec.dtype])
        if spec.size:
            flat = torch.from_numpy(tensors[spec.key].copy())
            state[spec.key].copy_(flat.view(names[spec.dtype]).reshape(spec.shape))
    path = folder / "model.ckpt"
    torch.save({"state_dict": state, "epoch": 3}, path)
    return Sample(path, path, tensors, specs)


SAMPLES: dict[str, Callable[[Path], Sample]] = {
    "safetensors": _safetensors,
    "gguf": _gguf,
    "diffusers_folder": _folder,
    "sharded": _sharded,
    "torch_pickle": _torch_pickle,
}


@pytest.fixture(params=sorted(CONTAINERS))
def sample(request, tmp_path) -> Sample:
    """A sample of each container; a container without one fails here."""
    return SAMPLES[request.param](tmp_path)


@pytest.fixture(params=sorted(name for name, row in CONTAINERS.items() if row.create is not None))
def target(request, tmp_path) -> tuple[Path, tuple[TensorSpec, ...], dict[str, np.ndarray]]:
    """A path of each container that is written, with specs and bytes for it."""
    specs, tensors = plan("unet/" if request.param == "diffusers_folder" else "")
    return tmp_path / ("out" + CONTAINERS[request.param].extensions[0]), specs, tensors


@pytest.fixture
def writing():
    """The helpers (plan, write_all)."""
    return plan, write_all
