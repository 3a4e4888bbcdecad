"""Plan the LoRA of the quantization error: which layers, of what rank, in how many bytes.

Everything follows from the plan of the output: nothing is read. What is weighed, and what gets no
factors, is said. convert/lora/error.py makes the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.cutting import CHUNK
from diffquant.convert.importance import check_columns, importance_values, match_entries
from diffquant.convert.lora.written import LoraKeys, kohya_modules, lora_keys
from diffquant.convert.match import Match
from diffquant.convert.plan import Plan
from diffquant.convert.step import Step
from diffquant.convert.workers import default_workers
from diffquant.core.errors import UsageError
from diffquant.core.tensors import TensorSpec
from diffquant.io.atomic import check_parent
from diffquant.io.importance import ImportanceMatrix
from diffquant.io.inputs import InputsFile, covariance_shape
from diffquant.quant.formats import FORMATS, matrix_shape
from diffquant.quant.lowrank import live_nbytes

__all__ = [
    "ErrorLoraReport",
    "LoraLayer",
    "LoraPlan",
    "check_lora_target",
    "plan_error_lora",
    "planned",
]

_HELD = "F16"
_BLAS_NBYTES = 20 << 20  # numpy's OpenBLAS keeps 18 MiB for each of its threads
_NBYTES_PER_WEIGHT = 16  # of a chunk: source, decoded and their difference in float32, bytes


@dataclass(frozen=True, slots=True)
class LoraLayer:
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
    layers: tuple[LoraLayer, ...]
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
    layers: list[LoraLayer] = []
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
        one = LoraLayer(index, keys, rank, weigh)
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


def _specs(one: LoraLayer, rows: int, columns: int) -> Iterator[TensorSpec]:
    yield TensorSpec(one.keys.down, _HELD, (one.rank, columns))
    yield TensorSpec(one.keys.up, _HELD, (rows, one.rank))
    if one.keys.alpha:
        yield TensorSpec(one.keys.alpha, _HELD, ())


def _live_nbytes(step: Step, one: LoraLayer) -> int:
    """What a layer needs beside its error matrix."""
    rows, columns = matrix_shape(step.assignment.shape)
    covariance = 4 * math.prod(covariance_shape(columns)) if one.weigh == "covariance" else 0
    held = min(rows * columns, 2 * CHUNK) * _NBYTES_PER_WEIGHT
    return covariance + max(live_nbytes((rows, columns), one.rank), held)


def planned(lora: LoraPlan) -> ErrorLoraReport:
    """The report of a dry run."""
    return ErrorLoraReport(
        str(lora.path), lora.rank, len(lora.layers), lora.nbytes, dict(lora.without)
    )
