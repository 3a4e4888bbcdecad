"""What `quantize` takes for --max-size, --bpw and --vram: options, their values, names of files."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from diffquant.cli.frame import Outcome
from diffquant.cli.job import JobOutcome
from diffquant.cli.outputs import PLACE, allocated_name, stem_of
from diffquant.convert.allocation import Allocated, allocate_bits
from diffquant.convert.allocation_options import container_of
from diffquant.convert.allocation_report import AllocationReport
from diffquant.convert.budgets import Budget, budget_of
from diffquant.convert.output_names import file_name
from diffquant.convert.request import Request
from diffquant.core.errors import UsageError

__all__ = ["BudgetAsked", "allocated_path", "budget_options", "check_alone", "with_allocation"]


@dataclass(frozen=True, slots=True)
class BudgetAsked:
    """The options, as they were typed.

    Attributes:
        max_size, bpw, vram: at most one of them.
        among: formats to choose from.
        sensitivity: file of predicted errors.
        free_kept: whether layers that types keep are chosen for too.
        explain: whether every tensor's reason is shown.
    """

    max_size: str | None
    bpw: float | None
    vram: str | None
    among: str | None
    sensitivity: Path | None
    free_kept: bool
    explain: bool

    @property
    def budget(self) -> Budget | None:
        """What was asked for; None where a type is named instead.

        Raises:
            UsageError: two budgets, an amount that is none, or options that need a budget.
        """
        given = [
            (name, value)
            for name, value in (
                ("--max-size", self.max_size),
                ("--bpw", self.bpw),
                ("--vram", self.vram),
            )
            if value is not None
        ]
        if len(given) > 1:
            names = " and ".join(name for name, _ in given)
            raise UsageError(f"{names} are two budgets: give one")
        if not given:
            self._check_alone()
            return None
        ((option, value),) = given
        among = tuple(one.strip() for one in (self.among or "").split(",") if one.strip())
        if self.among is not None and not among:
            raise UsageError("--among: expected formats with commas, such as q3_k,q4_k,q6_k")
        return budget_of(option, value, among, free_kept=self.free_kept)

    def _check_alone(self) -> None:
        for option, value in (
            ("--among", self.among),
            ("--sensitivity", self.sensitivity),
            ("--free-kept", self.free_kept),
            ("--explain", self.explain),
        ):
            if value:
                raise UsageError(
                    f"{option} is for a budget: give --max-size, --bpw or --vram with it"
                )

    def path(self, output: str | None, target: str) -> Path:
        """The output as named; without a name one that says its container, until bits are known.

        Raises:
            UsageError: no container holds the formats.
        """
        budget = self.budget
        assert budget is not None
        return Path(output or f"allocated.{container_of(budget.among, target)}")

    def chosen(
        self, source: Path, request: Request, out: Path, common: Mapping[str, Any]
    ) -> Allocated:
        """Choose formats; `common` are run_job's arguments.

        Raises:
            UsageError: the output is there already, or the budget cannot be met.
        """
        budget = self.budget
        assert budget is not None
        if out.exists() and not (common["force"] or common["dry_run"]):
            raise UsageError(f"{out} exists; use --force to replace it")
        return allocate_bits(
            source,
            request,
            budget,
            sensitivity=self.sensitivity,
            matrix=common["matrix"],
            inputs=common["inputs"],
            base=common["base"],
            workers=common["workers"],
            progress=common["progress"],
        )


def check_alone(budget: Budget, output: str | None, **others: object) -> None:
    """Refuse what chooses formats beside a budget.

    Raises:
        UsageError: says which option.
    """
    named = {"types": "-t", "recipe_from": "--recipe-from", "pure": "--pure"}
    for name, value in others.items():
        if value:
            raise UsageError(
                f"{named[name]} and {budget.text} both choose formats: give one of them (--among "
                "says what may be chosen)"
            )
    if output is not None and output.endswith(("/", os.sep)):
        raise UsageError(f"{output}: {budget.text} writes one file, give its name")


def with_allocation(outcome: Outcome, report: AllocationReport) -> Outcome:
    """A finished job with what was chosen for it."""
    assert isinstance(outcome.result, JobOutcome)
    return replace(outcome, result=replace(outcome.result, allocation=report))


def budget_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options, passed to the command as one `asked`."""

    @click.option(
        "--max-size",
        metavar="SIZE",
        help="Choose a format per tensor so that the file takes at most SIZE: 6GB, 5.5GiB.",
    )
    @click.option("--bpw", type=float, metavar="BITS", help="The same by bits per weight: 4.6.")
    @click.option(
        "--vram",
        metavar="SIZE",
        help="The same by memory of a device while the denoiser runs at its own picture size.",
    )
    @click.option(
        "--among",
        metavar="FORMAT,...",
        help="Formats to choose from. Default: the K formats and q8_0 (GGUF); fp8, int8, w4a8.",
    )
    @click.option(
        "--sensitivity",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Predicted errors (`diffquant calibrate --sensitivity`). Default: one that was "
        "measured on this source, else from weights alone.",
    )
    @click.option(
        "--free-kept",
        is_flag=True,
        help="Choose for time embeddings, output layers and the like too, which types keep in 16 "
        "bits (.gguf; SD, SDXL, SD3, Flux, Qwen-Image, Z-Image).",
    )
    @click.option("--explain", is_flag=True, help="Say of each tensor why it has its format.")
    @functools.wraps(function)
    def wrapped(
        *args: object,
        max_size: str | None,
        bpw: float | None,
        vram: str | None,
        among: str | None,
        sensitivity: Path | None,
        free_kept: bool,
        explain: bool,
        **kwargs: object,
    ) -> object:
        asked = BudgetAsked(max_size, bpw, vram, among, sensitivity, free_kept, explain)
        return function(*args, asked=asked, **kwargs)

    return wrapped


def allocated_path(
    output: str | None, source: Path, parts: tuple[str, ...], found: Allocated
) -> Path:
    """Where an allocated file goes: as named, with {type} filled in, or by its bits and formats."""
    container = found.request.container
    name = allocated_name(container, found.report, found.label)
    if output is not None:
        return Path(output.replace(PLACE, name))
    return Path(file_name(container, stem_of(source, parts), name))
