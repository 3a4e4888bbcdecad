"""Rendering of a repository's checkpoints: used by `inspect hf://owner/repo`."""

from __future__ import annotations

from diffquant.cli.frame import echo, human, table
from diffquant.inspect.repository import RepositoryReport

__all__ = ["render_repository"]


def render_repository(report: RepositoryReport) -> None:
    """Print what there is to pick from, and how."""
    echo(report.path)
    echo(f"  a repository of {len(report.files)} checkpoints; name the one to describe")
    echo()
    table(
        ("  file", "size", "label"),
        [
            (
                f"  {one.path}" + (f" ({one.shards} shards)" if one.shards > 1 else ""),
                human(one.nbytes),
                one.label or "-",
            )
            for one in report.files
        ],
        right=(1,),
    )
    echo()
    echo(f"  other files: {report.other_files}, {human(report.other_nbytes)}")
    echo(f"  next: diffquant inspect {report.files[0].name}")
