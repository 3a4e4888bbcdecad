"""GENERIC: what is done with a transformer nobody here knows, when asked for with `--arch generic`.

Names stay as they are; there is no other layout. What is packed are the matrices inside numbered
blocks. Kept are: everything outside of them (inputs, outputs, final modulation), and inside them
whatever its name calls an embedder, a table, a router, a refiner or an output. Modulation inside
blocks is packed: 18 to 33 % of a model, at an error of about 0.9 % where it was measured.

Source of the list and the numbers: Comfy-Org/comfy-model-tools@0be871e:quant_int8_convrot.py,
classify and EXCLUDE_SEG; Disty0/sdnq@21d60c8:sdnq/common.py:447-475.
"""

from __future__ import annotations

from diffquant.convert.architectures.base import (
    PREFIXES,
    Architecture,
    Component,
    Facts,
    Family,
    Keep,
    Latent,
    Sampling,
    Signature,
)
from diffquant.convert.architectures.names import count
from diffquant.convert.rules import Shapes

__all__ = ["GENERIC"]

_CMT = "Comfy-Org/comfy-model-tools@0be871e:quant_int8_convrot.py (EXCLUDE_SEG)"
_SDNQ = "Disty0/sdnq@21d60c8:sdnq/common.py:447-475"


def _facts(shapes: Shapes) -> Facts:
    tops = {key.split(".")[0] for key in shapes}
    return {f"_{top}": count(shapes, top) for top in tops if count(shapes, top)}


GENERIC = Architecture(
    slug="generic",
    title="unknown architecture",
    components=(
        Component(
            name="denoiser",
            kind="generic",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={"canonical": Signature(())},
            links=None,
            facts=_facts,
        ),
    ),
    variants=(),
    keep=(
        Keep(
            r"(^|\.)(embed_tokens|token_embedding|word_embeddings|wte|shared|\w*_table)(\.weight)?$",
            "table",
            _CMT,
            table=True,
        ),
        Keep(r"(scale_shift|(^|\.)modulation$|rel_pos)", "modulation or position table", _CMT),
        Keep(r"(embed|(^|[._])(pos|t|img|txt|time)_emb([._]|$))", "embedder", _CMT),
        Keep(r"(^|[._])(time|timestep|temb|guidance|rope|rotary|register)", "embedder", _CMT),
        Keep(r"(router|routing|logit|temperature|\.gate\.weight$)", "router", _CMT),
        Keep(r"(^|\.)\w*(refiner|adapter)", "refiner or adapter", _CMT),
        Keep(r"(^|\.)(final\w*|head|lm_head|norm_out|out_layer)\.", "output layer", _CMT),
        Keep(r"^(?!.*\.\d+\.)", "outside of the numbered blocks", _SDNQ),
    ),
    families=(
        Family("v", r"(^|[._])(to_v|v_proj|w?v|add_v_proj|v_linear)\.weight$"),
        Family("qkv", r"qkv\w*\.weight$"),
        Family(
            "ffn_down",
            r"(ff|ffn|mlp|feed_forward)\w*\.(net\.2|2|w2|fc2|layer2|down\w*|c_proj|linear_2"
            r"|out_projection)\.weight$",
        ),
    ),
    gguf_architecture="generic",
    gguf_prefix="",
    gguf_note="no published loader of GGUF files knows general.architecture generic",
    latent=Latent(0, 1, None),
    sampling={"": Sampling(0, 1.0, None, "", "", 0, 0, "unknown")},
    hyper_defaults={"denoiser": {}, "scheduler": {}},
)
