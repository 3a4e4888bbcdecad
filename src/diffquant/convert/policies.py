"""policy_for(): what architecture, request and target say of a part, as one Policy.

The type brings the mix, the architecture says which tensors its families and its edge blocks are
and which stay in high precision, the target says what a row that does not fit falls back to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from diffquant.convert.architectures.base import Architecture
from diffquant.convert.architectures.names import count
from diffquant.convert.encoders.files import EncoderFile
from diffquant.convert.request import Request
from diffquant.convert.targets import Target
from diffquant.quant.formats import FORMATS
from diffquant.quant.policy import Candidate, Decision, Policy, Rule, resolve

__all__ = ["encoder_decisions", "policy_for"]

# What GGUF loaders take outside packed linear layers: ComfyUI-GGUF and diffusers count BF16 as
# quantized, so norms and raw parameters go to F32 and convolutions to F16 (docs/formats.md).
_GGUF_HIGH = {"conv": "f16", "bf16": "bf16", "*": "f16"}


def policy_for(
    architecture: Architecture,
    request: Request,
    target: Target,
    keys: Sequence[str],
    *,
    denoiser: bool,
    alone: bool = False,
) -> Policy:
    """The rules that one part of an output is decided by.

    Args:
        architecture: whose keep list and families apply.
        request: with a type.
        target: which program reads the output.
        keys: canonical keys of the part; the last block is counted in them.
        denoiser: whether the part is the denoiser.
        alone: whether it is in a file of its own: `architecture` then is that part's. Others have
            no list of their own yet.
    """
    kind = request.type
    assert kind is not None
    gguf = request.container == "gguf"
    tuned = request.policy == "tuned" and architecture.is_tuned
    families = (*(architecture.tuned_families if tuned else ()), *architecture.families)
    keep = (*(architecture.tuned_keep if tuned else ()), *architecture.keep)
    return Policy(
        base=kind.base,
        mix={**kind.mix, **(kind.tuned if architecture.tuned_families and tuned else {})},
        families=tuple((row.name, row.pattern) for row in families),
        keep=(
            *(Rule(row.pattern, None, row.reason, row.table) for row in keep if denoiser or alone),
            *(() if denoiser else (Rule("embed", None, "embedding: high precision"),)),
        ),
        user=request.rules,
        convs=(kind.convs and not (gguf and kind.base == "bf16"))  # BF16 counts as packed there
        or architecture.packs_convolutions,
        vector="f32" if gguf else "",
        high=_high(kind.base) if gguf else {},
        pure=request.pure,
        mix_name="tuned mix (ours)" if tuned else "type's mix",
        edges=_edges(architecture.edge_blocks, kind.edge, keys) if denoiser else None,
        fallbacks=target.fallbacks,
        reshape=gguf and denoiser and target.reshapes and architecture.reshapes,
    )


def encoder_decisions(
    row: EncoderFile,
    request: Request,
    target: Target,
    candidates: Sequence[Candidate],
    exact: Mapping[str, Rule],
) -> tuple[Decision, ...]:
    """Formats of a text encoder's GGUF file: readers want vectors and tables in F32.

    The type's mix applies to the same families as in a denoiser; the token embedding is q6_k or
    better, as llama-quantize has it for models that use it as their output layer too
    (ggml-org/llama.cpp src/llama-quant.cpp, llama_tensor_get_type). Without a type or --dtype the
    matrices keep their bytes.
    """
    base = request.type.base if request.type is not None else request.dtype
    tables = tuple(Rule(one.pattern, None, one.reason, table=True) for one in row.tables)
    policy = Policy(
        base=base or "f32",
        mix=request.type.mix if request.type is not None else {},
        families=tuple((one.name, one.pattern) for one in row.families),
        keep=tables,
        user=(*request.rules, *_embedding(row, request, exact)),
        exact=exact,
        vector="f32",
        high=_high(base or "f32"),
        pure=request.pure,
        fallbacks=target.fallbacks,
    )
    decided = resolve(policy, candidates)
    if base is not None:
        return decided
    return tuple(
        Decision("", "copied") if found.reason == f"cast to {policy.base}" else found
        for found in decided
    )


def _embedding(row: EncoderFile, request: Request, exact: Mapping[str, Rule]) -> tuple[Rule, ...]:
    """The token embedding's own rule, unless a recipe speaks of it."""
    kind = request.type
    if row.embedding and any(re.search(row.embedding, key) for key in exact):
        return ()
    if kind is None or not row.embedding or request.pure or FORMATS[kind.base].is_cast:
        return ()
    if FORMATS[kind.base].bits >= FORMATS["q6_k"].bits:
        return ()
    return (Rule(row.embedding, "q6_k", "token embedding or output layer: q6_k or better"),)


def _edges(blocks: str, fmt: str, keys: Iterable[str]) -> tuple[str, str] | None:
    """Pattern and format of the first and the last block, where both table and type have a rule."""
    if not blocks or not fmt:
        return None
    last = max(count(dict.fromkeys(keys, ()), blocks) - 1, 0)
    return rf"^{re.escape(blocks)}\.(0|{last})\.", fmt


def _high(base: str) -> Mapping[str, str]:
    """F32 asked for is F32 throughout: the F16 of kept layers would be a loss nobody wanted."""
    return {"*": "f32"} if base == "f32" else _GGUF_HIGH
