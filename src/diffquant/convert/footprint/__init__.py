"""Memory arithmetic: weights, activations, buffers of making a picture, from names and shapes.

No torch: the inspector answers from a header, and the runtime plans before a byte moves.

    picture.py      footprint(): the stages of one picture
    moments.py      what lives at once, and the largest sum
    unet.py transformer.py vae.py encoders.py     activations, a walk per family
    weights.py decode.py                          stored bytes, blocks, what decoding takes
    strips.py reach.py                            decoding in strips, and how a map is cut
    companions.py vae_usual.py                    parts a file lacks
    levels.py       what each level of offloading needs
"""

from diffquant.convert.footprint.levels import LEVELS, Need, block_count, needs
from diffquant.convert.footprint.picture import (
    Footprint,
    Picture,
    Stage,
    footprint,
    with_denoiser,
)

__all__ = [
    "LEVELS",
    "Footprint",
    "Need",
    "Picture",
    "Stage",
    "block_count",
    "footprint",
    "needs",
    "with_denoiser",
]
