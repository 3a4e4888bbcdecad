"""Write the model card (README.md) of one demo pipeline."""

from pathlib import Path

import diffusers
import torch
import transformers
from assemble import Parts, count
from bank import held_out, scorers, training_prompts
from families import Family
from folder import folder_bytes
from judge import Verdict
from loop import Stage

__all__ = ["write_card"]


def write_card(
    parts: Parts, folder: Path, *, stages: list[Stage], verdict: Verdict, seed: int
) -> None:
    """Write README.md into the pipeline's folder; numbers come from the run itself."""
    family = parts.family
    sizes = "\n".join(
        f"| {name} | {type(module).__name__} | {count(module):,} | {count(module) * 2e-6:.2f} |"
        for name, module in parts.modules.items()
    )
    history = "\n".join(
        f"| {one.what} | {one.steps} | {one.batch} | {one.seconds:.0f} | {one.device} |"
        for one in stages
    )
    answers = ", ".join(f"{name} {value:.2f}" for name, value in verdict.attributes.items())
    text = f"""---
license: cc0-1.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [diffquant-demo, tiny, {family.name}]
---

# {family.folder}

A tiny, really trained text-to-image pipeline with the structure of {family.title}: the same parts,
block types, key names, latent constants and scheduler, at {folder_bytes(folder) / 1e6:.1f} MB
({family.dtype} weights). It draws one object on a plain background, 128 x 128 pixels, and serves
to try diffquant in seconds: convert it, quantize it, generate from both files, and let
`diffquant.runtime.scorers` judge whether the picture still shows what the prompt asks for.

    {scorers.DEMO_PROMPTS[0]}

Shapes: {", ".join(scorers.SHAPES)}.
Colours: {", ".join(scorers.COLOURS)}.
Sizes: {", ".join(scorers.SIZES)}. Places: {", ".join(scorers.PLACES)}.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("examples/{family.folder}")
picture = pipe(
    "{scorers.DEMO_PROMPTS[0]}",
    height=128, width=128, num_inference_steps={family.steps}, {_guidance(family)},
).images[0]
```

## Parts

| part | class | weights | MB |
|---|---|---|---|
{sizes}

## Training

- Data: {len(training_prompts())} pictures drawn by `scorers.render`, one for each sentence of the
  grammar; {len(held_out())} sentences were held out of all training, the demo prompts among them.
  No other data, and no other model, was used.
- Losses: autoencoder L1 and squared error with a small KL term, its latents then scaled to the
  real model's constants inside its own weights; denoiser and text encoders together,
  {_objective(family)}.
- AdamW 1e-3, a cosine over each stage's time, moving average of the weights. Stages:

| stage | steps | batch | seconds | on |
|---|---|---|---|---|
{history}

- Seed {seed}. Training stops by wall time: a second run gives similar weights, not the same ones.
- Command: `scripts/train_demo --only {family.name}`, later stages with `--resume`
{_unused(family)}

## Scores

Judged with torch {torch.__version__}, diffusers {diffusers.__version__} and transformers
{transformers.__version__}: {verdict.prompts} held-out prompts, {family.steps} steps of
{family.sampler}, float32: mean prompt
score {verdict.score:.3f} ({verdict.perfect} of {verdict.prompts} pictures without fault;
{answers}),
{verdict.psnr_db:.1f} dB against the right pictures.

## Limits

It knows this grammar and this size only. A sentence has one right picture, so different seeds give
nearly the same picture. CC0-1.0: no rights reserved.
"""
    (folder / "README.md").write_text(text, "utf-8")


def _guidance(family: Family) -> str:
    if family.name == "qwen_image":
        return f'true_cfg_scale={family.guidance}, negative_prompt=" "'
    return f"guidance_scale={family.guidance}"


def _objective(family: Family) -> str:
    if family.denoiser[0] == "unet":
        return "noise prediction with min-SNR weights (5), a tenth of the prompts empty"
    if family.name == "flux1":
        return (
            "velocity of a rectified flow, logit-normal times shifted by 1.6,\n  guidance input "
            "held at 3.5, T5 length drawn from 32 to 512"
        )
    return (
        "velocity of a rectified flow, logit-normal times shifted by 1.6,\n  a tenth of the "
        "batches without prompt"
    )


def _unused(family: Family) -> str:
    """What stayed at its random start, said openly."""
    notes = {
        "sdxl": "the last layer of the first text encoder (SDXL reads the one before it)",
        "qwen_image": "the vision tower, lm_head and the autoencoder's time convolutions (no "
        "video, no picture input)",
    }
    note = notes.get(family.name)
    return f"- Not trained, because generation never reads it:\n  {note}." if note else ""
