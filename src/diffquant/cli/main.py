"""The `diffquant` command: a table of subcommands, each imported only when asked for."""

from __future__ import annotations

import sys

import click

from diffquant import __version__
from diffquant.cli.lazy import LazyGroup
from diffquant.core.interrupts import ctrl_c, keep_interrupts

__all__ = ["COMMANDS", "cli", "main"]

# name -> (module, one line for the overview)
COMMANDS: dict[str, tuple[str, str]] = {
    "inspect": ("diffquant.cli.inspect", "Say what files are, from their headers."),
    "quantize": ("diffquant.cli.quantize", "Quantize a checkpoint and check the result."),
    "batch": ("diffquant.cli.batch", "Make what a plan file names: models, types, targets."),
    "convert": ("diffquant.cli.convert", "Change dtype, parts or layout without quantizing."),
    "lora": ("diffquant.cli.lora", "Check, convert, merge, extract, resize LoRAs."),
    "calibrate": ("diffquant.cli.calibrate", "Measure an importance matrix for quantize."),
    "imatrix": ("diffquant.cli.imatrix", "Show, merge and convert importance matrices."),
    "generate": ("diffquant.cli.generate", "Generate pictures with the bundled runtime."),
    "verify": ("diffquant.cli.verify", "Compare a file with its source: tensors, pictures."),
    "compare": ("diffquant.cli.compare", "Compare several files with one, by their pictures."),
    "diff": ("diffquant.cli.diff", "Say what differs between two checkpoints."),
    "download": ("diffquant.cli.download", "Download files of a repository, checked."),
    "publish": ("diffquant.cli.publish", "Publish files with a model card on a hub."),
    "recommend": ("diffquant.cli.recommend", "Rank the types to write for a device and a program."),
    "doctor": ("diffquant.cli.doctor", "Say what this machine has, runs, and is limited by."),
    "formats": ("diffquant.cli.formats", "List types, formats and containers."),
    "completion": ("diffquant.cli.completion", "Print a shell completion script."),
}


class _Commands(LazyGroup):
    commands_table = COMMANDS


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="diffquant", message="%(prog)s %(version)s")
def cli() -> None:
    """Read, convert, quantize and verify diffusion checkpoints.

    diffquant quantize MODEL -o OUT.gguf -t q4_k_s
    """


def main() -> None:
    """Entry point of the console script; Ctrl-C is 130 wherever it strikes."""
    keep_interrupts(ctrl_c)
    try:
        code = cli.main(prog_name="diffquant", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("diffquant: interrupted; nothing was left behind", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
