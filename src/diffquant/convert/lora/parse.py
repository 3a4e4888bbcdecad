"""Read a LoRA file: which layers it holds, by names and shapes; the factors themselves on demand.

    delta W = scale * up @ down      down (r, K) or (r, in, kh, kw)   up (n, r) or (n, r, 1, 1)
    scale   = alpha / r, or alpha / sqrt(r) where PEFT's use_rslora says so; 1 without an alpha

What a key says is told by roles.py, whose name a module has by names.py, kinds of adapters by
kinds.py; this is the one kind that can be laid beside packed weights as it is.

Sources:

- Comfy-Org/ComfyUI@6f98b15:comfy/weight_adapter/lora.py: suffixes, alpha / r, 1 without alpha
- peft 0.21.2 (package), tuners/lora/layer.py: use_rslora
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.logical import LogicalSource
from diffquant.convert.lora.group import Adapter, group_adapters
from diffquant.convert.lora.strangers import refuse_strangers
from diffquant.core.errors import ArchitectureError, MalformedFile
from diffquant.core.tensors import TensorSource

__all__ = ["LoraFile", "LoraLayer", "Naming", "factors", "parse_lora"]

Naming: TypeAlias = Literal["underscored", "dotted"]


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """One pair of factors.

    Attributes:
        name: what stands before the suffix in the file.
        part: denoiser, text_encoder or text_encoder_2; "" where the file does not say.
        naming: how `module` is written.
        module: the name without its prefix, older spellings made current.
        down, up: keys of the factors.
        down_shape, up_shape: their shapes, two or four dimensions.
        rank: r.
        alpha: as stated by the file; None means alpha = r.
        rooted: alpha is divided by sqrt(r).
        adapter: as grouped.
    """

    name: str
    part: str
    naming: Naming
    module: str
    down: str
    up: str
    down_shape: tuple[int, ...]
    up_shape: tuple[int, ...]
    rank: int
    alpha: float | None
    rooted: bool
    adapter: Adapter = field(compare=False, repr=False)

    @property
    def kind(self) -> Literal["linear", "conv"]:
        """Whether the factors are written as convolutions."""
        return "conv" if len(self.down_shape) > 2 else "linear"

    @property
    def scale(self) -> float:
        """What `up @ down` is multiplied by at weight 1."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rooted else self.rank)


@dataclass(frozen=True, slots=True)
class LoraFile:
    """What a file holds.

    Attributes:
        layers: in file order.
        ignored: (key, reason) of every tensor that is part of no layer.
    """

    layers: tuple[LoraLayer, ...]
    ignored: tuple[tuple[str, str], ...]


def parse_lora(source: TensorSource) -> LoraFile:
    """Find the layers of a LoRA that can be added as they are; reads scalars only.

    Raises:
        ArchitectureError: no LoRA in it, or another kind of adapter.
        MalformedFile: factors or scalars that contradict each other.
    """
    refuse_strangers(source)
    file = group_adapters(source)
    if file is None or not (file.adapters or file.broken):
        first = next(iter(source.specs), "no tensors")
        raise ArchitectureError(f"{source.path}: no LoRA in it (first tensor: {first})")
    for adapter in file.adapters:
        if what := _other(adapter):
            key = next(iter(adapter.parts.values()))
            raise ArchitectureError(
                f"{source.path} is {what}; only LoRA is supported yet (tensor {key})"
            )
    ignored = list(file.ignored)
    ignored += [
        (key, "a token's vectors, which are not loaded with a LoRA") for key in file.vectors
    ]
    for one in file.broken:
        if not one.half:
            raise MalformedFile(f"{one.name}: {one.reason}", path=source.path)
        ignored.append((one.key, one.reason))
    if not file.adapters:
        raise ArchitectureError(f"{source.path}: no whole LoRA in it ({': '.join(ignored[0])})")
    return LoraFile(tuple(_layer(one) for one in file.adapters), tuple(ignored))


def _other(adapter: Adapter) -> str:
    """What an adapter is that cannot be added as a pair of factors; empty where it can."""
    if adapter.kind != "lora" or "dora" in adapter.traits:
        return adapter.label
    if "tucker" in adapter.traits:
        return "LoCon with a Tucker core (lora_mid)"
    if "bias" in adapter.traits:
        return "LoRA with a bias"
    if adapter.naming == "counted":
        return "LoRA with numbered layers (cloneofsimo) whose names the shapes do not tell"
    if len(adapter.shape) not in (2, 4):
        return f"LoRA of a kernel with {len(adapter.shape) - 2} dimensions"
    return ""


def _layer(adapter: Adapter) -> LoraLayer:
    down, up = adapter.parts["down"], adapter.parts["up"]
    assert adapter.rank is not None
    naming: Naming = "underscored" if adapter.naming == "underscored" else "dotted"
    return LoraLayer(
        name=adapter.name,
        part=adapter.part,
        naming=naming,
        module=adapter.module,
        down=down,
        up=up,
        down_shape=adapter.shapes["down"],
        up_shape=adapter.shapes["up"],
        rank=adapter.rank,
        alpha=adapter.alpha,
        rooted=adapter.rooted,
        adapter=adapter,
    )


def factors(
    source: LogicalSource, layer: LoraLayer
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Read copies of (down, up) as float32, in the shapes the file gives them.

    Raises:
        MalformedFile: NaN or infinity in them.
    """
    read = []
    for key, shape in ((layer.down, layer.down_shape), (layer.up, layer.up_shape)):
        values = np.array(source.read(key)).reshape(shape)  # not a view of the mapped file
        if not np.isfinite(values).all():
            raise MalformedFile(f"{key}: NaN or infinity in a LoRA", path=source.source.path)
        read.append(values)
    return read[0], read[1]
