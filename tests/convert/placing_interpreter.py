"""A demo checkpoint as Q8_0, encoded in Triton's interpreter: run by test_placing.py.

Arguments: source, output. A process of its own, since the interpreter is chosen on import.
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np

from diffquant.convert import jobs
from diffquant.convert.plan import Request
from diffquant.quant.cards import Cards
from diffquant.quant.codecs.triton import launch
from diffquant.quant.types import type_named


def main():
    jobs.cards_for = lambda asked: Cards((asked,), "the interpreter")
    launch.LANES["q8_0"] = launch.Lanes(1 << 15, 4)
    request = Request("gguf", type=type_named("q8_0"))
    np.seterr(all="ignore")
    source, output = map(Path, sys.argv[1:])
    jobs.run_job(source, output, request, workers=1, device="cpu")


if __name__ == "__main__":
    main()
