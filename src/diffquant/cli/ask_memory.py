"""What commands that run models ask about memory, and how a plan is shown."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from diffquant.cli.frame import echo, human, table
from diffquant.cli.values import bytes_from

if TYPE_CHECKING:
    from diffquant.runtime.memory.budget import Asked
    from diffquant.runtime.session import Placed

__all__ = ["SECTION", "memory_from", "memory_options", "render_memory"]

SECTION = ("vram", "ram", "offload", "decode")

_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--vram", {
        "metavar": "SIZE", "help": "Memory of the GPU that may be taken: 6GiB (default: what is "
        "free).",
    }),
    ("--ram", {
        "metavar": "SIZE", "help": "Host memory that may be taken (default: what is free).",
    }),
    ("--offload", {
        "type": click.Choice(["auto", "none", "model", "blocks", "sequential"]),
        "default": "auto", "show_default": True,
        "help": "What of the weights is on the device at once: all, a part, blocks, layers.",
    }),
    ("--decode", {
        "type": click.Choice(["auto", "whole", "strips", "host"]),
        "default": "auto", "show_default": True,
        "help": "How the VAE works; strips give the same picture in less memory.",
    }),
)  # fmt: skip


def memory_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options, passed to the command as one `memory`: a dict."""

    @functools.wraps(function)
    def wrapped(*args: object, **kwargs: Any) -> object:  # noqa: ANN401 - click's
        asked = {name: kwargs.pop(name) for name in SECTION}
        return function(*args, memory=asked, **kwargs)

    for name, settings in reversed(_OPTIONS):
        wrapped = click.option(name, **settings)(wrapped)
    return wrapped


def memory_from(asked: dict[str, Any]) -> Asked:
    """Read what was typed.

    Raises:
        UsageError: an amount that is none.
    """
    from diffquant.runtime.memory.budget import Asked

    vram, ram = (
        None if asked[name] is None else bytes_from(asked[name], f"--{name}")
        for name in ("vram", "ram")
    )
    return Asked(vram, ram, asked["offload"], asked["decode"])


def render_memory(placed: Iterable[Placed], *, explain: bool) -> None:
    """Print the plan of each pass: a line, and with `explain` what led to it."""
    for one in placed:
        plan = one.plan
        told = f"  memory, {one.label}: offload {plan.rung.level}"
        if plan.rung.decoder != "whole":
            told += f", decode {plan.rung.decoder}"
        echo(f"{told}: {human(plan.peak_nbytes)} predicted")
        if explain:
            for line in plan.why:
                echo(f"    {line}")
            rows = [
                (
                    f"    {peak.stage}",
                    peak.title,
                    *(human(part) for part in (peak.weights, peak.activations, peak.scratch)),
                    human(peak.total),
                )
                for peak in plan.peaks
            ]
            titles = ("    stage", "part", "weights", "activations", "one decoded", "together")
            table(titles, rows, right=(2, 3, 4, 5))
        for step in one.steps:
            echo(f"    {step}")
