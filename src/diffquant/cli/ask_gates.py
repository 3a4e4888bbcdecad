"""Gates on the command line: one option per row of GATES, for `verify` and `compare`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from diffquant.cli.frame import echo
from diffquant.runtime.gates import GATES

__all__ = ["gate_options", "render_gates"]


def gate_options(*left_out: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options, passed to the command as one `limits`: name -> limit, of those given.

    Args:
        left_out: names that the command has itself.
    """
    names = [name for name in GATES if name not in left_out]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: object, **kwargs: Any) -> object:  # noqa: ANN401 - click's
            limits = {name: kwargs.pop(name) for name in names}
            given = {name: limit for name, limit in limits.items() if limit is not None}
            return function(*args, limits=given, **kwargs)

        for name in reversed(names):
            row = GATES[name]
            wrapped = click.option(
                f"--{name.replace('_', '-')}",
                type=float,
                metavar="DB" if row.unit else "NUMBER",
                help=f"Gate: {row.about}",
            )(wrapped)
        return wrapped

    return decorate


def render_gates(gates: list[dict[str, Any]], indent: str) -> None:
    """Print one line a gate: its limit, what was reached, what the control reached."""
    for gate in gates:
        flag = f"--{gate['gate'].replace('_', '-')} {gate['limit']:g}"
        reached, control = (
            "-" if gate[name] is None else f"{gate[name]:.4g}" for name in ("value", "control")
        )
        echo(f"{indent}{gate['verdict']}: {flag}, reached {reached}, control {control}")
