"""`diffquant formats`: the tables, as a user picks from them."""

from __future__ import annotations

from typing import Any

import click

from diffquant.cli.frame import Options, Outcome, common, echo, run, table
from diffquant.convert.targets import TARGETS
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import ALIASES, TYPES

__all__ = ["command"]


@click.command("formats")
@common
def command(options: Options) -> None:
    """List the types -t takes, the number formats behind them, and the programs that read them."""

    def work() -> Outcome:
        types = [
            {
                "name": row.name,
                "base": row.base,
                "bits": row.bits,
                "containers": sorted(row.dialects),
                "dialects": dict(row.dialects),
                "about": row.about,
                "mix": {name: list(given) for name, given in row.mix.items()},
                "edge": row.edge,
                "published": row.published,
            }
            for row in TYPES.values()
        ]
        targets = [
            {
                "name": row.name,
                "about": row.about,
                "reads": {container: sorted(names) for container, names in row.reads.items()},
                "reshapes": row.reshapes,
            }
            for row in TARGETS.values()
        ]
        formats = [
            {
                "name": row.name,
                "bits": row.bits,
                "strategy": row.strategy,
                "block_size": row.block_size,
                "requires": [need.describe() for need in row.requires],
                "encodes": row.encodes,
                "gaussian_error": row.gaussian_error if row.encodes else None,
                "source": row.source,
            }
            for row in FORMATS.values()
        ]
        shown = {"types": types, "aliases": ALIASES, "formats": formats, "targets": targets}
        return Outcome(shown)

    def render(result: dict[str, Any]) -> None:
        echo("Types (-t):")
        table(
            ("type", "bits", "goes into", "what it is"),
            [
                (row["name"], f"{row['bits']:g}", ", ".join(row["containers"]), row["about"])
                for row in result["types"]
            ],
            right=(1,),
        )
        echo()
        short = ", ".join(f"{name} = {full}" for name, full in result["aliases"].items())
        echo(f"As in llama-quantize: {short}")
        echo()
        echo("Number formats (--tensor-type REGEX=FORMAT):")
        table(
            ("format", "bits", "error on Gaussian weights", "needs"),
            [
                (
                    row["name"],
                    f"{row['bits']:g}",
                    f"{row['gaussian_error']:.4f}" if row["encodes"] else "read only",
                    ", ".join(row["requires"]) or "-",
                )
                for row in result["formats"]
            ],
            right=(1, 2),
        )
        echo()
        echo("Programs an output can be written for (--target):")
        table(
            ("target", "containers", "what it is"),
            [(row["name"], ", ".join(row["reads"]), row["about"]) for row in result["targets"]],
        )

    run("formats", options, work, render)
