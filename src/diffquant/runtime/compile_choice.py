"""Whether a denoiser's blocks are compiled: asked for, or when the steps that are left repay it.

With "auto" two steps run as they are. The first brings the weights and compiles Triton's kernels;
the second is timed. If what compiled steps save of that time, over the steps that are left, is
more than compiling takes, the rest runs compiled. So a slow card compiles where a fast one, whose
pictures are done before, does not.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import torch

from diffquant.core.errors import UsageError
from diffquant.runtime.compiling import LEAST, Compiled, compiled, kinds_of, preload, said_by
from diffquant.runtime.families import PipelineParts
from diffquant.runtime.low_bit import pending

__all__ = ["MEASURED", "Choice", "Compiling", "Mode", "choose"]

Mode = Literal["auto", "on", "off"]
_LOG = logging.getLogger(__name__)
_TIMED = 2  # the step that is timed; those before it do what is done once


@dataclass(frozen=True, slots=True)
class Measured:
    """What compiling took and saved, on the card it was measured on (docs/lab-log.md).

    Attributes:
        saved: share of a step that runs as it is.
        kind_s: seconds to compile one kind of block, nothing in torch's cache.
    """

    saved: float
    kind_s: float


# One H100, 4608 tokens: 137 ms as it is by our own kernels, 138 compiled (bf16); 110 and 117 (fp8
# products); as CUDA graphs 130 and 91. Before those kernels compiling saved 0.32.
# SDXL is no row: its step is bound by launches, and compiled blocks took as long or longer.
MEASURED: Mapping[str, Measured] = {"flux1": Measured(saved=0.0, kind_s=3.3)}


@dataclass(frozen=True, slots=True)
class Choice:
    """Compile or not, and why, for people."""

    compile: bool
    why: str


def choose(architecture: str, device: str, *, kinds: int, step_s: float, left: int) -> Choice:
    """Decide for a run whose user left it open.

    Args:
        architecture: of the model.
        device: type of the device.
        kinds: of blocks: graphs to be made.
        step_s: seconds of a step that was not compiled.
        left: steps to be made.
    """
    if device != "cuda":
        return Choice(False, f"not compiled: only for cuda is it known to repay, not for {device}")
    row = MEASURED.get(architecture)
    if row is None:
        return Choice(False, f"not compiled: what it saves was not measured for {architecture}")
    if row.saved <= 0:
        return Choice(False, f"not compiled: measured for {architecture}, it saves nothing")
    saves, takes = row.saved * step_s * left, row.kind_s * kinds
    sums = (
        f"a step took {step_s:.3g} s, the {left} left would save about {saves:.2g} s, compiling "
        f"{kinds} kinds of blocks takes about {takes:.2g} s"
    )
    return (
        Choice(True, f"compiled: {sums}")
        if saves > takes
        else Choice(False, f"not compiled: {sums}")
    )


class Compiling:
    """The denoiser of one pass, compiled from some step on; a context manager.

    Attributes:
        said: what was decided and came of it, for people.
    """

    def __init__(
        self,
        mode: Mode,
        parts: PipelineParts,
        device: str,
        tell: Callable[[str], None] = lambda _what: None,
        *,
        backend: str | Callable[..., Any] = "inductor",
        least: int = LEAST,
        instead: str = "",
        began: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the model.

        Args:
            mode: "on" compiles from the first step, "auto" decides after the second.
            parts: its denoiser is compiled.
            device: of torch.
            tell: what is being compiled; torch says nothing while it works.
            backend: of torch.compile.
            least: see compiling.compiled.
            instead: what is done in place of it, where nobody asked to compile; "": nothing.
            began: called when blocks are compiled from the next call on.
        """
        self._mode, self._parts, self._device = mode, parts, torch.device(device).type
        self._tell, self._backend, self._least = tell, backend, least
        self._began = began
        self._stack = contextlib.ExitStack()
        self._state: Compiled | None = None
        self._last = 0.0
        self._decided = mode != "auto" or bool(instead)
        self.said = {
            "auto": f"not compiled: {instead or 'too few steps to repay it'}",
            "on": "compiled: asked for",
            "off": "not compiled: asked for",
        }[mode]

    def __enter__(self) -> Self:
        """Compile where that was asked for; where it may be, load the compiler meanwhile.

        Layers that find out in the first step how they multiply (low_bit.py) run it as they are.
        """
        row = MEASURED.get(self._parts.architecture)
        possible = self._device == "cuda" and row is not None and row.saved > 0
        if self._backend == "inductor" and (self._mode == "on" or (not self._decided and possible)):
            preload()
        if self._mode == "on":
            if pending(self._parts.denoiser):
                self.said = "not compiled: there was no second step"
                self._decided = False
            else:
                self._begin()
        return self

    def stepped(self, done: int, total: int) -> None:
        """Hear of a step; see pipeline.OnStep. A run that starts anew is timed anew."""
        before, self._last = self._last, time.perf_counter()
        if self._decided or (done < _TIMED and self._mode == "auto"):
            return
        self._decided = True
        if self._mode == "on":
            if done < total:
                self.said = "compiled: asked for, after a step that measured layers in 8 bits"
                self._begin()
            return
        choice = choose(
            self._parts.architecture,
            self._device,
            kinds=len(kinds_of(self._parts.denoiser, least=self._least)),
            step_s=self._last - before,
            left=total - done,
        )
        self.said = choice.why
        _LOG.info("%s", choice.why)
        if choice.compile:
            self._begin()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the blocks back.

        Raises:
            UsageError: the compiler failed.
        """
        self._stack.close()
        state = self._state
        if state is None:
            return
        if error is not None:
            from torch._dynamo.exc import TorchDynamoException

            if isinstance(error, TorchDynamoException):
                raise UsageError(f"--compile on: the compiler failed ({said_by(error)})") from error
        if state.failed:
            self.said = f"not compiled: the compiler failed ({state.failed})"
            _LOG.warning("%s", self.said)
        elif state.streamed:
            self.said += (
                f"; {len(state.streamed)} of {state.blocks} blocks ran as they are, since their "
                "weights are streamed"
            )

    def _begin(self) -> None:
        def on_compile(number: int, kinds: int) -> None:
            self._tell(f"compiling block {number} of {kinds}")
            _LOG.info("compiling block %d of %d", number, kinds)

        self._state = self._stack.enter_context(
            compiled(
                self._parts.denoiser,
                backend=self._backend,
                on_compile=on_compile,
                required=self._mode == "on",
                least=self._least,
            )
        )
        self._began()
