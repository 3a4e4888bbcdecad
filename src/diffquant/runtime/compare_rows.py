"""Rows of a comparison: from what was drawn and weighed to values, problems and a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from diffquant.runtime.comparison import METRICS, LayerError, PairValues, Row, Value
from diffquant.runtime.drawing import Drawn, Shots, compare_drawn, latent_error
from diffquant.runtime.gates import GATES, judge_gate
from diffquant.runtime.judges import defects
from diffquant.runtime.metrics import JUDGE_ROWS, Opened
from diffquant.runtime.weight_errors import TensorsReport, Weighed

__all__ = ["drawn_row", "judged_row", "kept_by_control", "unseen"]


def drawn_row(
    name: str, kind: str, exact: Drawn, other: Drawn, shots: Shots, judges: Opened
) -> Row:
    """What the pictures of one model say, before anything is judged."""
    values, pairs = compare_drawn(exact, other, shots, judges)
    same = all(
        bool((one == two).all()) for one, two in zip(exact.pictures, other.pictures, strict=True)
    )
    return Row(
        name=name,
        kind=kind,
        values=values,
        identical=same,
        latent_error=latent_error(exact, other),
        pairs=pairs,
        seconds=other.seconds,
    )


def judged_row(
    row: Row,
    weighed: Weighed,
    part: str,
    *,
    exact: Drawn,
    control: Row,
    judges: Opened,
    limits: Mapping[str, float],
    synthetic: bool = False,
) -> Row:
    """A candidate's row, complete.

    Args:
        row: as drawn.
        weighed: its weights against the reference's.
        part: whose bits per weight and formats are told.
        exact: the reference's pictures.
        control: row of the damaged copy; without values where there is none.
        judges: metrics, and why some are missing.
        limits: gates.
        synthetic: pictures are previews, which may be flat or noise; broken are those not finite.
    """
    failures, doubts = _of_pictures(row.pairs, exact, finite=synthetic)
    tensors = weighed.tensors
    if tensors is not None and tensors.verdict != "pass":
        (failures if tensors.verdict == "fail" else doubts).append(_of_weights(tensors))
    for name, limit in limits.items():
        result = judge_gate(
            name,
            limit,
            _gated(name, row, tensors),
            control=_proof(name, control, tensors),
            damage="; ".join(control.problems) or "no control",
            missing=judges.missing.get(GATES[name].metric, "nothing was compared"),
        )
        if result.verdict != "pass":
            (failures if result.verdict == "fail" else doubts).append(result.why)
    weights = [one for one in weighed.weights if one.error.part == part]
    size = sum(one.size for one in weights)
    return replace(
        row,
        type=weighed.type,
        nbytes=weighed.nbytes,
        bits_per_weight=sum(one.nbytes for one in weights) * 8 / size if size else None,
        weight_error=tensors.error if tensors is not None else None,
        layers=tuple(
            LayerError(one.error.key, one.error.part, one.error.stored, one.error.error, one.nbytes)
            for one in weighed.weights
        ),
        verdict=_verdict(failures, doubts, judged=bool(limits)),
        problems=(*failures, *doubts),
        stored=_mix([(one.error.stored, one.size) for one in weights]),
    )


def _verdict(failures: list[str], doubts: list[str], *, judged: bool) -> str:
    """Without gates nothing passes: a file is broken, doubtful, or not judged."""
    if failures:
        return "fail"
    return "warn" if doubts else "pass" if judged else ""


def _of_pictures(
    pairs: tuple[PairValues, ...], exact: Drawn, *, finite: bool
) -> tuple[list[str], list[str]]:
    """Broken pictures; those that the reference draws no better are doubts."""
    failures: list[str] = []
    doubts: list[str] = []
    for pair, one in zip(pairs, exact.pictures, strict=True):
        if not pair.defects or (finite and "not finite" not in pair.defects):
            continue
        told = f"{pair.prompt!r} seed {pair.seed}: {', '.join(pair.defects)}"
        if set(pair.defects) <= set(defects(one)):
            doubts.append(f"{told}, as the reference's own: use another prompt")
        else:
            failures.append(told)
    return failures, doubts


def _of_weights(tensors: TensorsReport) -> str:
    worst = tensors.worst[0]
    count = sum(row.verdict != "pass" for row in tensors.worst)
    return (
        f"weights {tensors.verdict}: {count} or more are further off than their format explains, "
        f"worst {worst.key} ({worst.stored}, error {worst.error:.4f})"
    )


def _gated(name: str, row: Row, tensors: TensorsReport | None) -> Value | None:
    if GATES[name].metric in METRICS:
        return row.values.get(GATES[name].metric)
    if tensors is None:
        return None
    error = tensors.whole_error if tensors.error is None else tensors.error
    return None if error is None else Value(error)


def _proof(name: str, control: Row, tensors: TensorsReport | None) -> Value | None:
    if GATES[name].metric in METRICS:
        return control.values.get(GATES[name].metric)
    proof = None if tensors is None else tensors.control_error
    return None if proof is None else Value(proof)


def kept_by_control(control: Row, limits: Mapping[str, float]) -> tuple[str, ...]:
    """Gates on pictures that the damaged copy keeps."""
    kept = []
    for name, limit in limits.items():
        value = control.values.get(GATES[name].metric)
        if value is not None and (value.mean is None or GATES[name].keeps(value.mean, limit)):
            kept.append(name)
    return tuple(kept)


def unseen(control: Row, candidate: Row) -> tuple[str, ...]:
    """Metrics by which the damaged copy is no further from the reference than the whole one.

    Metrics of the picture alone are left out: damage may leave what was asked for in place.
    """
    found = []
    for name, value in control.values.items():
        whole = candidate.values[name]
        if JUDGE_ROWS[name].alone:
            continue
        sign = 1 if METRICS[name].better == "up" else -1
        identical = value.mean is None
        nearer = (
            value.mean is not None
            and whole.mean is not None
            and sign * value.mean >= sign * whole.mean
        )
        if identical or nearer:
            found.append(name)
    return tuple(found)


def _mix(stored: list[tuple[str, int]]) -> str:
    """What weights are stored as: "q4_k 84.7%, bf16 14.9%"."""
    sizes: dict[str, int] = {}
    for name, size in stored:
        sizes[name] = sizes.get(name, 0) + size
    total = max(sum(sizes.values()), 1)
    ranked = sorted(sizes.items(), key=lambda row: -row[1])
    return ", ".join(f"{name} {size / total:.1%}" for name, size in ranked[:4])
