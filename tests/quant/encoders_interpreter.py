"""Every encoder for cards under Triton's interpreter, beside the CPU's bytes: JSON on stdout.

With `all` as an argument every case of every format; without it those that share kernels with
another get plain weights only. Searches among grid points, where a lane waits for the one with most
candidates, get a small part of the weights. Run by test_triton_encoders.py in a process of its own,
since the interpreter is chosen when triton is imported. One program takes many lanes: the
interpreter's time goes by operations.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from awkward_weights import awkward_weights, importance_rows

from diffquant.quant.backends import BACKENDS, WEIGHTED_ON_CARDS, backend
from diffquant.quant.codecs.iq_search import RULES
from diffquant.quant.codecs.triton import importance, iq_search, launch, weighted
from diffquant.quant.formats import FORMATS

NAMES = [name for name, row in FORMATS.items() if (row.codec, "encode", "cuda") in BACKENDS]
ROWS, COLUMNS = 4, 1024  # of every kind of weight
LANES = 1 << 13
SIXTEENS = ("q2_k", "q3_k", "q6_k")  # their sub-blocks are half as long
TWINS = ("q4_1", "q5_0", "q4_k", "iq4_nl", "iq3_s", "iq2_s", "iq2_xs", "iq2_xxs")  # share kernels
FEW = ("gaussian", "signed zeros", "constant blocks", "smallest subnormal", "blocks of all sizes")


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


def weights_for(name):
    """Weights by what is awkward about them; importance of columns, its kinds side by side."""
    weights, rows = awkward_weights(), importance_rows().values()
    if name not in RULES:
        return {kind: array[:ROWS] for kind, array in weights.items()}, join(rows, 256)
    kinds = weights if "all" in sys.argv else FEW
    return {kind: weights[kind][:1, :256].copy() for kind in kinds}, join(rows, 64)


def join(rows, count):
    return np.concatenate([row[:count] for row in rows])


def main():
    results = {}
    importance._LANES, weighted._FITS = LANES, launch.Lanes(LANES, 1)
    iq_search._TRIALS = launch.Lanes(LANES, 1)
    with np.errstate(all="ignore"):
        for name in NAMES:
            weights, columns = weights_for(name)
            everything = np.concatenate(list(weights.values()))
            launch.LANES[name] = launch.Lanes(LANES, 4)
            plain = columns if FORMATS[name].importance == "required" else None
            found = different(name, everything, plain)
            if found:  # say which
                found = {kind: different(name, array, plain) for kind, array in weights.items()}
            if name not in TWINS or "all" in sys.argv:
                found |= further(name, everything, columns)
            results[name] = {case: what for case, what in found.items() if what}
    json.dump(results, sys.stdout)


def further(name, everything, columns):
    """With importance, and weights that end inside a program."""
    found, required = {}, FORMATS[name].importance == "required"
    if FORMATS[name].codec in WEIGHTED_ON_CARDS and not required:
        found["importance"] = different(name, everything, columns)
    plain = columns[:256] if required else None
    # Two programs, and the second one ends inside.
    launch.LANES[name] = launch.Lanes(32, 1)
    rows = 3 if name in SIXTEENS else 5
    iq_search._TRIALS = launch.Lanes(1024, 1)
    found["odd rows"] = different(name, everything[:rows, :256].copy(), plain)
    found["no rows"] = different(name, everything[:0, :256], plain)
    iq_search._TRIALS = launch.Lanes(LANES, 1)
    if name == "nf4":
        for n in (33, 64, 65, 100, 127):  # blocks that end with the weight, odd ones too
            found[f"{n} weights"] = different(name, everything[:1, :n].copy())
            found[f"{n} zeros"] = different(name, np.zeros((1, n), np.float32))
    return found


if __name__ == "__main__":
    main()
