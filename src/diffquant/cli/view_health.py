"""Rendering of health reports and hashes: used by `inspect --deep` and `inspect --hash`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from diffquant.cli.frame import echo, human, table
from diffquant.inspect.hashes import FileHashes
from diffquant.inspect.health import HealthReport

__all__ = ["render_hashes", "render_health"]

_SHOWN = 4
_WIDTH = 76


def render_health(result: dict[str, Any]) -> None:
    """Print each file: its numbers per part, findings, hashes, the verdict last."""
    for index, report in enumerate(result["health"]):
        if index:
            echo()
        _render(report)


def render_hashes(result: dict[str, Any]) -> None:
    """Print each file's hashes."""
    for index, one in enumerate(result["hashes"]):
        if index:
            echo()
        echo(f"{one.path}  ({human(one.nbytes)})")
        _hashes(one)


def _render(report: HealthReport) -> None:
    echo(report.path)
    if report.parts:
        echo()
        table(
            ("  part", "tensors", "weights", "NaN/Inf", "zeros", "lost in fp16", "largest"),
            [
                (
                    "  " + (part.name or ("all" if len(report.parts) == 1 else "in no part")),
                    str(part.tensors),
                    f"{part.weights:,}",
                    str(part.bad),
                    _share(part.zeros, part.weights),
                    _share(part.tiny + part.beyond, part.weights),
                    f"{part.amax:.4g}",
                )
                for part in report.parts
            ],
            right=(1, 2, 3, 4, 5, 6),
        )
    for finding in report.findings:
        echo()
        label = "note" if finding.severity == "info" else finding.severity
        lines = textwrap.wrap(
            f"{label}: {finding.name} ({finding.count}): {finding.meaning}", _WIDTH
        )
        for at, line in enumerate(lines):
            echo(f"  {line}" if not at else f"      {line}")
        for example in finding.examples[:_SHOWN]:
            echo(f"    - {example}")
        if finding.count > _SHOWN:
            echo(f"    - and {finding.count - _SHOWN} more")
    _all_hashes(report.hashes)
    echo()
    echo(
        f"  {report.verdict}: {_counted(report.errors, 'error')}, "
        f"{_counted(report.warnings, 'warning')}"
    )


def _all_hashes(hashes: Sequence[FileHashes]) -> None:
    if not hashes:
        return
    echo()
    for one in hashes:
        if len(hashes) > 1:
            echo(f"  {one.path}")
        _hashes(one)


def _hashes(one: FileHashes) -> None:
    echo(f"  sha256  {one.sha256}")
    short = (("AutoV1", one.autov1), ("AutoV2", one.autov2), ("AutoV3", one.autov3))
    echo("  " + "   ".join(f"{name} {value}" for name, value in short if value))
    for stated in one.stated:
        echo(f"  {stated.key} {stated.verdict}")


def _share(count: int, total: int) -> str:
    if not count:
        return "0"
    share = count / max(total, 1)
    return f"{share:.1%}" if share >= 0.001 else f"{count:,}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
