"""What each column of a comparison means, in a line; metrics name who defined them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from diffquant.runtime.comparison import METRICS

__all__ = ["COLUMN_MEANINGS", "METRIC_MEANINGS", "meanings_of"]

METRIC_MEANINGS: Mapping[str, str] = {
    "psnr": "Squared difference of all pixels in decibels, over all pictures together; higher is "
    "nearer.",
    "ssim": "Likeness of local means, contrasts and structures, mean of pictures; 1 is identical.",
    "flip": "The difference seen when one picture is flipped to the other on a screen; 0 is "
    "identical, 1 the most.",
    "ssimulacra2": "Visible distortion; 100 is identical, 90 very high, 70 high, 50 medium and 30 "
    "low quality.",
    "lpips": "Distance of what a trained network sees in both pictures; 0 is identical.",
    "clip": "How well a picture fits its prompt to a CLIP model; compare with the reference's.",
    "prompt": "Share of what the prompt asks for (shape, colours, place, size) that the picture "
    "shows; compare with the reference's.",
}

COLUMN_MEANINGS: tuple[tuple[str, str], ...] = (
    ("Noise floor", "The reference drawn again in bfloat16: differences beyond it are of the size "
     "of rounding, and no file can be asked to be nearer."),
    ("Control", "A file with one block damaged on purpose: a metric that does not see it judges "
     "nothing."),
    ("Small numbers", "95 % bootstrap interval over pictures, and the picture that is furthest."),
    ("Size", "Of the file or folder, and its share of the reference's."),
    ("Bits per weight", "Of the part that is compared, scales included."),
    ("Weight error", "Relative root mean square error of the decoded weights; 0 is exact."),
    ("Latent error", "The same of the last latents: it tells where a difference is from and judges "
     "nothing."),
    ("Peak memory", "Highest while pictures were drawn on the machine that measured."),
    ("Front", "Files that no other beats in both size and quality."),
    ("Difference", "The largest of the three channels, before rounding to 8 bits; brightness "
     "follows its square root, on the same scale everywhere."),
)  # fmt: skip


def meanings_of(metrics: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """(title, what it means and its source) of these metrics."""
    return tuple(
        (METRICS[name].title, f"{METRIC_MEANINGS[name]} Source: {METRICS[name].source}.")
        for name in metrics
    )
