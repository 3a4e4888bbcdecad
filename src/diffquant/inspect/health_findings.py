"""What is wrong with a file's numbers: one row per finding, from statistics alone.

A row says how bad it is, what it means and what to do; `look` yields (tensor, detail) for all that
it is true of. Errors are what no good file has; warnings are what a good file rarely has; notes are
facts that decide what can be done with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from diffquant.inspect.dead_blocks import dead_blocks, dead_outputs
from diffquant.inspect.hashes import EMPTY_SHA256
from diffquant.inspect.health_values import Values
from diffquant.inspect.subject import Subject
from diffquant.inspect.weight_stats import FP16_MAX, WeightStats

__all__ = ["CHECKS", "HealthFinding", "Seen", "findings"]

Severity = Literal["error", "warning", "info"]

_KEPT = 8  # examples kept per finding
_OUTLIER = 0.5  # share of a tensor's sum of squares that one number has
_FEW = 4096  # weights below which shape says nothing
_UNDERFLOW = 0.01
_SPARSE = 0.5
_ZERO_ROWS = 0.01
_MASKS = ("attn_mask", "attention_mask", "causal_mask")
_FP8_MAX = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}
_LORA_UP = (
    ".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight",
    "_lora.up.weight", ".hada_w1_b", ".hada_w2_b", ".lokr_w2", ".lokr_w2_b",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class HealthFinding:
    """Something found.

    Attributes:
        name: the check's name.
        severity: error, warning or info.
        count: how many tensors (or files, or warnings) it is true of.
        examples: the first of them, each with what was seen.
        meaning: what it does, and what to do.
    """

    name: str
    severity: Severity
    count: int
    examples: tuple[str, ...]
    meaning: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What the checks look at."""

    subject: Subject
    values: Values
    copies: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def matrices(self) -> Iterator[tuple[str, WeightStats]]:
        """Weights of two and more dimensions."""
        tensors = self.subject.logical.tensors
        for key, stats in self.values.stats.items():
            if key in tensors and len(tensors[key].shape) > 1:
                yield key, stats


Pairs = Iterator[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Check:
    """One row: `look` yields (what, detail) of all that the row is true of."""

    name: str
    severity: Severity
    meaning: str
    look: Callable[[Seen], Pairs]


def _nan(seen: Seen) -> Pairs:
    for key, one in seen.values.stats.items():
        if one.nan:
            yield key, f"{one.nan} of {one.size}"


def _infinite(seen: Seen) -> Pairs:
    for key, one in seen.values.stats.items():
        if one.inf and not key.endswith(_MASKS):
            yield key, f"{one.inf} of {one.size}"


def _zero_tail(seen: Seen) -> Pairs:
    for file in seen.values.hashes:
        if file.zeros and file.zeros[-1].stop == file.nbytes:
            last = file.zeros[-1]
            yield file.path, f"all {last.nbytes} bytes from {last.start} to its end"


def _holes(seen: Seen) -> Pairs:
    for file in seen.values.hashes:
        for zeros in file.zeros:
            if zeros.stop != file.nbytes:
                yield file.path, f"{zeros.nbytes} bytes from {zeros.start}"


def _empty_parts(seen: Seen) -> Pairs:
    match = seen.subject.match
    parts = match.parts if match else ()
    groups = {part.name: [part.prefix + key for key in part.shapes] for part in parts}
    if not groups:
        groups = {"the file": list(seen.values.stats)}
    for name, keys in groups.items():
        found = [seen.values.stats[key] for key in keys if key in seen.values.stats]
        if found and all(one.is_zero for one in found):
            yield name, f"{len(found)} tensors of zeros"


def _beyond(seen: Seen) -> Pairs:
    for key, one in seen.values.stats.items():
        if one.beyond:
            yield key, f"{one.beyond} of {one.size}, up to {one.amax:.4g}"


def _dead_blocks(seen: Seen) -> Pairs:
    for block, count in dead_blocks(dict(seen.matrices)).items():
        yield block, f"its {count} matrices are zero"


def _dead_outputs(seen: Seen) -> Pairs:
    for key, bias in dead_outputs(dict(seen.matrices), seen.values.stats):
        yield key, "zero, bias too" if bias else "zero"


def _zero_matrices(seen: Seen) -> Pairs:
    matrices = dict(seen.matrices)
    told = {key for key, _ in dead_outputs(matrices, seen.values.stats)}
    blocks = tuple(f"{block}." for block in dead_blocks(matrices))
    for key, one in matrices.items():
        if not one.is_zero or key in told or _is_up(key):
            continue
        if not key.startswith(blocks):
            yield key, f"{one.size} zeros"


def _is_up(key: str) -> bool:
    return key.endswith(_LORA_UP)


def _idle_adapters(seen: Seen) -> Pairs:
    for key, one in seen.values.stats.items():
        if one.is_zero and _is_up(key):
            yield key, "zero"


def _constant(seen: Seen) -> Pairs:
    for key, one in seen.matrices:
        if one.size > 1 and one.low == one.high != 0 and not one.nan and not one.inf:
            yield key, f"every number is {one.low:.6g}"


def _clipped(seen: Seen) -> Pairs:
    tensors = seen.subject.logical.tensors
    for key, one in seen.matrices:
        limit = _FP8_MAX.get(tensors[key].format)
        if limit is not None and one.amax >= limit:
            yield key, f"reaches {one.amax:g}"


def _header(seen: Seen) -> Pairs:
    for text in seen.warnings:
        yield text, ""


def _stated(seen: Seen) -> Pairs:
    for file in seen.values.hashes:
        for one in file.stated:
            empty = ", the hash of no bytes at all" if one.said.endswith(EMPTY_SHA256) else ""
            if one.verdict == "differs":
                found = file.data_sha256[:12]
                yield file.path, f"{one.key} says {one.said[:14]}{empty}; it is {found}"
            elif one.verdict == "unreadable":
                yield file.path, f"{one.key} is {one.said!r:.40}, no hash"


def _outliers(seen: Seen) -> Pairs:
    for key, one in seen.matrices:
        energy = one.size * (one.std**2 + one.mean**2)
        if one.size >= _FEW and one.low != one.high and one.amax**2 > _OUTLIER * energy:
            yield key, f"{one.amax:.4g}, {min(one.amax**2 / energy, 1):.0%} of its squares' sum"


def _underflow(seen: Seen) -> Pairs:
    for key, one in seen.matrices:
        if one.tiny > _UNDERFLOW * one.size:
            yield key, f"{one.tiny / one.size:.1%}"


def _sparse(seen: Seen) -> Pairs:
    tensors = seen.subject.logical.tensors
    for key, one in seen.matrices:
        share = one.zeros / max(one.size, 1)
        if _SPARSE < share < 1 and one.size >= _FEW and not tensors[key].is_quantized:
            yield key, f"{share:.0%}"


def _zero_rows(seen: Seen) -> Pairs:
    for key, one in seen.matrices:
        if _ZERO_ROWS * one.rows < one.zero_rows < one.rows and one.size >= _FEW:
            yield key, f"{one.zero_rows} of {one.rows}"


def _copies(seen: Seen) -> Pairs:
    for key, of in seen.copies.items():
        yield key, f"the bytes of {of}"


def _masks(seen: Seen) -> Pairs:
    for key, one in seen.values.stats.items():
        if one.inf and key.endswith(_MASKS):
            yield key, f"{one.inf} infinities"


def _skipped(seen: Seen) -> Pairs:
    yield from seen.values.skipped.items()


CHECKS: tuple[Check, ...] = (
    Check("nan", "error", "not a number: the file is damaged, or training diverged", _nan),
    Check(
        "infinite",
        "error",
        "infinite numbers: damaged, or cast to a type that could not hold them",
        _infinite,
    ),
    Check(
        "zero_tail",
        "error",
        "the file ends in zeros: an unfinished download of a file laid out in advance; get it "
        "again",
        _zero_tail,
    ),
    Check("empty_part", "error", "nothing but zeros: there is no model in it", _empty_parts),
    Check(
        "holes",
        "warning",
        "long runs of zero bytes inside the file: unfinished pieces of a download, or weights that "
        "are zero; compare the sha256 with the maker's",
        _holes,
    ),
    Check(
        "beyond_fp16",
        "warning",
        f"beyond {FP16_MAX:.0f}: infinite in float16, keep them in bfloat16 or float32",
        _beyond,
    ),
    Check(
        "dead_block",
        "warning",
        "blocks whose matrices are all zero: pruned away, or never filled",
        _dead_blocks,
    ),
    Check(
        "dead_output",
        "warning",
        "output projections of zeros: what comes before them has no effect; as initialised, or "
        "pruned",
        _dead_outputs,
    ),
    Check("zero_matrix", "warning", "matrices of zeros: never trained, or lost", _zero_matrices),
    Check(
        "idle_adapter",
        "warning",
        "adapter modules whose second factor is zero: they change nothing, as before training",
        _idle_adapters,
    ),
    Check("constant", "warning", "one number throughout: never trained, or lost", _constant),
    Check(
        "fp8_clipped",
        "warning",
        "plain fp8 that reaches its largest number: larger weights were probably clipped",
        _clipped,
    ),
    Check("header", "warning", "what the header alone shows", _header),
    Check(
        "stated_hash",
        "warning",
        "web UIs look a file up by what its header states, and find another one, or none; written "
        "by a tool that changed the tensors later or never hashed them",
        _stated,
    ),
    Check(
        "outlier",
        "info",
        "one number weighs more than all others together: one scale for the tensor would lose them",
        _outliers,
    ),
    Check("fp16_underflow", "info", "share of numbers that float16 makes zero", _underflow),
    Check("sparse", "info", "mostly zeros: pruned", _sparse),
    Check("zero_rows", "info", "rows of zeros: output channels that are never used", _zero_rows),
    Check(
        "copies",
        "info",
        "tensors that hold the bytes of another one: tied weights, or an EMA copy; space that a "
        "conversion can save",
        _copies,
    ),
    Check("mask", "info", "attention masks, which are infinite by design", _masks),
    Check("not_checked", "info", "not looked at", _skipped),
)


def findings(seen: Seen) -> tuple[HealthFinding, ...]:
    """Run every check; errors first, in the table's order."""
    found = []
    for check in CHECKS:
        pairs = list(check.look(seen))
        if pairs:
            told = tuple(f"{what}: {how}" if how else what for what, how in pairs[:_KEPT])
            found.append(HealthFinding(check.name, check.severity, len(pairs), told, check.meaning))
    return tuple(found)
