"""A group of commands as a table of rows, each module imported only when its command is used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import click

__all__ = ["LazyGroup"]


class LazyGroup(click.Group):
    """Loads a subcommand's module when it is used, so that `inspect` never pays for torch.

    Attributes:
        commands_table: name -> (module with a `command`, one line for the overview).
    """

    commands_table: Mapping[str, tuple[str, str]] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(self.commands_table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; None for a name that is not in the table."""
        if cmd_name not in self.commands_table:
            return None
        loaded: click.Command = importlib.import_module(self.commands_table[cmd_name][0]).command
        return loaded

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Print the overview from the table: no module is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in self.commands_table.items()])
