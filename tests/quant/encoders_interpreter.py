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
from awkward_weights import awkward_weights, importance_rows, not_finite
from scale_bits import blocks_near_powers

from diffquant.quant.backends import BACKENDS, WEIGHTED_ON_CARDS, backend
from diffquant.quant.codecs.iq_search import RULES
from diffquant.quant.codecs.triton import (
    convrot_w4a4,
    flat_blocks,
    importance,
    iq_search,
    launch,
    weighted,
)
from diffquant.quant.formats import FORMATS

NAMES = [name for name, row in FORMATS.items() if (row.codec, "encode", "cuda") in BACKENDS]
ROWS, COLUMNS = 4, 1024  # of every kind of weight
LANES = 1 << 13
SIXTEENS = ("q2_k", "q3_k", "q6_k", "asym_w4a8_int8")  # their sub-blocks are half as long
TWINS = (  # share their kernels with another here
    *("q4_1", "q5_0", "q4_k", "iq4_nl", "iq3_s", "iq2_s", "iq2_xs", "iq2_xxs"),
    *("int8_convrot_64", "int8_convrot_16", "convrot_w4a4_64"),
    *("asym_w4a8_int8_64", "asym_w4a8_int8_16"),
)
FEW = ("gaussian", "signed zeros", "constant blocks", "smallest subnormal", "blocks of all sizes")
# Of formats with one scale for the whole weight, each for itself, where not all are.
TINY = ("zeros", "negative zeros", "subnormal", "smallest subnormal", "elements of all sizes")


def different(name, weight, importance=None, stats=None):
    """How many bytes of each part differ, where any does."""
    codec = FORMATS[name].codec
    here, there = {}, {}
    if importance is not None:
        here, there = {"importance": importance}, {"importance": torch.from_numpy(importance)}
    wanted = backend(codec, "encode")(weight, stats, fmt=name, **here)
    rows = torch.from_numpy(weight.copy())
    found = backend(codec, "encode", "cuda")(rows, stats, fmt=name, **there)
    assert found.keys() == wanted.keys()
    result = {}
    for key, part in wanted.items():
        got = found[key].numpy()
        if got.shape != part.shape or got.dtype != part.dtype:
            result[key] = f"{got.dtype} {got.shape}, not {part.dtype} {part.shape}"
        elif count := int(
            (got.reshape(-1).view(np.uint8) != part.reshape(-1).view(np.uint8)).sum()
        ):
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
            flat_blocks._BLOCKS, flat_blocks._NESTED = 512, 2
            plain = columns if FORMATS[name].importance == "required" else None
            found = different(name, everything, plain)
            if found:  # say which
                found = {kind: different(name, array, plain) for kind, array in weights.items()}
            if name not in TWINS or "all" in sys.argv:
                found |= further(name, everything, columns)
                found |= whole_weights(name, everything, weights)
            results[name] = {case: what for case, what in found.items() if what}
    json.dump(results, sys.stdout)


def further(name, everything, columns):
    """With importance, and weights that end inside a program."""
    found, required = {}, FORMATS[name].importance == "required"
    if FORMATS[name].codec in WEIGHTED_ON_CARDS and not required:
        found["importance"] = different(name, everything, columns)
    plain = columns[:256] if required else None
    if FORMATS[name].rotation:  # finite weights whose sums are not
        loud = np.clip(everything[:12] * np.float32(1e37), -3e38, 3e38)
        found["infinite sums"] = different(name, loud)
    if name in ("mxfp4", "mxfp8"):
        found["near powers of two"] = different(name, blocks_near_powers())
    if name in ("mxfp4", "mxfp8", "nf4", "fp4"):
        found["not finite"] = different(name, not_finite())
    # Two programs, and the second one ends inside.
    launch.LANES[name] = launch.Lanes(32, 1)
    rows = 3 if name in SIXTEENS else 5
    iq_search._TRIALS = launch.Lanes(1024, 1)
    found["odd rows"] = different(name, everything[:rows, :256].copy(), plain)
    found["no rows"] = different(
        name, everything[:0, :256] if name in RULES else everything[:0], plain
    )
    iq_search._TRIALS = launch.Lanes(LANES, 1)
    if name == "convrot_w4a4":  # rows in two tiles, the second one ends inside
        convrot_w4a4._TILE = 512
        found["two tiles"] = different(name, everything[:5, :768].copy())
    if FORMATS[name].flat_block:
        flat_blocks._BLOCKS = 16
        for n in (33, 64, 65, 100, 127):  # blocks that end with the weight, odd ones too
            found[f"{n} weights"] = different(name, everything[:1, :n].copy())
            found[f"{n} zeros"] = different(name, np.zeros((1, n), np.float32))
    if FORMATS[name].is_padded:
        for shape in ((1, 1), (33, 70), (5, 31), (130, 129)):  # rows and columns of padding
            found[f"{shape}"] = different(name, np.resize(everything[::5, ::3], shape))
    return found


def whole_weights(name, everything, weights):
    """Formats that need a statistic of the whole weight: of each, and one that was given."""
    found = {}
    if FORMATS[name].passes == 2:
        for kind in weights if "all" in sys.argv else TINY:
            found[kind] = different(name, weights[kind].reshape(128, -1))
        stats = backend(FORMATS[name].codec, "reduce")(everything, None, fmt=name)
        found["a part"] = different(name, weights["gaussian"].reshape(128, -1), stats=stats)
    return found


if __name__ == "__main__":
    main()
