"""Whether a denoiser's steps run as one CUDA graph: asked for, or where it can and enough follow.

What it saves is Python's launching of kernels, which a fast card waits for: an H100's SDXL step
took 66 to 130 ms as it is and 39 to 47 as a graph, Flux.1's 134 to 180 and 130 to 140
(docs/lab-log.md, 2026-11-27). It costs one more run of a step's Python, and no memory to speak of:
what a step allocates is freed before it is captured.
"""

from __future__ import annotations

import contextlib
import logging
from types import TracebackType
from typing import Literal, Self

import torch

from diffquant.runtime.capture import Captured, CudaGraphs, Recorder, captured
from diffquant.runtime.families import PipelineParts
from diffquant.runtime.layers import PackedLayer

__all__ = ["LEAST_STEPS", "Graphs", "Mode"]

Mode = Literal["auto", "on", "off"]
LEAST_STEPS = 4  # one runs as it is, one is captured
_LOG = logging.getLogger(__name__)


class Graphs:
    """The denoiser of one pass, its calls replayed from the third on; a context manager.

    Attributes:
        said: what came of it, for people.
        warning: the same where it was asked for in vain, or failed; "": neither.
    """

    def __init__(
        self,
        mode: Mode,
        parts: PipelineParts,
        device: str,
        steps: int,
        *,
        compiled: bool = False,
        recorder: Recorder | None = None,
    ) -> None:
        """Take the model.

        Args:
            mode: "on" does not ask how many steps there are.
            parts: its denoiser is captured.
            device: of torch.
            steps: of the pass.
            compiled: whether its blocks are compiled, on some call: "auto" leaves them alone, for
                what compiles may not be captured.
            recorder: CudaGraphs on the device.
        """
        self._denoiser, self._mode = parts.denoiser, mode
        self._recorder = recorder or CudaGraphs(torch.device(device))
        self._stack = contextlib.ExitStack()
        self._state: Captured | None = None
        kind = torch.device(device).type
        if mode == "off":
            self.said = "no CUDA graph: asked for"
        elif kind != "cuda":
            self.said = f"no CUDA graph: the device is {kind}"
        elif mode == "auto" and compiled:
            self.said = "no CUDA graph: blocks are compiled"
        elif mode == "auto" and steps < LEAST_STEPS:
            self.said = f"no CUDA graph: {steps} steps are too few"
        else:
            self.said = ""

    def begin(self, calls: int) -> None:
        """Hear how many steps are made: fewer than were planned where a picture is begun with."""
        if self._mode == "auto" and self._state is not None and calls < LEAST_STEPS:
            self._stack.close()
            self._state = None
            self.said = f"no CUDA graph: {calls} calls are too few"

    def anew(self) -> None:
        """Forget what was captured and seen: the next call of each shape runs as it is."""
        if self._state is not None:
            self._state.anew()

    @property
    def warning(self) -> str:
        """See above; known when the pass is over."""
        state = self._state
        captured_some = state is not None and bool(state.captured)
        failed = state is not None and bool(state.failed)
        if failed or (self._mode == "on" and not captured_some):
            return f"--cuda-graphs {self._mode}: {self.said}"
        return ""

    @property
    def possible(self) -> bool:
        """Whether calls are to be captured."""
        return not self.said

    def __enter__(self) -> Self:
        """Begin to look at calls."""
        if self.possible:
            self._state = self._stack.enter_context(captured(self._denoiser, self._recorder))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the denoiser's own calls back, and let go of the graphs."""
        self._stack.close()
        if self._state is not None:
            self.said = _told(self._state, streamed=_streams(self._denoiser))
            _LOG.info("%s", self.said)


def _streams(denoiser: torch.nn.Module) -> bool:
    return any(
        layer.home is not None for layer in denoiser.modules() if isinstance(layer, PackedLayer)
    )


def _told(state: Captured, *, streamed: bool) -> str:
    failed = f"capturing failed ({state.failed})" if state.failed else ""
    if not state.captured:
        why = failed or ("weights are streamed" if streamed else "no call was made twice")
        return f"no CUDA graph: {why}"
    used = state.captured + state.replayed
    text = f"CUDA graph: {used} of {state.plain + used} calls"
    if failed:
        return f"{text}, then {failed}"
    return text + (", until weights were streamed" if streamed else "")
