"""`diffquant doctor`: what this machine has, the rung each model would use, what limits it."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import click

from diffquant.cli.frame import Options, Outcome, common, run
from diffquant.cli.values import bytes_from
from diffquant.core.errors import UsageError

if TYPE_CHECKING:
    from diffquant.runtime.doctor import Diagnosis

__all__ = ["command"]


@click.command("doctor")
@click.option("--device", help="Plan for cpu, cuda or mps (default: the first GPU, else cpu).")
@click.option("--vram", metavar="SIZE", help="Suppose a GPU of this much memory, 8GiB.")
@click.option("--ram", metavar="SIZE", help="Suppose that this much RAM may be used, 16GiB.")
@click.option(
    "--bench",
    "benched",
    is_flag=True,
    help="Measure what each number format costs on the device; -v measures every format.",
)
@common
def command(
    device: str | None, vram: str | None, ram: str | None, benched: bool, options: Options
) -> None:
    """Say what this machine has: processor, memory, GPUs, libraries, kernels that decode weights.

    And for published models at native size: the rung of memory each would run on here, and its
    predicted peak. Libraries that do not load are named, with what else could be better. Nothing is
    written, no weight is read, and the exit code is 0 whatever is found.
    """

    def work() -> Outcome:
        from diffquant.runtime.doctor import examine

        if benched and (vram is not None or ram is not None):
            raise UsageError("--bench measures what is here: leave --vram and --ram out")
        found = examine(
            device=device,
            vram=bytes_from(vram, "--vram") if vram is not None else None,
            ram=bytes_from(ram, "--ram") if ram is not None else None,
        )
        return Outcome(measured(found, options) if benched else found)

    def measured(found: Diagnosis, options: Options) -> Diagnosis:
        from diffquant.runtime.doctor.bench import bench

        if not found.compute:
            raise UsageError(
                "--bench needs torch, which does not load here: see `diffquant doctor`"
            )
        every, plan = options.verbose > 0, found.planned
        made = bench(plan.device, plan.dtype, every=every, progress=options.bar())
        return dataclasses.replace(found, bench=made)

    from diffquant.cli.view_doctor import render_doctor

    run("doctor", options, work, functools.partial(render_doctor, explain=options.verbose > 0))
