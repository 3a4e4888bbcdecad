"""Metrics without weights or other programs: PSNR, SSIM, and the demo checkpoints' prompt score."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffquant.runtime.judges import psnr_db, ssim
from diffquant.runtime.metrics import Judge, MetricNeeds, Missing
from diffquant.runtime.scorers import parse, score

__all__ = ["open_prompt", "open_psnr", "open_ssim"]

Picture = NDArray[np.float32]
_WINDOW = 7  # of scikit-image's structural_similarity


def open_psnr(_needs: MetricNeeds) -> Judge:
    """PSNR in dB, None for identical pictures."""

    def judge(reference: Picture, candidate: Picture, _prompt: str) -> float | None:
        return psnr_db(reference, candidate)

    return judge


def open_ssim(needs: MetricNeeds) -> Judge | Missing:
    """Structural similarity, up to 1."""
    if min(needs.size) < _WINDOW:
        return Missing(f"pictures are {_size(needs)}, SSIM takes 7x7 or more: use a larger --size")

    def judge(reference: Picture, candidate: Picture, _prompt: str) -> float | None:
        return ssim(reference, candidate)

    return judge


def open_prompt(needs: MetricNeeds) -> Judge | Missing:
    """Share of what the prompt asked for that the candidate shows, for prompts of the demo grammar.

    One prompt of another form makes the column missing: a mean over some of them would not be what
    it says.
    """
    for prompt in needs.prompts:
        try:
            parse(prompt)
        except ValueError:
            return Missing(
                f"prompt {prompt[:60]!r} is outside the demo checkpoints' grammar, such as "
                "'a small red circle on a blue background at the left'"
            )
    if needs.size[0] != needs.size[1]:
        return Missing(f"pictures are {_size(needs)}, the prompt score takes squares")

    def judge(_reference: Picture, candidate: Picture, prompt: str) -> float | None:
        return score(candidate, prompt).total

    return judge


def _size(needs: MetricNeeds) -> str:
    return "x".join(map(str, needs.size))
