"""The rows of gpu_memory.py: which rungs and caps each family and type is run at, in what order.

What matters most is first, for time on a GPU ends: everything in memory, with which the others are
compared, then the cap that was promised, then streaming by blocks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """One row.

    Attributes:
        name: as --runs takes it.
        level: of a rung; "" for a cap.
        stay: share of the blocks that stay on the device, at level blocks.
        pinned: whether streamed weights wait in page-locked memory.
        decoder: how the autoencoder works.
        cap: GiB in all, context included; the planner chooses.
        tiny_vae: decode with TAESD.
        offload: level that the planner is held to under a cap.
    """

    name: str
    level: str = ""
    stay: float = 0.0
    pinned: bool = False
    decoder: str = "whole"
    cap: float = 0.0
    tiny_vae: bool = False
    offload: str = "auto"


RUNGS = {
    run.name: run
    for run in (
        Run("none", "none"),
        Run("model", "model"),
        Run("blocks", "blocks", pinned=True),
        Run("blocks half", "blocks", stay=0.5, pinned=True),
        Run("blocks file", "blocks"),
        Run("sequential", "sequential", pinned=True),
        Run("sequential file", "sequential"),
        Run("sequential strips", "sequential", pinned=True, decoder="strips"),
        Run("sequential host", "sequential", pinned=True, decoder="host"),
    )
}
CAPS = {
    ("sd15", "bf16"): (Run("cap 2", cap=2),),
    ("sdxl", "bf16"): (
        Run("cap 4", cap=4),
        Run("none tiny", "none", tiny_vae=True),
        Run("sequential tiny", "sequential", pinned=True, tiny_vae=True),
        Run("cap 1 tiny", cap=1, tiny_vae=True, offload="sequential"),
    ),
    ("flux1", "q4_k_s"): (Run("cap 6", cap=6),),
    ("qwen_image", "q4_k_s"): (Run("cap 8", cap=8),),
}
ALL = ("none", "blocks", "model", "sequential", "blocks half", "blocks file", "sequential file")
FULL, BRIEF = ALL, ("none", "blocks")
# The small exact case: SD1.5 at 256 pixels in float32, on every rung there is.
EXACT = ("none", "model", "blocks", "blocks half", "blocks file", "sequential strips")
EXACT += ("sequential host", "sequential file")
# (family, type) in the order they are worth: caps are of bf16 or q4_k_s.
ORDER = {
    "sd15": {
        "bf16": FULL,
        "f32": EXACT,
        "q4_k_s": FULL,
        "q8_0": BRIEF,
        "fp8_scaled": BRIEF,
        "nf4": BRIEF,
    },
    "sdxl": {"bf16": FULL, "q4_k_s": FULL, "q8_0": BRIEF, "fp8_scaled": BRIEF, "nf4": BRIEF},
    "flux1": {
        "q4_k_s": FULL,
        "bf16": ("none", "blocks", "model", "sequential"),
        "q8_0": BRIEF,
        "fp8_scaled": BRIEF,
        "nf4": BRIEF,
    },
    "qwen_image": {
        "q4_k_s": ("none", "blocks", "model", "sequential", "blocks file"),
        "bf16": ("none", "blocks"),
        "q8_0": BRIEF,
        "fp8_scaled": BRIEF,
        "nf4": BRIEF,
    },
}
# Of a picture: the first is not counted. All runs of a type take as many, and end alike.
STEPS = {"sd15": 6, "sdxl": 6, "flux1": 6, "qwen_image": 4}
EXACT_STEPS = 3
