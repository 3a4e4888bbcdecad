"""`diffquant lora`: the LoRA workshop, a table of subcommands, each imported when asked for."""

from __future__ import annotations

import click

from diffquant.cli.lazy import LazyGroup

__all__ = ["LORA_COMMANDS", "command"]

# name -> (module, one line for the overview)
LORA_COMMANDS: dict[str, tuple[str, str]] = {
    "merge": ("diffquant.cli.lora_merge", "Write a checkpoint with LoRAs merged into it."),
}


class _Workshop(LazyGroup):
    commands_table = LORA_COMMANDS


@click.group("lora", cls=_Workshop)
def command() -> None:
    """Merge LoRAs and other adapters into checkpoints."""
