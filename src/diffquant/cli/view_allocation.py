"""An allocation on a screen: what was met, the curve beside named types, reasons per tensor."""

from __future__ import annotations

from diffquant.cli.frame import echo, human, table
from diffquant.cli.screen import wrap
from diffquant.convert.allocation_part import named_part
from diffquant.convert.allocation_report import AllocationReport, TensorChoice

__all__ = ["render_allocation"]

_MIB = 1 << 20
_COUNTS = {
    "file": "the file",
    "denoiser": "{part}",
    "device": "the denoiser's step",
}


def render_allocation(report: AllocationReport, *, explain: bool = False) -> None:
    """Print what was chosen; with `explain` why, tensor by tensor."""
    echo()
    what = _COUNTS[report.counts].format(part=named_part(report.part))
    used = report.nbytes / report.limit_nbytes
    echo(
        f"  {report.asked}: {what} takes {report.nbytes:,} of {report.limit_nbytes:,} bytes "
        f"({used:.2%}); possible are {report.smallest_nbytes:,} to {report.largest_nbytes:,}"
    )
    shares = ", ".join(f"{name} {share:.1%}" for name, share in report.formats.items())
    echo(f"  chosen: {shares}")
    for line in wrap(f"errors from {report.sensitivity}: {report.unit}"):
        echo(line)
    echo(f"  predicted error {report.error:.4g}, {_nearness(report)}")
    _freed(report)
    for note in report.notes:
        for line in wrap(f"note: {note}"):
            echo(line)
    _curve(report)
    if report.published:
        _published(report)
    if explain:
        _explain(report)


def _nearness(report: AllocationReport) -> str:
    if report.exact:
        return "the least there is at this size"
    return f"at most {1 - report.bound / report.error:.2%} over the least there is at this size"


def _freed(report: AllocationReport) -> None:
    for one in report.freed:
        if one.format == one.kept_as:
            what = f"stays {one.format}"
        else:
            saved = human(abs(one.saves_nbytes))
            what = f"freed, {one.format} for {one.kept_as}, {saved} less"
        for line in wrap(f"{what}: {one.key} (types keep it: {one.reason})"):
            echo(line)


def _curve(report: AllocationReport) -> None:
    echo()
    table(
        ("  budget", "least predicted error"),
        [(f"  {human(one.nbytes)}", f"{one.error:.4g}") for one in report.curve],
        right=(0, 1),
    )


def _published(report: AllocationReport) -> None:
    echo()
    table(
        ("  type", "size", "predicted error", "best mix of its size"),
        [
            (f"  {one.type}", human(one.nbytes), _error(one.error), _error(one.allocated))
            for one in report.published
        ],
        right=(1, 2, 3),
    )


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _explain(report: AllocationReport) -> None:
    echo()
    echo(f"  a step up was taken where it saves more than {report.slope * _MIB:.3g} error a MiB")
    table(
        ("  tensor", "format", "size", "error", "one step down", "one step up"),
        [
            (
                f"  {one.key}",
                one.format,
                human(one.nbytes),
                f"{one.error:.3g}",
                _down(one),
                _up(one),
            )
            for one in report.tensors
        ],
        right=(2, 3),
    )


def _down(one: TensorChoice) -> str:
    if not one.smaller:
        return "none smaller"
    return f"{one.smaller}: saves {human(one.smaller_saves)}, error {one.smaller_costs:+.3g}"


def _up(one: TensorChoice) -> str:
    if not one.larger:
        return "none better"
    return f"{one.larger}: costs {human(one.larger_costs)}, error {-one.larger_brings:+.3g}"
