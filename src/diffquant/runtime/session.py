"""generate_picture(): one call from paths and a prompt to a PNG with its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffquant.core.errors import VerificationError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.runtime.judges import defects
from diffquant.runtime.lora import LoraUse, attach
from diffquant.runtime.opening import PartOrigin, open_pipeline
from diffquant.runtime.parameters import save_png

__all__ = ["Made", "generate_picture"]


@dataclass(frozen=True, slots=True)
class Made:
    """What a run made and from what."""

    parameters: dict[str, Any]
    origins: tuple[PartOrigin, ...]
    loras: tuple[LoraUse, ...]
    warnings: tuple[str, ...]


def generate_picture(
    model: Path,
    prompt: str,
    negative: str | None = None,
    *,
    output: Path,
    seed: int = 0,
    steps: int = 20,
    cfg: float | None = None,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    sampler: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    base: Path | None = None,
    vae: Path | None = None,
    loras: tuple[tuple[Path, float], ...] = (),
    progress: Progress = NO_PROGRESS,
) -> Made:
    """Open a model, attach LoRAs, generate one picture and save it.

    Raises:
        DiffquantError: a part, a size, a LoRA or a value that does not fit; one line each.
    """
    compute = getattr(torch, dtype)
    opened = open_pipeline(model, base=base, vae=vae, dtype=compute, device=device)
    uses = attach(opened, loras)
    width, height = size or opened.size
    progress.start("generate", steps, "step")
    try:
        made = opened.pipeline.generate(
            prompt,
            negative,
            seed=seed,
            steps=steps,
            cfg=cfg,
            guidance=guidance,
            width=width,
            height=height,
            sampler=sampler,
            on_step=lambda _done, _total: progress.advance(1),
        )
    finally:
        progress.stop()
    picture = made.images[0].numpy()
    odd = defects(picture)
    if "not finite" in odd:
        raise VerificationError("the decoded picture is not finite: try --dtype float32")
    facts = {
        "prompt": prompt,
        "negative": negative or "",
        "seed": seed,
        "steps": steps,
        "cfg": opened.pipeline.family.cfg if cfg is None else cfg,
        "guidance": guidance,
        "size": [width, height],
        "sampler": made.sampler,
        "model": model.stem if model.is_file() else model.name,
        "dtype": dtype,
        "loras": [[path.name, weight] for path, weight in loras],
    }
    save_png(output, picture, facts)
    warnings = [*opened.warnings, *(f"the prompt was cut: {text!r}" for text in made.truncated)]
    warnings += [f"the picture looks {word}" for word in odd]
    for use in uses:
        warnings += use.warnings
    return Made(facts, opened.origins, uses, tuple(warnings))
