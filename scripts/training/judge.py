"""Load a saved pipeline as any user would, draw held-out prompts, and score the pictures."""

from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from bank import scorers
from families import Family
from PIL import Image

__all__ = ["Verdict", "judge"]

SEED = 1234


@dataclass(frozen=True)
class Verdict:
    """Scores of one sample sheet.

    Attributes:
        psnr_db: squared error pooled over all pictures, against the right ones.
        attributes: mean of each answer of the scorer.
    """

    prompts: int
    score: float
    perfect: int
    psnr_db: float
    attributes: dict[str, float]


def judge(family: Family, folder: Path, prompts: list[str], sheet: Path, *, steps: int) -> Verdict:
    """Generate one picture per prompt in float32, write the first eight as a PNG, score all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    sampler = getattr(diffusers, family.sampler)
    pipeline.scheduler = sampler.from_config(pipeline.scheduler.config)
    pipeline.to(device)
    options: dict[str, object] = {"guidance_scale": family.guidance}
    if family.name == "qwen_image":
        options = {"true_cfg_scale": family.guidance, "negative_prompt": [" "] * len(prompts)}
    noise = [torch.Generator("cpu").manual_seed(SEED + i) for i in range(len(prompts))]
    pictures = pipeline(
        prompt=prompts,
        height=scorers.SIDE,
        width=scorers.SIDE,
        num_inference_steps=steps,
        generator=noise,
        output_type="np",
        **options,
    ).images
    right = np.stack([scorers.render(p) for p in prompts])
    found = [scorers.score(np.nan_to_num(x), p) for x, p in zip(pictures, prompts, strict=True)]
    rows = [np.concatenate(list(block[:8]), axis=1) for block in (pictures, right)]
    sheet.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.rint(np.concatenate(rows) * 255).astype(np.uint8)).save(sheet)
    mse = float(np.mean((pictures.astype(np.float64) - right) ** 2))
    names = ("background", "colour", "place", "size", "shape")
    return Verdict(
        prompts=len(prompts),
        score=float(np.mean([s.total for s in found])),
        perfect=sum(s.total == 1.0 for s in found),
        psnr_db=-10 * float(np.log10(max(mse, 1e-12))),
        attributes={n: float(np.mean([getattr(s, n) for s in found])) for n in names},
    )
