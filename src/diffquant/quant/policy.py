"""Which format each tensor gets, and why: rules in, one Decision per tensor out.

A policy never falls back in silence: when the wanted format cannot hold a shape, the Decision
names the format that was wanted, the requirement that failed and the row of FALLBACKS that was
taken (facts on row lengths: city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:227-253; the house plan,
6.3).

Order, first match wins:

1. user rules (`--exclude`, `--tensor-type REGEX=FORMAT`), in the order given, then the recipe's;
2. not floating point: stored as it is;
3. vectors, raw parameters, tables and tiny tensors: high precision;
4. the architecture's keep list: high precision;
5. convolutions, where neither the type nor a reshape covers them: high precision;
6. the type's own mix: edge blocks, then families; then its base format. A row that is no whole
   number of blocks is reshaped where the reader undoes it (`flat_shape`), else FALLBACKS decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diffquant.quant.formats import FORMATS, format_named

__all__ = [
    "CONVOLUTION",
    "FALLBACKS",
    "FALLBACKS_WITHOUT_IQ",
    "Candidate",
    "Decision",
    "Policy",
    "Rule",
    "flat_shape",
    "resolve",
]

# Tensors of at most this many elements gain nothing and hurt most
# (city96/ComfyUI-GGUF@795e451:tools/convert.py:13, QUANTIZATION_THRESHOLD).
TINY = 1024
CONVOLUTION = "convolution: loaders of this type read only 2-D weights packed"

# Reshaping starts at this size, into rows of this length (the same file, lines 14 and 287-295).
_FLAT_MIN, _FLAT_ROW = 512, 256

# A format of 256-blocks on another row length -> the 32-block format of nearest size that is no
# coarser. The low-bit ones meet in IQ4_NL, below which no format has blocks of 32 (llama.cpp does
# so for the IQ types: ggml-org/llama.cpp src/llama-quant.cpp tensor_type_fallback). Rows of any
# other length end in F16.
FALLBACKS: dict[str, str] = {
    "iq2_xxs": "iq4_nl",
    "iq2_xs": "iq4_nl",
    "iq2_s": "iq4_nl",
    "iq3_xxs": "iq4_nl",
    "iq3_s": "iq4_nl",
    "iq4_xs": "iq4_nl",
    "q2_k": "iq4_nl",
    "q3_k": "iq4_nl",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "iq4_nl": "f16",
    "mxfp4": "f16",
    "q4_0": "f16",
    "q4_1": "f16",
    "q5_0": "f16",
    "q5_1": "f16",
    "q8_0": "f16",
    # ConvRot: the largest group that divides the rows, then int8 without a rotation.
    "int8_convrot": "int8_convrot_64",
    "int8_convrot_64": "int8_convrot_16",
    "int8_convrot_16": "int8_rowwise",
    "int8_rowwise": "bf16",
    "asym_w4a8_int8": "asym_w4a8_int8_64",
    "asym_w4a8_int8_64": "asym_w4a8_int8_16",
    "asym_w4a8_int8_16": "int8_rowwise",
    "convrot_w4a4": "convrot_w4a4_64",
    "convrot_w4a4_64": "int8_convrot_16",
}
# For readers without IQ types.
FALLBACKS_WITHOUT_IQ: dict[str, str] = {
    name: "q4_0" if then == "iq4_nl" else then for name, then in FALLBACKS.items()
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tensor a policy decides on.

    Attributes:
        key: canonical part-local key, which patterns match.
        shape: logical shape.
        dtype: the source's own cast format (f32, f16, bf16), a quantized format's name, or "" for
            tensors that are not floating point.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Rule:
    """`pattern` (searched in the canonical key) gets `format`; None keeps high precision.

    `table` marks weights that are no layer's matrix (embedding tables): they are kept as vectors
    are, since readers unpack layers alone.
    """

    pattern: str
    format: str | None
    reason: str
    table: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """The format one tensor is stored in, and why.

    Attributes:
        format: FORMATS name, or "" to copy the bytes as they are.
        reason: printed in the plan and the report.
        wanted: the format the type asked for, when a shape refused it; else "".
        shape: shape it is stored in, where that is not the weight's own; else ().
    """

    format: str
    reason: str
    wanted: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """Everything `resolve` needs to know; see the module docstring for the order.

    Attributes:
        base: format of everything not named otherwise.
        mix: family name -> (count, format of the first count, format of the rest).
        families: (name, pattern) rows of the architecture, exclusive, in order.
        keep: the architecture's high-precision rows.
        user: rules from the command line.
        exact: canonical key -> a recipe's rule, looked up and not searched; after `user`.
        convs: whether tensors of more than two dimensions are quantized.
        vector: format of vectors, tiny tensors and raw parameters; "" keeps the source's.
        high: format of kept weights: "conv" for convolutions, else by source format, else "*"; what
            no key names stays as the source has it.
        pure: ignore `mix` and `edges`, use `base` throughout.
        mix_name: what reasons call the mix.
        edges: (pattern, format) of the first and the last block; it overrides the mix.
        fallbacks: FALLBACKS, or what the reader has instead.
        reshape: whether the reader restores shapes, so that awkward rows may be stored flat.
    """

    base: str
    mix: Mapping[str, tuple[int, str, str]]
    families: Sequence[tuple[str, str]] = ()
    keep: Sequence[Rule] = ()
    user: Sequence[Rule] = ()
    convs: bool = False
    vector: str = ""
    high: Mapping[str, str] | None = None
    pure: bool = False
    mix_name: str = "type's mix"
    edges: tuple[str, str] | None = None
    fallbacks: Mapping[str, str] = field(default_factory=lambda: FALLBACKS)
    reshape: bool = False
    exact: Mapping[str, Rule] = field(default_factory=dict)


def flat_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Rows of 256 that hold a tensor whose own rows do not divide by it; () where none do.

    Source: city96/ComfyUI-GGUF@795e451:tools/convert.py:287-295.
    """
    size = math.prod(shape)
    if len(shape) < 2 or size < _FLAT_MIN or size % _FLAT_ROW or not shape[-1] % _FLAT_ROW:
        return ()
    return (size // _FLAT_ROW, _FLAT_ROW)


def resolve(policy: Policy, candidates: Sequence[Candidate]) -> tuple[Decision, ...]:
    """Decide every tensor, in order (families such as "the first four V tensors" count in it).

    Raises:
        UnknownFormat: a rule names a format that is not in FORMATS.
    """
    counts: dict[str, int] = {}
    return tuple(_decide(policy, one, counts) for one in candidates)


def _decide(policy: Policy, one: Candidate, counts: dict[str, int]) -> Decision:
    rule = next((r for r in policy.user if re.search(r.pattern, one.key)), None)
    rule = rule or policy.exact.get(one.key)
    if rule is not None:
        if rule.format is None:
            vector = len(one.shape) < 2 and bool(one.dtype)
            return (_vector if vector else _keep)(policy, one, rule.reason)
        if len(one.shape) < 2 and format_named(rule.format).check(one.shape):
            kept = _vector(policy, one, f"{rule.reason}; a vector is not packed")
            return Decision(kept.format, kept.reason, rule.format)
        return _fit(policy, rule.format, one, rule.reason)
    if not one.dtype:
        return Decision("", "not floating point: copied")
    cast = FORMATS[policy.base].is_cast
    if cast and not policy.vector:
        return Decision(policy.base, f"cast to {policy.base}")
    reason = _too_small(one)
    if reason:
        return _vector(policy, one, reason)
    row = next((rule for rule in policy.keep if re.search(rule.pattern, one.key)), None)
    if row is not None and row.table:
        return _vector(policy, one, row.reason)
    if cast and len(one.shape) <= 2:
        return Decision(policy.base, f"cast to {policy.base}")
    if row is not None:
        return _keep(policy, one, row.reason)
    if len(one.shape) > 2 and not policy.convs and not (policy.reshape and flat_shape(one.shape)):
        return _keep(policy, one, CONVOLUTION)
    wanted, where = _wanted(policy, one, counts)
    named = f"{policy.mix_name}: {where}" if wanted != policy.base else "type's base"
    return _fit(policy, wanted, one, named)


def _wanted(policy: Policy, one: Candidate, counts: dict[str, int]) -> tuple[str, str]:
    """The type's format for a tensor, and which of its rules says so."""
    if policy.pure:
        return policy.base, ""
    wanted, where = policy.base, ""
    family = next((n for n, pattern in policy.families if re.search(pattern, one.key)), "")
    if family in policy.mix:
        first, early, late = policy.mix[family]
        seen = counts.get(family, 0)
        counts[family] = seen + 1
        wanted = early if seen < first else late
        where = f"{family}, first {first}" if seen < first else family
    if policy.edges and re.search(policy.edges[0], one.key):  # counted before, as the peers do
        return policy.edges[1], "first or last block"
    return wanted, where


def _too_small(one: Candidate) -> str:
    size = 1
    for length in one.shape:
        size *= length
    if len(one.shape) < 2:
        return "vector: high precision"
    if size <= TINY:
        return f"at most {TINY} elements: high precision"
    if not one.key.endswith(".weight"):
        return "raw parameter: high precision"
    return ""


def _vector(policy: Policy, one: Candidate, reason: str) -> Decision:
    return Decision(policy.vector, reason) if policy.vector else _keep(policy, one, reason)


def _keep(policy: Policy, one: Candidate, reason: str) -> Decision:
    high = policy.high or {}
    name = high.get("conv", "") if len(one.shape) > 2 else ""
    return Decision(name or high.get(one.dtype, high.get("*", "")), reason)


def _fit(policy: Policy, wanted: str, one: Candidate, reason: str) -> Decision:
    name = wanted
    if format_named(wanted).check(one.shape) and policy.reshape:
        flat = flat_shape(one.shape)
        if flat and not format_named(wanted).check(flat):
            return Decision(wanted, f"{reason}; stored as rows of {flat[1]}", shape=flat)
    while failed := format_named(name).check(one.shape):
        if name not in policy.fallbacks:
            return Decision("", f"{reason}; {wanted} needs {' and '.join(failed)}: kept", wanted)
        name = policy.fallbacks[name]
    if name == wanted:
        return Decision(wanted, reason)
    needs = " and ".join(format_named(wanted).check(one.shape))
    return Decision(name, f"{reason}; {wanted} needs {needs}: {name}", wanted)
