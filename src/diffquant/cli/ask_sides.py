"""What `verify` and `compare` ask alike: which pictures are drawn on every side, and with what."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from diffquant.cli.ask_memory import memory_from, memory_options
from diffquant.cli.values import prompts_from, seeds_from, size_from

__all__ = ["Sides", "side_options"]

_PATH = click.Path(path_type=Path)
_OPTIONS = (
    click.option("--prompts", type=_PATH, help="File with a prompt per line."),
    click.option(
        "--seeds", default="0,1", show_default=True, help="Seeds, with commas, or a file of them."
    ),
    click.option("--steps", type=click.IntRange(1, 1000), default=12, show_default=True),
    click.option("--cfg", type=float, help="Guidance strength (default: the family's)."),
    click.option(
        "--sampler",
        metavar="NAME",
        help="As for generate, any spelling (default: the model's own).",
    ),
    click.option("--size", metavar="WxH", help="Picture size (default: the model's own)."),
    click.option(
        "--lpips-weights",
        type=_PATH,
        help="File of LPIPS with AlexNet (default: where torchvision and lpips keep theirs).",
    ),
    click.option("--base", type=_PATH, help="Where missing parts come from."),
    click.option("--vae", type=_PATH, help="VAE file to use on every side."),
    click.option(
        "--engine",
        type=click.Choice(["bundled", "diffusers", "sdcpp"]),
        default="bundled",
        show_default=True,
        help="Program that draws every side: the one that will load the file, if it is installed.",
    ),
    click.option(
        "--synthetic",
        is_flag=True,
        help="Compare denoisers alone: random text, latents as colours (done by itself, with a "
        "warning, where text encoder or VAE are nowhere).",
    ),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="auto (a CUDA card that computes, else the CPU), cpu, cuda or mps.",
    ),
)


@dataclass(frozen=True, slots=True)
class Sides:
    """The options, as they were typed."""

    prompts: Path | None
    seeds: str
    steps: int
    cfg: float | None
    sampler: str | None
    size: str | None
    lpips_weights: Path | None
    base: Path | None
    vae: Path | None
    engine: str
    synthetic: bool
    device: str
    memory: dict[str, Any]

    @property
    def asks_memory(self) -> bool:
        """Whether anything was said about memory."""
        unsaid = (None, "auto")
        return any(value not in unsaid for value in self.memory.values())

    @property
    def reads(self) -> tuple[Path | None, ...]:
        """Files that are read."""
        return (self.prompts, self.lpips_weights, self.base, self.vae, Path(self.seeds))

    def lines(self) -> tuple[str, ...] | None:
        """The prompts, None where no file was given.

        Raises:
            UsageError: no prompt in the file.
        """
        return prompts_from(self.prompts) if self.prompts else None

    def settings(self) -> dict[str, Any]:
        """Arguments that ImageSettings and CompareSettings share, but the device.

        Raises:
            UsageError: seeds, a size or an amount of memory that are none.
        """
        return {
            "seeds": seeds_from(self.seeds),
            "steps": self.steps,
            "cfg": self.cfg,
            "sampler": self.sampler,
            "size": size_from(self.size),
            "engine": self.engine,
            "lpips_weights": self.lpips_weights,
            "synthetic": self.synthetic,
            "memory": memory_from(self.memory),
        }


def side_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options, passed to the command as one `sides`."""

    @functools.wraps(function)
    def wrapped(*args: object, **kwargs: Any) -> object:  # noqa: ANN401 - click's
        own = {name: kwargs.pop(name) for name in Sides.__dataclass_fields__}
        return function(*args, sides=Sides(**own), **kwargs)

    command: Callable[..., Any] = memory_options(wrapped)
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
