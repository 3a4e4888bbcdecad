"""`diffquant lora`: the LoRA workshop, a table of subcommands, each imported when asked for."""

from __future__ import annotations

import click

from diffquant.cli.lazy import LazyGroup

__all__ = ["LORA_COMMANDS", "command"]

# name -> (module, one line for the overview)
LORA_COMMANDS: dict[str, tuple[str, str]] = {
    "merge": ("diffquant.cli.lora_merge", "Write a checkpoint with LoRAs merged into it."),
    "check": ("diffquant.cli.lora_check", "Say whether a LoRA fits a model, and what to do."),
    "convert": ("diffquant.cli.lora_convert", "Write a LoRA under another program's names."),
    "extract": ("diffquant.cli.lora_extract", "Make a LoRA of the difference of two models."),
    "resize": ("diffquant.cli.lora_resize", "Lower a LoRA's rank."),
    "transfer": ("diffquant.cli.lora_transfer", "Put a fine-tune's difference on another model."),
}


class _Workshop(LazyGroup):
    commands_table = LORA_COMMANDS


@click.group("lora", cls=_Workshop)
def command() -> None:
    """Check, convert, merge, extract and resize LoRAs and other adapters."""
