"""Which format each tensor gets, and why: rules in, one Decision per tensor out.

A policy never falls back in silence: when the wanted format cannot hold a shape, the Decision
names the format that was wanted, the requirement that failed and the row of FALLBACKS that was
taken (facts on row lengths: city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:227-253; the house plan,
6.3).

Order, first match wins:

1. user rules (`--exclude`, `--tensor-type REGEX=FORMAT`), in the order given;
2. not floating point: stored as it is;
3. vectors, raw parameters and tiny tensors: high precision;
4. the architecture's keep list: high precision;
5. convolutions, where the type does not cover them: high precision;
6. the type's own mix by family, then its base format; then the shape check and FALLBACKS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffquant.quant.formats import FORMATS, format_named

__all__ = ["FALLBACKS", "Candidate", "Decision", "Policy", "Rule", "resolve"]

# Tensors of at most this many elements gain nothing and hurt most
# (city96/ComfyUI-GGUF@795e451:tools/convert.py:13, QUANTIZATION_THRESHOLD).
TINY = 1024

FALLBACKS: dict[str, str] = {
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "q4_0": "f16",
    "q4_1": "f16",
    "q5_0": "f16",
    "q5_1": "f16",
    "q8_0": "f16",
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
    """`pattern` (searched in the canonical key) gets `format`; None keeps high precision."""

    pattern: str
    format: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """The format one tensor is stored in, and why.

    Attributes:
        format: FORMATS name, or "" to copy the bytes as they are.
        reason: printed in the plan and the report.
        wanted: the format the type asked for, when a shape refused it; else "".
    """

    format: str
    reason: str
    wanted: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    """Everything `resolve` needs to know; see the module docstring for the order.

    Attributes:
        base: format of everything not named otherwise.
        mix: family name -> (count, format of the first count, format of the rest).
        families: (name, pattern) rows of the architecture, exclusive, in order.
        keep: the architecture's high-precision rows.
        user: rules from the command line.
        convs: whether tensors of more than two dimensions are quantized.
        vector: format of vectors, tiny tensors and raw parameters; "" keeps the source's.
        high: format of kept weights: "conv" for convolutions, else by source format, else "*"; what
            no key names stays as the source has it.
        pure: ignore `mix`, use `base` throughout.
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


def resolve(policy: Policy, candidates: Sequence[Candidate]) -> tuple[Decision, ...]:
    """Decide every tensor, in order (families such as "the first four V tensors" count in it).

    Raises:
        UnknownFormat: a rule names a format that is not in FORMATS.
    """
    counts: dict[str, int] = {}
    return tuple(_decide(policy, one, counts) for one in candidates)


def _decide(policy: Policy, one: Candidate, counts: dict[str, int]) -> Decision:
    for rule in policy.user:
        if re.search(rule.pattern, one.key):
            if rule.format is None:
                vector = len(one.shape) < 2 and bool(one.dtype)
                return (_vector if vector else _keep)(policy, one, rule.reason)
            if len(one.shape) < 2 and format_named(rule.format).check(one.shape):
                kept = _vector(policy, one, f"{rule.reason}; a vector is not packed")
                return Decision(kept.format, kept.reason, rule.format)
            return _fit(rule.format, one, rule.reason)
    if not one.dtype:
        return Decision("", "not floating point: copied")
    cast = FORMATS[policy.base].is_cast
    if cast and not policy.vector:
        return Decision(policy.base, f"cast to {policy.base}")
    reason = _too_small(one)
    if reason:
        return _vector(policy, one, reason)
    if cast and len(one.shape) <= 2:
        return Decision(policy.base, f"cast to {policy.base}")
    for rule in policy.keep:
        if re.search(rule.pattern, one.key):
            return _keep(policy, one, rule.reason)
    if len(one.shape) > 2 and not policy.convs:
        return _keep(policy, one, "convolution: loaders of this type read only 2-D weights packed")
    family = next((n for n, pattern in policy.families if re.search(pattern, one.key)), "")
    if family and family in policy.mix and not policy.pure:
        first, early, late = policy.mix[family]
        seen = counts.get(family, 0)
        counts[family] = seen + 1
        wanted = early if seen < first else late
        where = f"{family}, first {first}" if seen < first else family
        return _fit(wanted, one, f"type's mix: {where}" if wanted != policy.base else "type's base")
    return _fit(policy.base, one, "type's base")


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


def _fit(wanted: str, one: Candidate, reason: str) -> Decision:
    name = wanted
    while failed := format_named(name).check(one.shape):
        if name not in FALLBACKS:
            return Decision("", f"{reason}; {wanted} needs {' and '.join(failed)}: kept", wanted)
        name = FALLBACKS[name]
    if name == wanted:
        return Decision(wanted, reason)
    needs = " and ".join(format_named(wanted).check(one.shape))
    return Decision(name, f"{reason}; {wanted} needs {needs}: {name}", wanted)
