"""CLIP score: cosine of a picture's and its prompt's embedding, by transformers' CLIP.

It tells whether a picture shows what was asked for, not whether it is like the reference. Prompts
longer than the model reads are cut, as everybody's CLIP score cuts them.

Source: Hessel et al. 2021 (arXiv 2104.08718), without their factor of 2.5 and clipping at 0.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import UsageError
from diffquant.runtime.metrics import Judge, MetricNeeds, Missing

__all__ = ["open_clip"]

Picture = NDArray[np.float32]


def open_clip(needs: MetricNeeds) -> Judge | Missing:
    """CLIP score, where a model is named and transformers is installed.

    Raises:
        UsageError: what was named is no CLIP model.
    """
    if needs.clip_model is None:
        return Missing("no CLIP model: give a folder or Hub id with --clip-model")
    if importlib.util.find_spec("transformers") is None:
        return Missing("transformers is not installed: pip install 'diffquant[diffusers]'")
    import torch

    model, processor = _load(needs.clip_model)
    model = model.eval().to(needs.device)
    words = {
        "padding": True,
        "truncation": True,
        "max_length": model.config.text_config.max_position_embeddings,
    }

    @torch.no_grad()
    def judge(_reference: Picture, candidate: Picture, prompt: str) -> float | None:
        levels = np.rint(np.clip(candidate, 0, 1) * 255).astype(np.uint8)
        inputs = processor(text=[prompt], images=[levels], return_tensors="pt", **words)
        found = model(**{name: one.to(needs.device) for name, one in inputs.items()})
        return float(torch.cosine_similarity(found.image_embeds, found.text_embeds)[0])

    return judge


def _load(name: str) -> tuple[Any, Any]:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.CLIPModel.from_pretrained(name, use_safetensors=True)
        return model, transformers.CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"--clip-model {name}: expected a folder or Hub id of a CLIP model with "
            f"safetensors and its processor: {first}"
        ) from None
