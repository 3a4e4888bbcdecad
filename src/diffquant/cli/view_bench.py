"""What `doctor --bench` measured, on a screen."""

from __future__ import annotations

from diffquant.cli.frame import echo, table
from diffquant.cli.screen import DIM, TITLE, styled, wrap
from diffquant.runtime.doctor.bench import Bench

__all__ = ["render_bench"]

_HEAD = ("  format", "bits", "by", "decode ms", "GB/s", "of copy", "layer ms", "x plain")


def render_bench(found: Bench) -> None:
    """Print the table and what its columns are."""
    who = found.name or f"processor, {found.threads} threads"
    styled((f"Measured on {found.device} ({who}), computing in {found.dtype}", TITLE))
    told = (
        f"a copy moves {found.copy_gb_per_s:.0f} GB/s; a layer of {found.rows} x {found.columns} "
        f"with {found.tokens} tokens takes {found.plain_ms:.3g} ms with a plain weight, "
        f"{found.tflops:.3g} TFLOP/s"
    )
    for line in wrap(told):
        styled((line, DIM))
    rows = [
        (
            f"  {row.format}",
            f"{row.bits:.2f}",
            row.backend,
            "-" if row.decode_ms is None else f"{row.decode_ms:.3g}",
            "-" if row.gb_per_s is None else f"{row.gb_per_s:.0f}",
            "-" if row.gb_per_s is None else f"{row.gb_per_s / found.copy_gb_per_s:.0%}",
            f"{row.layer_ms:.3g}",
            f"{row.to_plain:.2f}",
        )
        for row in found.table
    ]
    table(_HEAD, rows, right=(1, 3, 4, 5, 6, 7))
    echo()
