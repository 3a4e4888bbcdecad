"""Gates: limits that a file has to keep, each proved by a control that must break it.

A gate whose metric could not be computed fails, and says so: a limit nobody measured is not kept.
A gate that the damaged copy keeps as well is a gate that cannot fail, and fails for that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from diffquant.core.errors import UsageError
from diffquant.runtime.comparison import METRICS, Value

__all__ = ["GATES", "Gate", "GateResult", "check_limits", "judge_gate"]


@dataclass(frozen=True, slots=True)
class Gate:
    """A row of GATES.

    Attributes:
        metric: key of METRICS, or "weight_error" for relative RMSE over quantized weights.
        least: whether the limit is the least value allowed, else the largest.
        unit: behind the number.
        about: one line for the help.
    """

    metric: str
    least: bool
    unit: str
    about: str

    def keeps(self, value: float, limit: float) -> bool:
        """Whether a value is within the limit; NaN never is."""
        return value >= limit if self.least else value <= limit


GATES: Mapping[str, Gate] = {
    "min_psnr": Gate("psnr", True, " dB", "PSNR that is reached at least, pooled over pairs."),
    "min_ssim": Gate("ssim", True, "", "SSIM that is reached at least, mean over pairs."),
    "max_flip": Gate("flip", False, "", "FLIP that is not exceeded, mean over pairs."),
    "max_lpips": Gate("lpips", False, "", "LPIPS that is not exceeded, mean over pairs."),
    "max_rel_error": Gate(
        "weight_error", False, "", "Relative error over quantized weights that is not exceeded."
    ),
}


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate's outcome.

    Attributes:
        gate: key of GATES.
        limit: as asked.
        value: of the candidate; None where pictures are identical or nothing was computed.
        control: of the damaged copy.
        verdict: "pass", "warn" where there is no control to prove it, or "fail".
        why: what made it not pass, "" when it passed.
    """

    gate: str
    limit: float
    value: float | None
    control: float | None
    verdict: str
    why: str = ""


def check_limits(limits: Mapping[str, float]) -> None:
    """Refuse limits that are no numbers.

    Raises:
        UsageError: NaN or infinite.
    """
    for name, limit in limits.items():
        if not math.isfinite(limit):
            raise UsageError(f"--{name.replace('_', '-')} {limit}: expected a finite number")


def judge_gate(
    name: str,
    limit: float,
    value: Value | None,
    *,
    control: Value | None,
    damage: str,
    missing: str = "",
) -> GateResult:
    """Judge one gate.

    Args:
        name: key of GATES.
        limit: as asked.
        value: of the candidate, None where it was not computed.
        control: of the damaged copy, None where there is none.
        damage: what the control damaged, or why there is none.
        missing: why the metric has no value.
    """
    gate = GATES[name]
    title = METRICS[gate.metric].title if gate.metric in METRICS else "relative error"
    if value is None:
        why = f"{title} could not be computed, so {_flag(name)} is not kept: {missing}"
        return GateResult(name, limit, None, None, "fail", why)
    bound = f"{'below' if gate.least else 'above'} the gate of {limit:g}{gate.unit}"
    proof = None if control is None else control.mean
    if value.mean is not None and not gate.keeps(value.mean, limit):
        shown = f"{value.mean:.2f} dB" if gate.unit else f"{value.mean:.4f}"
        shown = shown if math.isfinite(value.mean) else "not finite"
        why = f"{gate.metric.replace('_', ' ')} {shown} is {bound}"
        return GateResult(name, limit, value.mean, proof, "fail", why)
    if control is None:
        why = f"no failing control for {_flag(name)}: {damage}"
        return GateResult(name, limit, value.mean, None, "warn", why)
    if control.mean is None or gate.keeps(control.mean, limit):
        reached = "identity" if control.mean is None else f"{control.mean:.4f}"
        if control.mean is not None and gate.unit:
            reached = f"{control.mean:.2f} dB"
        why = f"the control ({damage}) reached {reached}: this gate cannot fail"
        return GateResult(name, limit, value.mean, proof, "fail", f"{_flag(name)}: {why}")
    return GateResult(name, limit, value.mean, proof, "pass")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
