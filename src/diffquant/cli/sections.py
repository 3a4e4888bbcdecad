"""A command whose help lists its options under headings."""

from __future__ import annotations

from collections.abc import Mapping

import click

__all__ = ["Sectioned"]


class Sectioned(click.Command):
    """Options by heading; those that no heading names come last, under "Other".

    Attributes:
        sections: heading -> names of parameters, in the order of the help.
    """

    sections: Mapping[str, tuple[str, ...]] = {}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the headings."""
        options = [one for one in self.get_params(ctx) if isinstance(one, click.Option)]
        rows = {one.name: one.get_help_record(ctx) for one in options}
        named = {name for names in self.sections.values() for name in names}
        last = tuple(name for name in rows if name is not None and name not in named)
        for title, names in {**self.sections, "Other": last}.items():
            listed = [row for name in names if (row := rows.get(name)) is not None]
            if listed:
                with formatter.section(title):
                    formatter.write_dl(listed)
