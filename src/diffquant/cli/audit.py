"""Rendering of audits: used by `inspect --audit`."""

from __future__ import annotations

from typing import Any

from diffquant.cli.frame import echo
from diffquant.inspect.audit import AuditReport

__all__ = ["render_audit"]

_SHOWN = 5


def render_audit(result: dict[str, Any]) -> None:
    """Print each file: broken rules with what they expect, found, and where they are written."""
    for index, report in enumerate(result["audits"]):
        if index:
            echo()
        _render(report)


def _render(report: AuditReport) -> None:
    how = "every block" if report.full else "samples of the blocks"
    echo(report.path)
    if not report.rules:
        echo(f"  {report.container}: the header cannot be read, nothing else was checked")
    else:
        echo(f"  {report.container}: {report.rules} rules, header and {how}")
    for rule, count in report.counts.items():
        rows = [one for one in report.findings if one.rule == rule]
        echo(f"  {rows[0].severity}: {rule}, {count} times ({rows[0].source})")
        for one in rows[:_SHOWN]:
            where = f"{one.tensor}: " if one.tensor else ""
            echo(f"    {where}expected {one.expected}, found {one.found}")
        if count > _SHOWN:
            echo(f"    and {count - _SHOWN} more")
    echo(f"  {report.violations} violations, {report.warnings} warnings")
