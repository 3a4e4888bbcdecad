"""What a comparison found: plain data, for tables, files and pages.

One row a file, and two that say what the numbers are worth: the *floor* (the reference against
itself in bfloat16: no file can be asked to be nearer) and the *control* (the first candidate with
one block damaged: a metric that does not see it judges nothing).

Metrics are named by METRICS' keys. A metric that could not be computed stands in `missing` with the
reason; its cells stay empty and its column stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "METRICS",
    "Comparison",
    "ComparisonPictures",
    "LayerError",
    "Metric",
    "PairValues",
    "Row",
    "Value",
]


@dataclass(frozen=True, slots=True)
class Metric:
    """A column.

    Attributes:
        title: as a table's head has it.
        unit: behind the number, "" for none.
        better: "up" where a larger value is nearer to the reference, else "down".
        digits: decimals shown.
        source: the program or definition that computes it.
    """

    title: str
    unit: str
    better: str
    digits: int
    source: str


METRICS: Mapping[str, Metric] = {
    "psnr": Metric("PSNR", "dB", "up", 1, "pooled squared error, pictures in [0, 1]"),
    "ssim": Metric("SSIM", "", "up", 4, "scikit-image, 7x7 windows"),
    "flip": Metric("FLIP", "", "down", 4, "flip-evaluator (NVIDIA), 67 pixels per degree"),
    "ssimulacra2": Metric("SSIMULACRA2", "", "up", 1, "ssimulacra2"),
    "lpips": Metric("LPIPS", "", "down", 4, "LPIPS 0.1, AlexNet"),
    "clip": Metric("CLIP score", "", "up", 3, "cosine of picture and prompt"),
    "prompt": Metric("prompt score", "", "up", 3, "share of what the prompt asked for"),
}


@dataclass(frozen=True, slots=True)
class Value:
    """A metric over all pairs.

    Attributes:
        mean: pooled for psnr (dB of the mean squared error), the mean for others; None where
            pictures are identical and the metric has no value for that.
        low, high: 95 % bootstrap interval over pairs, None below two pairs.
        worst: the pair furthest from the reference.
    """

    mean: float | None
    low: float | None = None
    high: float | None = None
    worst: float | None = None


@dataclass(frozen=True, slots=True)
class PairValues:
    """One prompt and seed of one row: metric -> value, and what is wrong with the picture."""

    prompt: str
    seed: int
    values: Mapping[str, float | None]
    defects: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerError:
    """Relative RMSE of one weight against the reference's, as `verify --level tensors` has it."""

    key: str
    part: str
    stored: str
    error: float
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """A candidate, the noise floor or the control.

    Attributes:
        name: unique in the comparison; of files, the base name.
        kind: "candidate", "floor" or "control".
        type: TYPES label of the file, "" where unknown.
        nbytes: of the file or folder; None for floor and control.
        bits_per_weight: of the compared part.
        values: METRICS key -> value; a key that is absent was not computed.
        identical: every picture equals the reference's.
        weight_error: relative RMSE over quantized weights.
        latent_error: relative RMSE of the last latents: a diagnosis, never a judge.
        layers: per weight, file order; empty where not compared.
        peak_mib: anonymous memory at its highest while this row was drawn (device memory on a GPU).
        seconds: per picture, median.
        verdict: pass, warn, fail, or "" for rows that are not judged: floor and control, and
            candidates without gates that are not broken.
        problems: what made it not pass, and notes.
        stored: what the weights are stored as, in words.
    """

    name: str
    kind: str
    type: str = ""
    nbytes: int | None = None
    bits_per_weight: float | None = None
    values: Mapping[str, Value] = field(default_factory=dict)
    identical: bool = False
    weight_error: float | None = None
    latent_error: float | None = None
    layers: tuple[LayerError, ...] = ()
    pairs: tuple[PairValues, ...] = ()
    peak_mib: float | None = None
    seconds: float | None = None
    verdict: str = ""
    problems: tuple[str, ...] = ()
    stored: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything a table, a CSV or a page needs, but the pictures.

    Attributes:
        reference: base name of the reference; `reference_nbytes` its size.
        part: what differed: "denoiser", or the part that --only named.
        metrics: METRICS keys asked for, in column order.
        missing: METRICS key -> why it has no values here.
        gates: what had to be reached, such as {"psnr": 25.0}.
        engine, device, dtype: what drew.
        reference_score: prompt score of the reference's own pictures.
        reference_values: of its own pictures, metrics that need no reference (clip, prompt).
        reference_seconds, reference_peak_mib: as in Row.
        warnings: what is odd about the comparison as a whole.
        sampler: as asked for, "" for the model's default.
        synthetic: what stood for a text encoder and a VAE where there was none, else "".
    """

    reference: str
    reference_nbytes: int
    architecture: str
    variant: str
    part: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    cfg: float | None
    size: tuple[int, int]
    metrics: tuple[str, ...]
    missing: Mapping[str, str]
    gates: Mapping[str, float]
    rows: tuple[Row, ...]
    engine: str = ""
    device: str = "cpu"
    dtype: str = "float32"
    reference_score: float | None = None
    tool: str = ""
    reference_values: Mapping[str, Value] = field(default_factory=dict)
    reference_seconds: float | None = None
    reference_peak_mib: float | None = None
    warnings: tuple[str, ...] = ()
    synthetic: str = ""
    sampler: str = ""

    @property
    def candidates(self) -> tuple[Row, ...]:
        """The rows that are files."""
        return tuple(row for row in self.rows if row.kind == "candidate")


@dataclass(frozen=True, slots=True)
class ComparisonPictures:
    """(H, W, 3) floats in [0, 1], prompts outermost, then seeds; Row.name -> its pictures.

    A picture that could not be drawn is NaN all over. `rows` is empty where pictures were not kept.
    """

    reference: tuple[NDArray[np.float32], ...]
    rows: Mapping[str, tuple[NDArray[np.float32], ...]]
