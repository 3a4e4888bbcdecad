"""Every encoder for cards under Triton's interpreter, beside the CPU's bytes: JSON on stdout.

With `all` as an argument every case of every format; without it those that share kernels with
another get plain weights only. Run by test_triton_encoders.py in a process of its own, since the
interpreter is chosen when triton is imported. One program takes many lanes: the interpreter's time
goes by operations.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from awkward_weights import awkward_weights, importance_rows

from diffquant.quant.backends import BACKENDS, WEIGHTED_ON_CARDS, backend
from diffquant.quant.codecs.triton import convrot_w4a4, importance, launch, weighted
from diffquant.quant.formats import FORMATS

NAMES = [name for name, row in FORMATS.items() if (row.codec, "encode", "cuda") in BACKENDS]
ROWS, COLUMNS = 4, 1024  # of every kind of weight
LANES = 1 << 13
SIXTEENS = ("q2_k", "q3_k", "q6_k", "asym_w4a8_int8")  # their sub-blocks are half as long
TWINS = (  # share their kernels with another here
    *("q4_1", "q5_0", "q4_k", "iq4_nl"),
    *("int8_convrot_64", "int8_convrot_16", "convrot_w4a4_64"),
    *("asym_w4a8_int8_64", "asym_w4a8_int8_16"),
)


def different(name, weight, importance=None):
    """How many bytes of each part differ, where any does."""
    codec = FORMATS[name].codec
    here, there = {}, {}
    if importance is not None:
        here, there = {"importance": importance}, {"importance": torch.from_numpy(importance)}
    wanted = backend(codec, "encode")(weight, None, fmt=name, **here)
    rows = torch.from_numpy(weight.copy())
    found = backend(codec, "encode", "cuda")(rows, None, fmt=name, **there)
    assert found.keys() == wanted.keys()
    result = {}
    for key, part in wanted.items():
        got = found[key].numpy()
        if got.shape != part.shape or got.dtype != part.dtype:
            result[key] = f"{got.dtype} {got.shape}, not {part.dtype} {part.shape}"
        elif count := int((got.view(np.uint8) != part.view(np.uint8)).sum()):
            result[key] = f"{count} of {part.nbytes} bytes differ"
    return result


def main():
    weights = {name: array[:ROWS] for name, array in awkward_weights().items()}
    everything = np.concatenate(list(weights.values()))
    columns = np.concatenate([row[:256] for row in importance_rows().values()])  # side by side
    results = {}
    importance._LANES, weighted._FITS = LANES, launch.Lanes(LANES, 1)
    with np.errstate(all="ignore"):
        for name in NAMES:
            launch.LANES[name] = launch.Lanes(LANES, 4)
            found = different(name, everything)
            if found:  # say which
                found = {kind: different(name, array) for kind, array in weights.items()}
            if name not in TWINS or "all" in sys.argv:
                found |= further(name, everything, columns)
            results[name] = {case: what for case, what in found.items() if what}
    json.dump(results, sys.stdout)


def further(name, everything, columns):
    """With importance, and weights that end inside a program."""
    found = {}
    if FORMATS[name].codec in WEIGHTED_ON_CARDS:
        found["importance"] = different(name, everything, columns)
    if FORMATS[name].rotation:  # finite weights whose sums are not
        loud = np.clip(everything[:12] * np.float32(1e37), -3e38, 3e38)
        found["infinite sums"] = different(name, loud)
    # Two programs, and the second one ends inside.
    launch.LANES[name] = launch.Lanes(32, 1)
    rows = 3 if name in SIXTEENS else 5
    found["odd rows"] = different(name, everything[:rows, :256].copy())
    found["no rows"] = different(name, everything[:0])
    if name == "convrot_w4a4":  # rows in two tiles, the second one ends inside
        convrot_w4a4._TILE = 512
        found["two tiles"] = different(name, everything[:5, :768].copy())
    if name == "nf4":
        for n in (33, 64, 65, 100, 127):  # blocks that end with the weight, odd ones too
            found[f"{n} weights"] = different(name, everything[:1, :n].copy())
            found[f"{n} zeros"] = different(name, np.zeros((1, n), np.float32))
    return found


if __name__ == "__main__":
    main()
