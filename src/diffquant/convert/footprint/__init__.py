"""Memory arithmetic: weights, activations, buffers of making a picture, from names and shapes.

No torch: the inspector answers from a header, and the runtime plans before a byte moves.

    picture.py      footprint(), parts_footprint(): the stages of one picture
    stages.py       what is asked and what comes out, plain data
    texts.py        the stages of text encoders
    moments.py      what lives at once, and the largest sum
    unet.py transformer.py vae.py encoders.py     activations, a walk per family
    transformer_runtime.py vae_runtime.py         where this package's runtime differs
    weights.py decode.py                          stored bytes, blocks, what decoding takes
    strips.py reach.py                            decoding in strips, and how a map is cut
    companions.py vae_usual.py                    parts a file lacks
    levels.py       what each level of offloading needs
"""

from diffquant.convert.footprint.levels import (
    CONTEXT_NBYTES,
    LEVELS,
    Need,
    block_count,
    needs,
)
from diffquant.convert.footprint.picture import footprint, parts_footprint, with_denoiser
from diffquant.convert.footprint.stages import Footprint, Picture, Stage
from diffquant.convert.footprint.weights import PartSource

__all__ = [
    "CONTEXT_NBYTES",
    "LEVELS",
    "Footprint",
    "Need",
    "PartSource",
    "Picture",
    "Stage",
    "block_count",
    "footprint",
    "needs",
    "parts_footprint",
    "with_denoiser",
]
