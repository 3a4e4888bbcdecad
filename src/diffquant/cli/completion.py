"""`diffquant completion SHELL`: the script that teaches a shell our commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from diffquant.cli.frame import echo

__all__ = ["command"]


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script for SHELL; append it to your shell's start-up file."""
    from diffquant.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None, "click knows the three shells"
    echo(kind(cli, {}, "diffquant", "_DIFFQUANT_COMPLETE").source())
