"""make_plan(): decide everything from specs, before a weight is read.

A Plan is pure data: every output name, shape, byte count and number of passes is in it. `--dry-run`
prints it, convert/engine.py runs it, and a sink can reserve the final size from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.architectures.base import Architecture
from diffquant.convert.architectures.parts import PARTS, architecture_named
from diffquant.convert.bias import BiasFix, Corrected, correct_biases
from diffquant.convert.detect import Match, PartMatch
from diffquant.convert.encoders.files import ENCODER_FILES
from diffquant.convert.encoders.parts import MMPROJ, gguf_part
from diffquant.convert.importance import weigh_steps
from diffquant.convert.leftovers import copy_step, is_plain, marker_step
from diffquant.convert.logical import LogicalSource
from diffquant.convert.losses import losses
from diffquant.convert.recipes import recipe_warnings
from diffquant.convert.request import Request
from diffquant.convert.roundings import round_steps, weighed_by_search
from diffquant.convert.step import Step
from diffquant.convert.steps import dialect_of, part_steps
from diffquant.convert.stored import stored_tensors
from diffquant.convert.targets import TARGETS, Target, candidates
from diffquant.core.errors import DuplicateTarget, PolicyError, UsageError, shorten
from diffquant.core.tensors import TensorSpec
from diffquant.io.importance import ImportanceMatrix
from diffquant.io.inputs import InputsFile
from diffquant.quant.formats import FORMATS
from diffquant.quant.policy import CONVOLUTION, flat_shape

__all__ = ["Plan", "Request", "Step", "make_plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything `run_plan` will do.

    Attributes:
        architecture: slug.
        variant: as detected.
        request: what was asked.
        steps: in output order.
        dropped: (source key, reason) of tensors that are not written.
        warnings: what the user should know before starting.
        mixed: whether less than half of the denoiser's weights got the named type.
        target: TARGETS name the output is written for.
        policy: whose choice the mix is, as `diffquant.policy` says it; "" where nothing was chosen.
        notes: what the target gives up against another.
        importance: canonical key -> (K,) mean squares, of the steps that are encoded with them.
        matrix: the importance matrix they come from, None where none was given.
        inputs: statistics of layer inputs for the steps rounded by feedback; open.
        encoder: the text encoder that a GGUF file holds alone; None for any other output.
        bias_fixes: layers whose bias makes up for the rounding of their weight.
        inputs: name of the file of mean inputs they are made with, "" where none are.
    """

    architecture: str
    variant: str
    request: Request
    steps: tuple[Step, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    mixed: bool = False
    gguf_architecture: str = field(default="")
    target: str = ""
    policy: str = ""
    notes: tuple[str, ...] = ()
    importance: Mapping[str, NDArray[np.float32]] = field(
        default_factory=dict, repr=False, compare=False
    )
    matrix: ImportanceMatrix | None = field(default=None, repr=False, compare=False)
    encoder: PartMatch | None = None
    inputs: InputsFile | None = field(default=None, repr=False, compare=False)
    bias_fixes: tuple[BiasFix, ...] = field(default=(), repr=False, compare=False)
    bias_inputs: str = ""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Every output tensor, in file order."""
        return tuple(one.spec for step in self.steps for one in step.packed)

    @property
    def nbytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(step.nbytes for step in self.steps)

    @property
    def read_nbytes(self) -> int:
        """Bytes read from the source, all passes."""
        return sum(step.source_nbytes * step.passes for step in self.steps)

    def part_steps(self, part: str) -> tuple[Step, ...]:
        """Steps of one part."""
        return tuple(step for step in self.steps if step.part == part)

    def bits_per_weight(self, part: str = "denoiser") -> float:
        """Stored bits per weight of one part (of all where it is not written), scales included."""
        steps = self.part_steps(part) or self.steps
        weights = sum(step.parameters for step in steps)
        return sum(step.nbytes for step in steps) * 8 / weights if weights else 0.0


def make_plan(
    logical: LogicalSource,
    match: Match,
    request: Request,
    *,
    matrix: ImportanceMatrix | None = None,
    inputs: InputsFile | None = None,
) -> Plan:
    """Plan an output from specs alone; `matrix` and `inputs` say what errors cost, where known.

    `inputs` gives the means that bias correction needs.

    Raises:
        UsageError: parts that are not there, or that the container cannot hold.
        MappingError: keys and rules do not fit.
        PolicyError, UnsupportedDtype: a weight that cannot be read or packed as asked, or that no
            program named by the request would read.
        ImportanceRequired, UnsupportedShape: the matrix, or its absence, does not fit the formats.
    """
    architecture = architecture_named(match.architecture)
    wanted = _choose_parts(match, request)
    encoder = _encoder(wanted, request)
    if encoder is not None:
        architecture = PARTS[encoder.kind]
    target, steps, moved = _for_target(logical, architecture, wanted, request)
    dropped = [(key, "another part; not asked for") for key in _unwanted(match, wanted)]
    dropped += _without_target(wanted, steps)
    for key, reason in match.leftovers:
        if request.container == "gguf" and _is_marker(architecture, logical, key):
            steps.append(marker_step(logical, key))
        elif request.container != "safetensors" or request.parts or _is_ema(key):
            dropped.append((key, reason))
        elif not is_plain(logical, key):
            dropped.append((key, f"{reason}; packed, and copied with a part it belongs to only"))
        else:
            steps.append(copy_step(logical, key, reason))
    dropped += _beside(logical, steps)
    _check_unique(steps)
    searched = weighed_by_search(request)
    weighed = weigh_steps(
        steps, matrix, architecture, wanted, searched, elsewhere=bool(request.lora_rank)
    )
    rounded = round_steps(weighed.steps, request, inputs, match.architecture, weighed.values)
    corrected = Corrected(rounded.steps)
    if request.bias_correction:
        if inputs is None:
            raise UsageError("bias correction needs the mean inputs of layers: give --inputs FILE")
        corrected = correct_biases(rounded.steps, inputs)
    mixed, warnings = _judge(steps, request, alone=architecture.packs_convolutions)
    rows = [(step.part, step.key, step.stored) for step in steps]
    warnings += losses(logical, steps, request)
    warnings += recipe_warnings(request.recipe, match.architecture, rows)
    row = ENCODER_FILES[encoder.kind] if encoder is not None else None
    return Plan(
        architecture=match.architecture,
        variant=match.variant,
        request=request,
        steps=corrected.steps,
        dropped=tuple(dropped),
        warnings=(
            *logical.warnings,
            *match.warnings,
            *moved,
            *warnings,
            *weighed.warnings,
            *rounded.warnings,
        ),
        mixed=mixed,
        gguf_architecture=row.architecture
        if row
        else architecture.gguf_architecture_for(match.variant),
        target=target.name,
        policy=_policy_label(architecture, request, encoder=encoder is not None),
        notes=(
            *_given_up(architecture, steps, request, target),
            *(row.notes if row else ()),
            *corrected.notes,
        ),
        importance=rounded.importance,
        matrix=matrix,
        encoder=encoder,
        bias_fixes=corrected.fixes,
        inputs=inputs if rounded.feedback else None,
        bias_inputs=inputs.path.name if inputs is not None and corrected.fixes else "",
    )


def _for_target(
    logical: LogicalSource,
    architecture: Architecture,
    parts: Sequence[PartMatch],
    request: Request,
) -> tuple[Target, list[Step], tuple[str, ...]]:
    """Steps for the first target that reads them all, and a warning where it is not the first."""
    dialect_of(request)  # a type that the container cannot hold is refused before any target
    refused: list[str] = []
    for target in _targets(parts, request):
        steps: list[Step] = []
        for part in parts:
            steps += part_steps(logical, architecture, part, request, target, len(parts))
        problems = target.problems(request.container, stored_tensors(architecture, steps))
        if not problems:
            moved = [f"written for {target.name}, since {why}" for why in refused[:1]]
            return target, steps, tuple(moved)
        refused.append(f"{target.name} cannot read {'; '.join(problems)}")
    others = [
        name for name, row in TARGETS.items()
        if request.target and request.container in row.reads
        and not row.problems(request.container, stored_tensors(architecture, steps))
    ]  # fmt: skip
    instead = f"; --target {' or '.join(others)} reads it" if others else ""
    raise PolicyError(refused[0] + instead)


def _encoder(parts: Sequence[PartMatch], request: Request) -> PartMatch | None:
    """The text encoder that a GGUF output holds, if it does."""
    alone = request.container == "gguf" and parts[0].kind in ENCODER_FILES
    return parts[0] if alone else None


def _targets(parts: Sequence[PartMatch], request: Request) -> tuple[Target, ...]:
    """Targets to try; a text encoder in GGUF has readers of its own.

    Raises:
        PolicyError: the named target does not read such a file.
    """
    encoder = _encoder(parts, request)
    if encoder is None:
        own = not parts[0].architecture and PARTS[parts[0].kind].packs_convolutions
        last = (TARGETS["diffquant"],) if own and request.container == "safetensors" else ()
        found = candidates(request.target, request.container)
        return found if request.target else (*found, *last)
    row = ENCODER_FILES[encoder.kind]
    if not request.target:
        return tuple(TARGETS[name] for name in row.targets)
    found = candidates(request.target, request.container)
    if request.target not in row.targets:
        why = row.unread.get(request.target, "it does not read such a file")
        raise PolicyError(
            f"target {request.target}: {why}; targets that read {encoder.name}: "
            f"{', '.join(row.targets)}"
        )
    return found


def _policy_label(architecture: Architecture, request: Request, *, encoder: bool) -> str:
    """Whose choice the formats are: the peers' mix, one format throughout, or ours."""
    kind = request.type
    if kind is None or FORMATS[kind.base].is_cast:
        return ""
    if request.recipe is not None and not request.allocated:
        return "recipe"
    if request.allocated:
        label = "allocated"
        if request.recipe is not None and request.recipe.reasons:
            label += f", freed: {len(request.recipe.reasons)}"
    elif request.policy == "tuned" and architecture.is_tuned:
        label = "tuned"
    elif request.pure and (kind.mix or kind.edge):
        label = "pure"
    elif encoder:
        label = "encoder"
    else:
        label = "published" if kind.published else "uniform"
    return f"{label}, user rules: {len(request.rules)}" if request.rules else label


def _given_up(
    architecture: Architecture, steps: Sequence[Step], request: Request, target: Target
) -> tuple[str, ...]:
    """What the target gives up against one that restores shapes, and what tuned does not do."""
    notes = []
    if request.container == "gguf" and architecture.gguf_note:
        notes.append(architecture.gguf_note)
    if request.policy == "tuned" and not architecture.is_tuned:
        notes.append(f"no tuned rules for {architecture.slug}: the published policy is used")
    kind = request.type
    if kind is None or request.container != "gguf" or FORMATS[kind.base].is_cast:
        return tuple(notes)
    if not architecture.reshapes or target.reshapes:
        return tuple(notes)
    fits = [step for step in steps if step.part == "denoiser" and flat_shape(step.assignment.shape)]
    convs = [one for one in fits if one.decision.reason.startswith(CONVOLUTION)]
    rows = [one for one in fits if one.decision.wanted and len(one.assignment.shape) == 2]
    lost = []
    if rows:
        lengths = sorted({step.assignment.shape[-1] for step in rows})
        kinds = sorted({step.stored for step in rows})
        listed = shorten(map(str, lengths))
        lost.append(f"{len(rows)} weights with rows of {listed} are {'/'.join(kinds)}")
    if convs:
        lost.append(f"{len(convs)} convolutions stay f16")
    if lost:
        notes.append(
            f"{target.name}: {' and '.join(lost)}; --target comfyui-gguf packs them as "
            f"{kind.name}, in a shape that only ComfyUI-GGUF undoes"
        )
    return tuple(notes)


def _is_marker(architecture: Architecture, logical: LogicalSource, key: str) -> bool:
    """Whether loaders tell a variant by this tensor, under a name that needs no prefix."""
    named = any(key in variant.keys for variant in architecture.variants)
    return named and not architecture.gguf_prefix and logical.tensors[key].is_float


def _is_ema(key: str) -> bool:
    return key.startswith("model_ema.")


def _choose_parts(match: Match, request: Request) -> tuple[PartMatch, ...]:
    have = {part.name: part for part in match.parts}
    gguf = request.container == "gguf"
    missing = [name for name in request.parts if name not in have and not (gguf and name == MMPROJ)]
    if missing:
        raise UsageError(
            f"no part {shorten(missing)} in this {match.architecture} source (it has: "
            f"{', '.join(have)})"
        )
    if gguf:
        return (gguf_part(match, request.parts),)
    return tuple(part for part in match.parts if not request.parts or part.name in request.parts)


def _unwanted(match: Match, wanted: Sequence[PartMatch]) -> list[str]:
    written = {part.prefix + key for part in wanted for key in part.shapes}
    keys = [part.prefix + key for part in match.parts for key in part.shapes]
    return [key for key in keys if key not in written]


def _without_target(parts: Sequence[PartMatch], steps: Sequence[Step]) -> list[tuple[str, str]]:
    """Keys of written parts that the output's layout has no name for (rules.Drop)."""
    used = {piece.key for step in steps for piece in step.assignment.pieces}
    keys = [part.prefix + key for part in parts for key in part.shapes]
    return [(key, "no counterpart in the output's layout") for key in keys if key not in used]


def _beside(logical: LogicalSource, steps: Sequence[Step]) -> list[tuple[str, str]]:
    """What stood beside packed weights and is not written, and why."""
    copied = {
        logical.tensors[step.assignment.pieces[0].key].beside.get(one.part)
        for step in steps
        if step.copies_packed
        for one in step.packed
    }
    left = (
        key
        for key in logical.consumed
        if key.endswith((".input_scale", ".scale_input")) and key not in copied
    )
    why = "scale of the layer's input: it goes with weights that are copied as they are"
    return [(key, logical.set_aside.get(key, why)) for key in left]


def _check_unique(steps: Sequence[Step]) -> None:
    seen: set[str] = set()
    for step in steps:
        for one in step.packed:
            if one.spec.key in seen:
                raise DuplicateTarget(f"two steps write {one.spec.key}", keys=(one.spec.key,))
            seen.add(one.spec.key)


def _judge(steps: Sequence[Step], request: Request, *, alone: bool) -> tuple[bool, list[str]]:
    """Warn when the label would promise more than the file holds; `alone` judges all of it."""
    if request.type is None or FORMATS[request.type.base].is_cast:
        return False, []
    whose = "denoiser's" if any(step.part == "denoiser" for step in steps) else "file's"
    if whose == "denoiser's" or (request.container != "gguf" and not alone):
        steps = [step for step in steps if step.part == "denoiser"]
    named = request.type.formats
    total = sum(step.parameters for step in steps)
    got = sum(step.parameters for step in steps if step.stored in named)
    fallbacks = [step for step in steps if step.decision.wanted]
    warnings = []
    if fallbacks:
        counts: dict[str, int] = {}
        for step in fallbacks:
            label = f"{step.decision.wanted} -> {step.stored}"
            counts[label] = counts.get(label, 0) + 1
        listed = ", ".join(f"{n} tensors {label}" for label, n in counts.items())
        warnings.append(f"rows too short or uneven for {request.type.name}: {listed}")
    mixed = total > 0 and got * 2 < total and not request.allocated  # its label says as much
    if mixed:
        warnings.append(
            f"MIXED: only {got / total:.0%} of the {whose} weights are stored as "
            f"{request.type.name}"
        )
    return mixed, warnings
