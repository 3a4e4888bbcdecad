"""What the planner asks of a part that the runtime is about to load: PartSource, filled in.

Which names its model carries, which keys it reads, and which routine decodes each format on the
device: all three decide what it takes in memory.
"""

from __future__ import annotations

import torch

from diffquant.convert.footprint import PartSource
from diffquant.convert.footprint.decode import Serving
from diffquant.convert.logical import LogicalSource
from diffquant.convert.match import PartMatch
from diffquant.core.errors import ArchitectureError
from diffquant.runtime.kernels import KERNELS, best
from diffquant.runtime.loading import MODELS, model_for

__all__ = ["part_source"]

_STORAGE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def part_source(
    logical: LogicalSource, part: PartMatch, *, dtype: torch.dtype, device: str
) -> PartSource:
    """Describe a part of an opened file as `open_pipeline` will load it.

    Args:
        logical: the file.
        part: of it.
        dtype: what it will compute in.
        device: torch device it will compute on.

    Raises:
        ArchitectureError: no model here serves this kind of part.
    """
    kind = model_for(part.kind)
    if kind is None:
        raise ArchitectureError(f"the runtime has no {part.kind}, which the {part.name} is")
    row, on = MODELS[kind], torch.device(device).type

    def backend(fmt: str) -> str:
        return best(fmt, on, dtype).backend if fmt in KERNELS else "torch"

    serving = Serving(backend, copies_kernels=on == "cpu")
    return PartSource(logical, part, row.layout, row.reads, _STORAGE[dtype], serving, decodes=True)
