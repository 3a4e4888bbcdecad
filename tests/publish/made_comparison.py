"""A comparison made up: five files, floor and control, two prompts, numbers chosen by hand."""

from dataclasses import replace

import numpy as np

from diffquant.runtime.comparison import (
    Comparison,
    ComparisonPictures,
    LayerError,
    PairValues,
    Row,
    Value,
)

__all__ = ["HOSTILE", "MADE", "drawn", "row", "with_rows"]

HOSTILE = "</script></style><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}"
PROMPTS = ("a red circle", "a star")


def layers(stored, error):
    found = [LayerError("img_in.weight", "denoiser", "bf16", 0.0, 2048)]
    found += [
        LayerError(f"blocks.{n}.attn.weight", "denoiser", stored, error * (1 + n / 10), 1152)
        for n in range(5)
    ]
    return (*found, LayerError("final.weight", "denoiser", "f32", 0.0, 4096))


def row(label, nbytes, psnr, flip, **changes):
    values = {"flip": Value(flip, flip / 2, flip * 2, flip * 3)}
    if psnr is not None:
        values["psnr"] = Value(psnr, psnr - 2, psnr + 3, psnr - 4)
    pairs = tuple(PairValues(prompt, 0, {"psnr": psnr, "flip": flip}) for prompt in PROMPTS)
    fields = {
        "name": f"tiny-{label}.gguf",
        "kind": "candidate",
        "type": label,
        "nbytes": nbytes,
        "bits_per_weight": nbytes / 250_000,
        "values": values,
        "weight_error": flip / 2,
        "layers": layers(label, flip / 2),
        "pairs": pairs,
        "seconds": 1.25,
        "verdict": "pass",
        "stored": f"{label} 61%, bf16 39%",
    }
    return Row(**{**fields, **changes})


def beside(name, kind, psnr, flip):
    plain = row("", 0, psnr, flip, name=name, kind=kind, layers=(), verdict="", stored="")
    return replace(plain, nbytes=None, bits_per_weight=None)


ROWS = (
    row("f32", 8_000_000, None, 0.0, identical=True, values={"psnr": Value(None)}),
    row("q8_0", 2_200_000, 44.0, 0.004),
    row("q4_k_s", 1_300_000, 28.0, 0.05, verdict="warn", problems=("MIXED: small rows",)),
    row("nf4", 1_350_000, 26.0, 0.06),
    row("q4_0", 1_200_000, 19.0, 0.2, verdict="fail", problems=("psnr 19.00 dB is below 25 dB",)),
    beside("noise floor", "floor", 50.0, 0.002),
    beside("control", "control", 7.5, 0.9),
)

MADE = Comparison(
    reference="tiny",
    reference_nbytes=8_100_000,
    architecture="sd15",
    variant="base",
    part="denoiser",
    prompts=PROMPTS,
    seeds=(0,),
    steps=12,
    cfg=3.0,
    size=(32, 32),
    metrics=("psnr", "flip", "lpips"),
    missing={"lpips": "no weights of AlexNet"},
    gates={"psnr": 25.0, "weight_error": 0.5},
    rows=ROWS,
    engine="diffquant 0",
    tool="diffquant 0",
    reference_values={"prompt": Value(0.95)},
)


def with_rows(*rows, **changes):
    return replace(MADE, rows=rows, **changes)


def drawn(comparison=MADE, width=32, height=32, seed=0):
    rng = np.random.default_rng(seed)
    count = len(comparison.prompts) * len(comparison.seeds)
    exact = tuple(rng.random((height, width, 3), np.float32) for _ in range(count))
    other = {
        one.name: tuple(np.clip(picture + 0.02 * at, 0, 1) for picture in exact)
        for at, one in enumerate(comparison.rows)
    }
    return ComparisonPictures(exact, other)
