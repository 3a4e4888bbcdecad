"""What `inspect` takes and does for --vram, --size and --with; loaded only when asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from diffquant.cli.frame import Outcome, echo
from diffquant.cli.values import bytes_from, size_from
from diffquant.core.errors import CheckpointError, DiffquantError

__all__ = ["FitAsked", "each_fit", "each_latents", "fit_options", "fits", "pairs"]

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class FitAsked:
    """The options, as they were typed.

    Attributes:
        others: files that each FILE is compared with.
    """

    vram: str | None
    size: str | None
    batch: int | None
    dtype: str | None
    others: tuple[str, ...]

    @property
    def is_fit(self) -> bool:
        """Whether the fit of a picture was asked for."""
        return any(one is not None for one in (self.vram, self.size, self.batch, self.dtype))


def fit_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options, passed to the command as one `asked`."""

    @click.option("--vram", metavar="SIZE", help="Will a picture fit: memory of a device, 8GiB.")
    @click.option("--size", metavar="WxH", help="Size of that picture (default: the model's own).")
    @click.option("--batch", type=int, help="Pictures made at once (default: 1).")
    @click.option("--dtype", type=click.Choice(sorted(_DTYPES)), help="Computed in (bfloat16).")
    @click.option(
        "--with",
        "others",
        multiple=True,
        type=click.Path(),
        metavar="OTHER",
        help="Say whether each FILE shares its latents with OTHER, or wants it as text encoder.",
    )
    @functools.wraps(function)
    def wrapped(
        *args: object,
        vram: str | None,
        size: str | None,
        batch: int | None,
        dtype: str | None,
        others: tuple[str, ...],
        **kwargs: object,
    ) -> object:
        return function(*args, asked=FitAsked(vram, size, batch, dtype, others), **kwargs)

    return wrapped


def fits(files: tuple[str, ...], asked: FitAsked) -> Outcome:
    """What a picture takes, file by file."""
    from diffquant.inspect.fit import FitReport, fit
    from diffquant.inspect.subject import open_subject

    width, height = size_from(asked.size) or (None, None)
    vram = bytes_from(asked.vram, "--vram") if asked.vram is not None else None
    reports: list[FitReport] = []
    failed: list[DiffquantError] = []
    for path in files:
        try:
            with open_subject(path) as subject:
                found = fit(
                    subject,
                    vram=vram,
                    width=width,
                    height=height,
                    batch=1 if asked.batch is None else asked.batch,
                    compute=_DTYPES[asked.dtype or "bfloat16"],
                )
        except CheckpointError as error:
            if len(files) == 1:
                raise
            failed.append(error)
            continue
        reports.append(found)
    code = max((one.exit_code for one in failed), default=0)
    errors = [str(one) for one in failed]
    return Outcome({"fits": reports}, exit_code=code, ok=not failed, errors=errors)


def each_fit(result: dict[str, Any], *, explain: bool) -> None:
    """Print what `fits` found."""
    from diffquant.cli.view_fit import render_fit

    for index, report in enumerate(result["fits"]):
        if index:
            echo()
        render_fit(report, explain=explain)


def pairs(files: tuple[str, ...], asked: FitAsked) -> Outcome:
    """Whether each file shares its latents with each other one."""
    from diffquant.inspect.latents import latents
    from diffquant.inspect.subject import open_subject

    reports = []
    for one in files:
        for other in asked.others:
            with open_subject(one) as first, open_subject(other) as second:
                reports.append(latents(first, second))
    return Outcome({"latents": reports})


def each_latents(result: dict[str, Any]) -> None:
    """Print what `pairs` found."""
    from diffquant.cli.view_latents import render_latents

    for index, report in enumerate(result["latents"]):
        if index:
            echo()
        render_latents(report)
