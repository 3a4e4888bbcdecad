"""What an engine is: a program that opens files and draws pictures from requests.

The bundled runtime is one; the others are the programs that people load files with. Judging
(compare.py) and generating speak to a `Side`, whatever is behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import UsageError
from diffquant.runtime.compute import Mode
from diffquant.runtime.memory.budget import Asked
from diffquant.runtime.prompts import parse
from diffquant.runtime.request import PictureRequest

__all__ = [
    "EngineFiles",
    "OnLatents",
    "OnStep",
    "Pictures",
    "Side",
    "refuse_swapped",
    "refuse_unserved",
    "refuse_weights",
]

OnStep: TypeAlias = Callable[[int, int], None]
Pictures: TypeAlias = NDArray[np.float32]
OnLatents: TypeAlias = Callable[[NDArray[np.float32]], None]


@dataclass(frozen=True, slots=True)
class EngineFiles:
    """What a side is opened from.

    Attributes:
        model: the file or folder that is judged or drawn with.
        base: where missing parts, configs and tokenizers come from.
        vae: VAE file that replaces the model's own.
        loras: (file, weight).
        dtype: compute dtype by torch's name.
        device: torch device.
        swapped: (part, checkpoint): that part alone comes from there, all others as they would.
        rough: the denoiser computes in bfloat16 from the start, where the engine can be told so;
            `Side.rough` does it to a model that is open, and may hold it twice.
        synthetic: the denoiser alone, as runtime/synthetic.py draws with it.
        compute: what the denoiser's layers multiply in; only the bundled runtime can be asked.
        memory: what may be taken of the device's and the host's; only the bundled runtime plans.
    """

    model: Path
    base: Path | None = None
    vae: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    dtype: str = "float32"
    device: str = "cpu"
    swapped: tuple[tuple[str, Path], ...] = ()
    rough: bool = False
    synthetic: bool = False
    compute: Mode = "exact"
    memory: Asked = field(default_factory=Asked)


class Side(Protocol):
    """An opened model in some engine."""

    @property
    def engine(self) -> str:
        """Name and version of the program that runs."""
        ...

    @property
    def how(self) -> str:
        """Who read the file: the program itself, or diffquant for it, and then why."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Native (width, height)."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was guessed or odd."""
        ...

    def draw(
        self,
        request: PictureRequest,
        on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
    ) -> Pictures:
        """Pictures (B, H, W, 3) in [0, 1]; `on_latents` is told the last latents, if it can be."""
        ...

    def damaged(self, *, rows: bool) -> AbstractContextManager[str | None]:
        """Damage one block for the duration; yields what was done, None where nothing can be."""
        ...

    def rough(self) -> AbstractContextManager[Side | None]:
        """The same model with its denoiser in bfloat16, None where that cannot be asked for."""
        ...


def refuse_swapped(engine: str, files: EngineFiles) -> None:
    """Refuse what is ours alone: parts from elsewhere, stand-ins, planned memory.

    Raises:
        UsageError: there is one.
    """
    if files.memory != Asked():
        raise UsageError(
            f"--vram, --ram, --offload and --decode are of the bundled engine: {engine} places "
            "weights in its own way"
        )
    if files.synthetic:
        raise UsageError(f"--engine {engine} draws no synthetic pictures: use --engine bundled")
    if files.swapped:
        raise UsageError(
            f"--engine {engine} cannot take the {files.swapped[0][0]} alone from another file: "
            "use --engine bundled"
        )


def refuse_unserved(engine: str, request: PictureRequest, served: frozenset[str]) -> None:
    """Refuse every field of a request that an engine does not serve and that is not its default.

    Raises:
        UsageError: all of them, by name.
    """
    asked = [
        one.name
        for one in fields(request)
        if one.name not in served
        and one.name != "prompt"
        and getattr(request, one.name) is not one.default
        and getattr(request, one.name) != one.default
    ]
    if asked:
        raise UsageError(
            f"--engine {engine} cannot honour {', '.join(asked)}: leave it out, or use --engine "
            "bundled"
        )


def refuse_weights(engine: str, request: PictureRequest, own: str) -> None:
    """Refuse prompts whose weights an engine, which has the prompt style `own`, reads otherwise.

    Raises:
        UsageError: a prompt means something else there.
    """
    if request.prompt_style == own:
        return
    for text in filter(None, (*request.prompts, request.negative)):
        plain = parse(text, "plain")
        if any(parse(text, style) != plain for style in (request.prompt_style, own)):
            raise UsageError(
                f"--engine {engine} reads weights in a prompt as {own} ({text!r}): write it "
                f"without, or say --prompt-style {own}"
            )
