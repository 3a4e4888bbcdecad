"""The quantization error as a LoRA: what rounding took from every packed layer, at a low rank.

    error = source - decoded, (N, K) per layer        ~  up @ down, rank r, in float16

After the output is written it is opened again, as a loader would, and read beside its source: so
the LoRA corrects the bytes that are there, whatever rounding made them. One layer's error matrix is
held at a time; its best factors (quant/lowrank.py) go straight into the file, whose size follows
from shapes alone. What the layer's inputs are like weighs the error where that is known: by
covariance (`--inputs`), else by mean squares (`--imatrix`).

All layers have one rank, zeros where a small layer has less to give: Diffusers takes the rank that
is most common for the alpha of all (diffusers 0.42.1, utils/peft_utils.py, get_peft_kwargs).

The denoiser's matrices get factors. Convolutions and other parts do not, and the plan counts them.
"""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from diffquant import __version__
from diffquant.convert.binding import bind
from diffquant.convert.cutting import chunks_of
from diffquant.convert.gather import float_rows
from diffquant.convert.logical import LogicalSource
from diffquant.convert.lora.error_plan import ErrorLoraReport, LoraLayer, LoraPlan, planned
from diffquant.convert.lora.written import lora_header
from diffquant.convert.output import fingerprint
from diffquant.convert.plan import Plan
from diffquant.convert.step import Step
from diffquant.convert.workers import Task, run_tasks
from diffquant.core.errors import QuantError
from diffquant.core.heap import keep_freed_pages
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.core.tensors import TensorSink
from diffquant.io import open_source, safetensors
from diffquant.io.inputs import InputsFile
from diffquant.quant.formats import matrix_shape
from diffquant.quant.lowrank import Matrix, best_factors, noise

__all__ = ["write_error_lora"]

_RESOLVED = 1e-6  # of a sum of products in float32: what remains below cannot be told
_LARGEST = float(np.finfo(np.float16).max)


def write_error_lora(
    source: Path,
    out: Path,
    plan: Plan,
    lora: LoraPlan,
    *,
    force: bool,
    workers: int,
    inputs: InputsFile | None = None,
    progress: Progress = NO_PROGRESS,
) -> ErrorLoraReport:
    """Read a finished output beside its source and write the LoRA; whole or not at all.

    Raises:
        QuantError: a factor that float16 cannot hold.
        KeyboardInterrupt: interrupted; its text says that the output itself is whole.
    """
    with open_source(source) as left, open_source(out) as right:
        header = {
            **lora_header(plan.architecture, plan.variant, lora.path.stem, lora.rank),
            "diffquant.version": __version__,
            "diffquant.kind": "error_lora",
            "diffquant.architecture": plan.architecture,
            "diffquant.lora.base.name": out.name,
            "diffquant.lora.base.fingerprint": fingerprint(right),
            "diffquant.source.fingerprint": fingerprint(left),
        }
        largest = max(plan.steps[one.step].parameters for one in lora.layers)
        # One room for all layers: matrices of their own sizes would leave holes between them.
        room = np.empty(largest, np.float32)
        job = _Job(bind(left), bind(right), plan, lora, inputs, workers, progress, room)
        progress.start("error LoRA", sum(plan.steps[one.step].source_nbytes for one in lora.layers))
        try:
            with (
                keep_freed_pages(),
                safetensors.create(lora.path, lora.specs, header, force=force) as sink,
            ):
                for one in lora.layers:
                    job.write(one, sink)
                sink.commit()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; {out} is whole, its error LoRA was not written"
            ) from None
        finally:
            progress.stop()
    return job.report()


@dataclass(slots=True)
class _Job:
    """The work on layers, one at a time, and the sums of their errors."""

    left: LogicalSource
    right: LogicalSource
    plan: Plan
    lora: LoraPlan
    inputs: InputsFile | None
    workers: int
    progress: Progress
    room: Matrix  # (largest layer,) float32
    size: float = 0.0
    before: float = 0.0
    after: float = 0.0
    gains: list[tuple[float, float]] = field(default_factory=list)

    def write(self, one: LoraLayer, sink: TensorSink) -> None:
        step = self.plan.steps[one.step]
        error = self._error(step)
        weigh = self._weigh(one, step)
        seed = zlib.crc32(step.key.encode())
        halves = []
        for factor in self._factors(error, one, weigh, seed):
            if not np.abs(factor).max(initial=0) <= _LARGEST:
                raise QuantError(f"{self.lora.path}: {step.key}: factors beyond float16")
            halves.append(factor.astype(np.float16))
        up, down = (half.astype(np.float32) for half in halves)
        before, after = noise(error, up, down)
        self.before, self.after = self.before + before, self.after + after
        if weigh is not None:
            self.gains.append(noise(error, up, down, weigh=weigh))
        arrays = {one.keys.up: halves[0], one.keys.down: halves[1]}
        if one.keys.alpha:
            arrays[one.keys.alpha] = np.array(one.rank, np.float16)
        for key, array in arrays.items():
            sink.write(key, 0, np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    @staticmethod
    def _factors(
        error: Matrix, one: LoraLayer, weigh: Matrix | None, seed: int
    ) -> tuple[Matrix, Matrix]:
        """Factors of the rank that all layers have; zeros where a layer has less."""
        up, down = best_factors(error, min(one.rank, *error.shape), weigh=weigh, seed=seed)
        more = one.rank - len(down)
        return np.pad(up, ((0, 0), (0, more))), np.pad(down, ((0, more), (0, 0)))

    def _error(self, step: Step) -> Matrix:
        """Source minus decoded, filled in chunks."""
        shape = matrix_shape(step.assignment.shape)
        error = self.room[: math.prod(shape)].reshape(shape)
        chunks = chunks_of(step)
        sizes = [0.0] * len(chunks)

        def fill(index: int) -> list[Task]:
            rows = chunks[index]
            weight = float_rows(self.left, step, rows)
            part = error[rows[0] : rows[1]]
            np.subtract(weight, self.right.read(step.target, rows), out=part)
            sizes[index] = float(np.einsum("ij,ij->", weight, weight, dtype=np.float64))
            self.progress.advance(step.source_nbytes // len(chunks), step.target)
            return []

        run_tasks((functools.partial(fill, index) for index in range(len(chunks))), self.workers)
        self.size += sum(sizes)
        return error

    def _weigh(self, one: LoraLayer, step: Step) -> Matrix | None:
        if one.weigh == "covariance" and self.inputs is not None:
            return self.inputs.covariance(step.key)
        return self.lora.importance.get(step.key)

    def report(self) -> ErrorLoraReport:
        size = self.size or 1.0
        gained = None
        if self.gains:
            # a layer's outputs have a size of their own: the gain is the mean of layers' gains
            ratios = [
                before / max(after, _RESOLVED * before)
                for before, after in self.gains
                if before > 0
            ]
            gained = 10 * float(np.mean(np.log10(ratios))) if ratios else None
        return replace(
            planned(self.lora),
            error=math.sqrt(self.before / size),
            corrected_error=math.sqrt(self.after / size),
            weighed_gain_db=gained,
        )
