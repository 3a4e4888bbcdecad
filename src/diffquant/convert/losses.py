"""What an output cannot give back of its source: said in the plan, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

from diffquant.convert.logical import LogicalSource
from diffquant.convert.request import Request
from diffquant.convert.step import Step
from diffquant.core.errors import shorten

__all__ = ["DESCRIBES_ENCODING", "losses"]

# Header keys that say how the source itself was encoded: they are false of anything else.
DESCRIBES_ENCODING = (
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
    "comfy.gguf.orig_shape.",
    "quantize.imatrix.",
    "split.",
    "_quantization_metadata",
)
_OURS = ("general.architecture", "general.type", "diffquant.", "format")
# Containers whose headers hold the same kind of values.
_KEEP = {"gguf": "gguf", "safetensors": "safetensors", "sharded": "safetensors"}


def losses(logical: LogicalSource, steps: Sequence[Step], request: Request) -> list[str]:
    """Rounding that stays in decoded weights, and header keys that have no place."""
    out = []
    rounded: dict[str, int] = {}
    for step in steps:
        tensors = [logical.tensors[piece.key] for piece in step.assignment.pieces]
        for name in sorted(
            {one.format or one.dtype.lower() for one in tensors if one.is_quantized}
        ):
            if step.decision.format:
                rounded[name] = rounded.get(name, 0) + 1
    if rounded:
        listed = ", ".join(f"{count} from {name}" for name, count in rounded.items())
        out.append(f"weights that were quantized before keep that rounding: {listed}")
    metadata = logical.source.metadata
    if _KEEP.get(logical.source.container) != request.container:
        names = {key: key.rpartition("/")[2] for key in metadata}  # folders: "unet/format"
        ours = (*DESCRIBES_ENCODING, *_OURS)
        lost = [key for key, name in names.items() if not name.startswith(ours)]
        if lost:
            out.append(
                f"{len(lost)} header keys have no place in a {request.container} output: "
                f"{shorten(lost, 4)}"
            )
    return out
