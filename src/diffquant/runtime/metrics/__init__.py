"""JUDGE_ROWS: what computes each metric of a comparison, and what it needs. One row a metric.

Every metric is a function of a pair: (reference, candidate, prompt) -> value; pictures are
(H, W, 3) float32 in [0, 1]. NaN is the value where a picture is not finite; None where a metric has
none (the PSNR of identical pictures). A metric that cannot run here is `Missing`, with the reason
and what to do: its column stays.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.runtime.comparison import METRICS

__all__ = [
    "JUDGE_ROWS",
    "Judge",
    "JudgeRow",
    "MetricNeeds",
    "Missing",
    "Opened",
    "check_names",
    "open_judges",
]

Picture: TypeAlias = NDArray[np.float32]
Judge: TypeAlias = Callable[[Picture, Picture, str], float | None]


@dataclass(frozen=True, slots=True)
class MetricNeeds:
    """What metrics may ask for.

    Attributes:
        prompts: of the comparison.
        size: (width, height) of its pictures.
        lpips_weights: safetensors or torch file of LPIPS, None: where torchvision keeps its own.
        clip_model: folder or Hub id of a CLIP model, None: no CLIP score.
        device: torch device for networks.
    """

    prompts: tuple[str, ...] = ()
    size: tuple[int, int] = (512, 512)
    lpips_weights: Path | None = None
    clip_model: str | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Missing:
    """Why a metric has no values here, and what would give it some."""

    why: str


@dataclass(frozen=True, slots=True)
class JudgeRow:
    """A metric's implementation.

    Attributes:
        opener: "module:function" of (needs) -> Judge | Missing; imported when asked for.
        needs: what it takes beside diffquant's own dependencies, for people; "" nothing.
        alone: whether it judges the candidate's picture by its prompt, without the reference.
    """

    opener: str
    needs: str = ""
    alone: bool = False

    def open(self, needs: MetricNeeds) -> Judge | Missing:
        """The function, or why there is none."""
        module, _, name = self.opener.partition(":")
        found: Judge | Missing = getattr(importlib.import_module(module), name)(needs)
        return found


_HERE = "diffquant.runtime.metrics"
JUDGE_ROWS: Mapping[str, JudgeRow] = {
    "psnr": JudgeRow(f"{_HERE}.pixels:open_psnr"),
    "ssim": JudgeRow(f"{_HERE}.pixels:open_ssim"),
    "flip": JudgeRow(f"{_HERE}.perceptual:open_flip"),
    "ssimulacra2": JudgeRow(f"{_HERE}.perceptual:open_ssimulacra2"),
    "lpips": JudgeRow(f"{_HERE}.lpips:open_lpips", "weights of AlexNet and of LPIPS's heads"),
    "clip": JudgeRow(f"{_HERE}.clip_score:open_clip", "transformers and a CLIP model", alone=True),
    "prompt": JudgeRow(f"{_HERE}.pixels:open_prompt", "prompts of the demo grammar", alone=True),
}


@dataclass(frozen=True, slots=True)
class Opened:
    """Metrics ready to run, in the order asked for, and why others are not."""

    judges: Mapping[str, Judge]
    missing: Mapping[str, str]

    def judge(self, reference: Picture, candidate: Picture, prompt: str) -> dict[str, float | None]:
        """Every metric of one pair; NaN for all where the candidate is not finite."""
        finite = bool(np.isfinite(reference).all() and np.isfinite(candidate).all())
        return {
            name: judge(reference, candidate, prompt) if finite else float("nan")
            for name, judge in self.judges.items()
        }


def check_names(names: Sequence[str]) -> None:
    """Refuse names that are no metrics, before anything is opened.

    Raises:
        UnknownFormat: no such metric.
        UsageError: one comes twice.
    """
    for index, name in enumerate(names):
        if name not in METRICS:
            raise UnknownFormat(name, METRICS, what="metric")
        if name in names[:index]:
            raise UsageError(f"metric {name} is asked for twice; give it once")


def open_judges(names: Sequence[str], needs: MetricNeeds) -> Opened:
    """Open metrics.

    Args:
        names: keys of METRICS, each once.
        needs: what they may ask for.

    Raises:
        UnknownFormat: no such metric.
        UsageError: one comes twice.
        DiffquantError: a file that was named is not what it should be.
    """
    check_names(names)
    judges: dict[str, Judge] = {}
    missing: dict[str, str] = {}
    for name in names:
        found = JUDGE_ROWS[name].open(needs)
        if isinstance(found, Missing):
            missing[name] = found.why
        else:
            judges[name] = found
    return Opened(judges, missing)
