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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffquant import __version__
from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.binding import bind
from diffquant.convert.cutting import CHUNK, chunks_of
from diffquant.convert.detect import Match
from diffquant.convert.gather import float_rows
from diffquant.convert.importance import check_columns, importance_values, match_entries
from diffquant.convert.logical import LogicalSource
from diffquant.convert.lora.written import LoraKeys, kohya_modules, lora_header, lora_keys
from diffquant.convert.output import fingerprint
from diffquant.convert.plan import Plan, Step
from diffquant.convert.workers import Task, default_workers, run_tasks
from diffquant.core.errors import QuantError, UsageError
from diffquant.core.heap import keep_freed_pages
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.core.tensors import TensorSink, TensorSpec
from diffquant.io import open_source, safetensors
from diffquant.io.atomic import check_parent
from diffquant.io.importance import ImportanceMatrix
from diffquant.io.inputs import InputsFile, covariance_shape
from diffquant.quant.formats import FORMATS, matrix_shape
from diffquant.quant.lowrank import Matrix, best_factors, live_nbytes, noise

__all__ = [
    "ErrorLoraReport",
    "LoraPlan",
    "check_lora_target",
    "plan_error_lora",
    "planned",
    "write_error_lora",
]

_HELD = "F16"
_RESOLVED = 1e-6  # of a sum of products in float32: what remains below cannot be told
_LARGEST = float(np.finfo(np.float16).max)
_BLAS_NBYTES = 20 << 20  # numpy's OpenBLAS keeps 18 MiB for each of its threads
_NBYTES_PER_WEIGHT = 16  # of a chunk: source, decoded and their difference in float32, bytes


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's place: `step` in the plan, names in the file; `weigh` says what H is."""

    step: int
    keys: LoraKeys
    rank: int
    weigh: str = ""


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """What will be written, known before a weight is read.

    Attributes:
        path: the file.
        rank: of every layer; what was asked for, or what the largest layer has.
        specs: its tensors.
        layers: in the output's order.
        without: why other packed weights get no factors -> how many.
        nbytes: of all tensors.
        peak_nbytes: memory it needs: the largest layer's error in float32 and what goes with it.
        importance: canonical key -> (K,) mean squares of the layers weighed by an imatrix.
    """

    path: Path
    rank: int
    specs: tuple[TensorSpec, ...]
    layers: tuple[_Layer, ...]
    without: Mapping[str, int]
    nbytes: int
    peak_nbytes: int
    importance: Mapping[str, NDArray[np.float32]]

    @property
    def note(self) -> str:
        """One line for the plan."""
        counts = {kind: sum(one.weigh == kind for one in self.layers) for kind in _KINDS}
        weighed = ", ".join(f"{n} {_KINDS[kind]}" for kind, n in counts.items() if n)
        less = "; without: " + ", ".join(f"{n} {why}" for why, n in self.without.items())
        return (
            f"error LoRA {self.path.name}: rank {self.rank}, {len(self.layers)} layers ({weighed}),"
            f" {self.nbytes / 2**20:.1f} MiB, memory {self.peak_nbytes / 2**20:.0f} MiB"
            f"{less if self.without else ''}"
        )


_KINDS = {
    "covariance": "weighed by the covariance of their inputs",
    "importance": "weighed by importance",
    "": "unweighed",
}


@dataclass(frozen=True, slots=True)
class ErrorLoraReport:
    """What the LoRA holds, or will.

    Attributes:
        output: path.
        rank, layers, nbytes: as planned.
        without: why other packed weights get no factors -> how many.
        error: relative RMSE of these layers' weights without it; None before it is made.
        corrected_error: and with it.
        weighed_gain_db: by how much it lowers the squared error in the layers' outputs, as far as
            their inputs are known; None where nothing weighs.
    """

    output: str
    rank: int
    layers: int
    nbytes: int
    without: Mapping[str, int]
    error: float | None = None
    corrected_error: float | None = None
    weighed_gain_db: float | None = None


def check_lora_target(path: Path, taken: Iterable[Path | None], *, force: bool) -> None:
    """Check, before work starts, that the LoRA can be written.

    Raises:
        UsageError: another extension, a file that is read or written already, that exists without
            `force`, or that lies in a folder which is not there or will be swapped.
    """
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"{path}: an error LoRA is written as .safetensors")
    for other in taken:
        if other is None:
            continue
        if path.resolve() == other.resolve() or other.resolve() in path.resolve().parents:
            raise UsageError(f"{path}: is {other}, or part of it; choose another name")
    check_parent(path)
    if path.is_dir() or (path.exists() and not force):
        raise UsageError(f"{path} exists; use --force to replace it")


def plan_error_lora(
    plan: Plan,
    match: Match,
    path: Path,
    *,
    matrix: ImportanceMatrix | None = None,
    inputs: InputsFile | None = None,
) -> LoraPlan:
    """Plan the LoRA of a plan's errors.

    Args:
        plan: of the quantized output.
        match: of its source.
        path: the LoRA to write; of the rank that the plan's request names.
        matrix: weighs errors where `inputs` does not.
        inputs: statistics of layer inputs.

    Raises:
        UsageError: nothing is packed that a LoRA can correct.
        UnsupportedShape: statistics of another model.
    """
    architecture = ARCHITECTURES[match.architecture]
    folder, rank = plan.request.container == "folder", plan.request.lora_rank
    steps = plan.part_steps("denoiser")
    component = architecture.component("denoiser")
    shapes = {step.key: step.assignment.shape for step in steps}
    modules = {} if folder else kohya_modules(component, shapes)
    names = match_entries(matrix, architecture, match.parts) if matrix is not None else {}
    matrices = [step.assignment.shape for step in steps if _is_packed(step) and not _unfit(step)]
    rank = min(rank, max((min(shape) for shape in matrices), default=rank))
    layers: list[_Layer] = []
    specs: list[TensorSpec] = []
    without: dict[str, int] = {}
    weighs: dict[str, NDArray[np.float32]] = {}
    for index, step in enumerate(plan.steps):
        if not _is_packed(step):
            continue
        if why := _unfit(step):
            without[why] = without.get(why, 0) + 1
            continue
        rows, columns = matrix_shape(step.assignment.shape)
        keys = lora_keys(step.target, folder=folder, modules=modules, key=step.key)
        weigh = ""
        if inputs is not None and step.key in inputs.columns:
            check_columns(inputs, step.key, columns)
            weigh = "covariance"
        elif matrix is not None and (name := names.get((step.part, step.key))) is not None:
            weighs[step.key] = importance_values(matrix, name, step)
            weigh = "importance"
        one = _Layer(index, keys, rank, weigh)
        layers.append(one)
        specs += _specs(one, rows, columns)
    if not layers:
        raise UsageError(
            f"{path}: no error to hold: this output packs no linear layer of the denoiser"
        )
    return LoraPlan(
        path=path,
        rank=rank,
        specs=tuple(specs),
        layers=tuple(layers),
        without=without,
        nbytes=sum(spec.nbytes for spec in specs),
        peak_nbytes=_BLAS_NBYTES * default_workers()
        + max(plan.steps[one.step].parameters for one in layers) * 4
        + max(_live_nbytes(plan.steps[one.step], one) for one in layers),
        importance=weighs,
    )


def _is_packed(step: Step) -> bool:
    """Whether this run rounds the weight: what is copied has no error."""
    return bool(step.decision.format) and not FORMATS[step.decision.format].is_cast


def _unfit(step: Step) -> str:
    if step.part != "denoiser":
        return f"weights of {step.part or 'no part'}"
    if len(step.assignment.shape) != 2 or not step.key.endswith(".weight"):
        return "weights that are no matrix"
    return ""


def _specs(one: _Layer, rows: int, columns: int) -> Iterator[TensorSpec]:
    yield TensorSpec(one.keys.down, _HELD, (one.rank, columns))
    yield TensorSpec(one.keys.up, _HELD, (rows, one.rank))
    if one.keys.alpha:
        yield TensorSpec(one.keys.alpha, _HELD, ())


def _live_nbytes(step: Step, one: _Layer) -> int:
    """What a layer needs beside its error matrix."""
    rows, columns = matrix_shape(step.assignment.shape)
    covariance = 4 * math.prod(covariance_shape(columns)) if one.weigh == "covariance" else 0
    held = min(rows * columns, 2 * CHUNK) * _NBYTES_PER_WEIGHT
    return covariance + max(live_nbytes((rows, columns), one.rank), held)


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

    def write(self, one: _Layer, sink: TensorSink) -> None:
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
        error: Matrix, one: _Layer, weigh: Matrix | None, seed: int
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

    def _weigh(self, one: _Layer, step: Step) -> Matrix | None:
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


def planned(lora: LoraPlan) -> ErrorLoraReport:
    """The report of a dry run."""
    return ErrorLoraReport(
        str(lora.path), lora.rank, len(lora.layers), lora.nbytes, dict(lora.without)
    )
