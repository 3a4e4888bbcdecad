"""What does each number format lose on Gaussian weights? The source of FORMATS' gaussian_error.

python benchmarks/gaussian_error.py [--json FILE] [--rows 4096] [--columns 4096]

Relative RMSE of a round trip at three standard deviations: a format with scales does not care, a
plain cast does (of weights with deviation 0.02, half lie below fp8's smallest normal value). A row
of int8_rowwise shares one scale, so its error grows slowly with the number of columns. Formats
without a mode without importance get ones; formats that are only read are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS, QuantFormat
from diffquant.quant.metrics import ErrorStats

DEVIATIONS = (1.0, 0.02, 0.005)


def round_trip(row: QuantFormat, weight: np.ndarray) -> ErrorStats:
    stats = None
    if row.passes == 2:
        stats = backend(row.codec, "reduce")(weight, None, fmt=row.name)
    extra = {}
    if row.importance == "required":
        extra["importance"] = np.ones(weight.shape[1], np.float32)
    parts = backend(row.codec, "encode")(weight, stats, fmt=row.name, **extra)
    result = ErrorStats()
    result.add(weight, backend(row.codec, "decode")(parts, weight.shape, fmt=row.name))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    arguments = parser.parse_args()
    normal = np.random.default_rng(0).standard_normal(
        (arguments.rows, arguments.columns), dtype=np.float32
    )
    found = {}
    print(f"{'format':16} {'bits':>7}" + "".join(f"  std {std:<8g}" for std in DEVIATIONS) + " row")
    for name, row in FORMATS.items():
        if not row.encodes:
            continue
        errors = [round_trip(row, normal * np.float32(std)).relative_rmse for std in DEVIATIONS]
        bits = row.nbytes(normal.shape) * 8 / normal.size
        found[name] = {"bits": bits, **dict(zip(map(str, DEVIATIONS), errors, strict=True))}
        cells = "".join(f"  {error:<12.4g}" for error in errors)
        print(f"{name:16} {bits:7.4f}{cells} {row.gaussian_error:g}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"weights": normal.size, "errors": found}, indent=2))


if __name__ == "__main__":
    main()
