"""Every encoder for cards under Triton's interpreter, beside the CPU's bytes: JSON on stdout.

Run by test_triton_encoders.py in a process of its own, since the interpreter is chosen when triton
is imported. One program takes many lanes: the interpreter's time goes by operations.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from awkward_weights import awkward_weights

from diffquant.quant.backends import BACKENDS, backend
from diffquant.quant.codecs.triton import launch

CODECS = [codec for codec, operation, device in BACKENDS if device == "cuda"]
ROWS, COLUMNS = 12, 1024  # of every kind of weight
LANES = 1 << 14


def different(codec, weight):
    """How many bytes of each part differ, where any does."""
    wanted = backend(codec, "encode")(weight, None, fmt=codec)
    there = torch.from_numpy(weight.copy())
    found = backend(codec, "encode", "cuda")(there, None, fmt=codec)
    assert found.keys() == wanted.keys()
    result = {}
    for name, part in wanted.items():
        got = found[name].numpy()
        if got.shape != part.shape or got.dtype != part.dtype:
            result[name] = f"{got.dtype} {got.shape}, not {part.dtype} {part.shape}"
        elif count := int((got.view(np.uint8) != part.view(np.uint8)).sum()):
            result[name] = f"{count} of {part.nbytes} bytes differ"
    return result


def main():
    weights = {name: array[:ROWS] for name, array in awkward_weights().items()}
    everything = np.concatenate(list(weights.values()))
    results = {}
    with np.errstate(all="ignore"):
        for codec in CODECS:
            launch.LANES[codec] = launch.Lanes(LANES, 4)
            found = different(codec, everything)
            if found:  # say which
                found = {name: different(codec, array) for name, array in weights.items()}
            launch.LANES[codec] = launch.Lanes(64, 4)  # programs that end inside the weight
            found["odd rows"] = different(codec, weights["gaussian"][:5, :256].copy())
            found["no rows"] = different(codec, everything[:0])
            results[codec] = {case: what for case, what in found.items() if what}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
