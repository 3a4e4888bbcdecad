"""Steps of a plan: for each output weight its source rows, its format and reason, what is written.

Decisions are made on canonical names, which policies speak; targets are named as the output's
layout has them; a copy that the output cannot hold becomes a cast that says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from diffquant.convert.adapters import Adapter
from diffquant.convert.architectures.base import Architecture
from diffquant.convert.detect import PartMatch, to_canonical, to_layout
from diffquant.convert.dialects import Packed, own_dialect, pack
from diffquant.convert.dialects.bnb import BNB_FORMATS, skip_conflicts
from diffquant.convert.dialects.comfy import with_use
from diffquant.convert.encoders.files import ENCODER_FILES
from diffquant.convert.logical import LogicalSource, LogicalTensor
from diffquant.convert.moved import changes_for
from diffquant.convert.policies import encoder_decisions, policy_for
from diffquant.convert.recipes import annotate, recipe_rules
from diffquant.convert.request import Request
from diffquant.convert.rules import Assignment, Shape
from diffquant.convert.step import Step
from diffquant.convert.stored import is_layer, tables_of
from diffquant.convert.targets import Target
from diffquant.core.dtypes import STORAGE
from diffquant.core.errors import PolicyError, UnsupportedDtype
from diffquant.core.tensors import TensorSpec
from diffquant.quant.formats import FORMATS
from diffquant.quant.policy import Candidate, Decision, Policy, flat_shape, resolve
from diffquant.quant.types import dialect_for

__all__ = ["dialect_of", "part_steps"]

_NO_RESHAPE = "that only ComfyUI-GGUF undoes"


@dataclass(frozen=True, slots=True)
class _Output:
    """What every step of a part shares."""

    request: Request
    target: Target
    dialect: str
    tables: tuple[str, ...]
    specs: Mapping[str, TensorSpec]

    @property
    def gguf(self) -> bool:
        return self.request.container == "gguf"

    def flat(self, fmt: str, shape: Shape) -> Shape | None:
        """Rows to store `shape` in as `fmt`: () for its own, None where the reader has no way."""
        if not FORMATS[fmt].check(shape):
            return ()
        flat = flat_shape(shape) if self.target.reshapes else ()
        return flat if flat and not FORMATS[fmt].check(flat) else None

    def plain(self, key: str, shape: Shape) -> str:
        """The dtype of weights that cannot stay packed, where BF16 is not always readable."""
        if not self.gguf or (is_layer(key, shape, self.tables) and len(shape) == 2):
            return "bf16"
        return "f16" if is_layer(key, shape, self.tables) else "f32"


def dialect_of(request: Request) -> str:
    """The dialect that writes the request's type into its container."""
    if request.type is not None:
        return dialect_for(request.type, request.container)
    return "gguf" if request.container == "gguf" else "plain"


def part_steps(
    logical: LogicalSource,
    architecture: Architecture,
    part: PartMatch,
    request: Request,
    target: Target,
    parts: int,
) -> list[Step]:
    """Steps of one part: rules, then decisions on canonical names, then the dialect."""
    specs = logical.source.specs
    output = _Output(request, target, dialect_of(request), tables_of(architecture), specs)
    canonical = to_canonical(part)
    names = _canonical_names(canonical)
    folder = request.container == "folder"
    encoder = ENCODER_FILES.get(part.kind) if output.gguf else None
    layout = encoder.layout if encoder else "diffusers" if folder else "canonical"
    assignments = canonical if layout == "canonical" else to_layout(part, layout)
    prefix = _prefix(architecture, part, request, parts)
    own = layout == "canonical" or (encoder is not None and layout == "diffusers")
    keys = [a.target if own else names.get(a.pieces[0].key, a.target) for a in assignments]
    inputs = [_inputs(logical, a) for a in assignments]
    candidates = [
        Candidate(key, a.shape, _source_format(tensors))
        for key, a, tensors in zip(keys, assignments, inputs, strict=True)
    ]
    quantize = request.type is not None and (
        part.name == "denoiser"
        or request.all_parts
        or part.name in request.parts
        or not part.architecture  # a file that holds nothing else
    )
    exact, refused = recipe_rules(
        request.recipe, part.name, candidates, request.container, output.dialect
    )
    if encoder:
        decisions = encoder_decisions(encoder, request, target, candidates, exact)
    elif quantize:
        policy = policy_for(
            architecture,
            request,
            target,
            keys,
            denoiser=part.name == "denoiser",
            alone=not part.architecture,
        )
        decisions = resolve(replace(policy, exact=exact), candidates)
    else:
        kept = tuple(_cast(one, output) for one in candidates)
        asked = resolve(Policy("f32", {}, exact=exact, fallbacks=target.fallbacks), candidates)
        decisions = tuple(
            new if one.key in exact else old
            for one, old, new in zip(candidates, kept, asked, strict=True)
        )
    decisions = annotate(decisions, candidates, refused)
    rows = [
        (part.name, key, prefix + a.target, a, decision, tensors)
        for key, a, decision, tensors in zip(keys, assignments, decisions, inputs, strict=True)
    ]
    changes = changes_for(request.changes.get(part.name, {}), canonical, assignments)
    rows = [
        (*row[:4], _changed(row[4], row[5], changes.get(row[3].target, ()), request), row[5])
        for row in rows
    ]
    steps = [
        replace(
            _step(*row, output, changed=row[3].target in changes),
            adapters=changes.get(row[3].target, ()),
        )
        for row in rows
    ]
    if not folder:
        return steps
    forced = _bnb_forced(steps)
    return [
        replace(
            _step(*row[:4], forced[step.target], row[5], replace(output, dialect="bnb")),
            adapters=step.adapters,
        )
        if step.target in forced
        else step
        for row, step in zip(rows, steps, strict=True)
    ]


def _changed(
    decision: Decision,
    tensors: Sequence[LogicalTensor],
    adapters: Sequence[Adapter],
    request: Request,
) -> Decision:
    """A weight that is changed cannot be copied: it is stored anew, as the source has it.

    Raises:
        PolicyError: that would round a packed weight again, and nobody allowed it.
    """
    if not adapters:
        return decision
    source = _source_format(tensors)
    known = source in FORMATS and FORMATS[source].encodes
    wanted = decision.format or (source if known else "bf16")
    packed = any(tensor.is_quantized for tensor in tensors)
    if packed and not FORMATS[wanted].is_cast and not request.allow_requantize:
        raise PolicyError(
            f"{tensors[0].key} is {source or tensors[0].dtype}: what is merged into it is rounded "
            f"to {wanted}, and may be lost; merge into the unquantized checkpoint, keep the LoRA "
            "beside it (generate --lora), or accept the loss with --allow-requantize"
        )
    names = ", ".join(dict.fromkeys(one.name for one in adapters))
    why = f"{decision.reason}; {names}" if decision.format else f"as it was; {names}"
    return replace(decision, format=wanted, reason=why)


def _bnb_forced(steps: Sequence[Step]) -> dict[str, Decision]:
    """Kept layers that a folder has to pack: diffusers cannot skip them without skipping others."""

    def path_of(step: Step) -> str:
        return step.target.partition("/")[2].removesuffix(".weight")

    packed = [step for step in steps if step.stored in BNB_FORMATS]
    if not packed:
        return {}
    name = packed[0].stored  # a folder has one of them: its config has room for one
    kept = {
        path_of(step): step
        for step in steps
        if step.stored not in BNB_FORMATS and len(step.assignment.shape) == 2
    }
    conflicts = skip_conflicts(kept, [path_of(step) for step in packed])
    return {
        kept[module].target: Decision(
            name,
            f"{kept[module].decision.reason}; but diffusers cannot load it unpacked beside "
            f"{other}: {name}",
        )
        for module, other in conflicts.items()
    }


def _canonical_names(canonical: Sequence[Assignment]) -> dict[str, str]:
    return {piece.key: a.target for a in canonical for piece in a.pieces}


def _prefix(architecture: Architecture, part: PartMatch, request: Request, parts: int) -> str:
    if request.container == "gguf":
        return "" if part.kind in ENCODER_FILES else architecture.gguf_prefix
    component = architecture.component(part.name, part.kind)
    if request.container == "folder":
        return f"{component.folder}/"
    if parts == 1 and part.name != "denoiser":
        return ""  # how VAEs and text encoders go about alone
    if part.layout == "canonical" and "/" not in part.prefix and (parts == 1 or part.prefix):
        return part.prefix  # a single file keeps the names it came with
    return component.prefixes[0] if parts > 1 else architecture.gguf_prefix


def _inputs(logical: LogicalSource, assignment: Assignment) -> tuple[LogicalTensor, ...]:
    found = tuple(logical.tensors[piece.key] for piece in assignment.pieces)
    for tensor in found:
        if tensor.why:
            raise UnsupportedDtype(f"{tensor.key}: {tensor.why}")
    return found


def _source_format(tensors: Sequence[LogicalTensor]) -> str:
    """FORMATS name of the source; several pieces that differ count as the first."""
    first = tensors[0]
    if not first.is_float:
        return ""
    return first.format or first.foreign or first.dtype.lower()


def _cast(one: Candidate, output: _Output) -> Decision:
    request = output.request
    if request.type is not None:
        return Decision("", "part kept as it is: only the denoiser is quantized")
    if not one.dtype:
        return Decision("", "copied")
    if output.gguf and (request.dtype or one.dtype) == "bf16":
        plain = output.plain(one.key, one.shape)
        if plain != "bf16":
            return Decision(plain, f"loaders unpack BF16 in linear layers alone: {plain}")
    if request.dtype is None:
        return Decision("", "copied")
    return Decision(request.dtype, f"cast to {request.dtype}")


def _step(
    part: str,
    key: str,
    name: str,
    assignment: Assignment,
    decision: Decision,
    tensors: tuple[LogicalTensor, ...],
    output: _Output,
    *,
    changed: bool = False,
) -> Step:
    """Turn a decision into what is written; a copy that cannot be one becomes a stated cast."""
    source = _source_format(tensors)
    quantized = any(tensor.is_quantized for tensor in tensors)
    wanted = decision.format
    if wanted and quantized and not FORMATS[wanted].is_cast and wanted != source:
        if not output.request.allow_requantize:
            raise PolicyError(
                f"{tensors[0].key} is already {source}: rounding it again to {wanted} adds to the "
                "error of the first rounding; use an unquantized source or --allow-requantize"
            )
        decision = replace(decision, reason=f"{decision.reason}; requantized from {source}")
    if wanted and wanted == source and not changed and _is_whole(assignment, tensors):
        decision = replace(decision, format="", reason=f"{decision.reason}; already {source}")
    if not decision.format and quantized:
        decision = _keep_packed(key, decision, assignment, tensors, output)
    elif not decision.format and any(tensor.reshaped for tensor in tensors):
        restored = output.plain(key, assignment.shape) if source == "bf16" else source
        why = f"{decision.reason}; own shape restored: {restored}"
        decision = replace(decision, format=restored, reason=why)
    elif not decision.format and assignment.axis:
        plain = source if source in FORMATS else "f32"
        decision = replace(decision, format=plain, reason=f"{decision.reason}; cut: {plain}")
    if output.gguf and not assignment.shape:
        why = "a scalar is written as one element: readers differ on tensors without dimensions"
        decision = replace(decision, reason=f"{decision.reason}; {why}")
    flat = decision.shape
    stored_shape = flat or assignment.shape or ((1,) if output.gguf else ())
    if not decision.format:
        packed = _copy_packed(name, stored_shape, tensors, output)
        stored = source or tensors[0].dtype.lower()
    else:
        dialect = output.dialect
        if dialect == "plain" and not FORMATS[decision.format].is_cast:
            dialect = own_dialect(decision.format)  # changed, and packed anew as the source is
        packed = pack(dialect, name, decision.format, stored_shape, source)
        stored = decision.format
    nbytes = sum(_read_nbytes(assignment, tensors))
    return Step(part, key, name, assignment, decision, stored, packed, nbytes, flat=flat)


def _is_whole(assignment: Assignment, tensors: Sequence[LogicalTensor]) -> bool:
    return (
        len(tensors) == 1
        and not assignment.transpose
        and not assignment.axis
        and assignment.shape == tensors[0].shape
        and (assignment.pieces[0].start, assignment.pieces[0].stop)
        == (0, tensors[0].shape[0] if tensors[0].shape else 1)
    )


def _keep_packed(
    key: str,
    decision: Decision,
    assignment: Assignment,
    tensors: tuple[LogicalTensor, ...],
    output: _Output,
) -> Decision:
    """An already quantized weight can be copied only whole, into a container that holds it."""
    source, container = tensors[0].format, output.request.container
    block = bool(source) and STORAGE[FORMATS[source].parts[0].dtype].is_block
    fits = bool(source) and block == output.gguf and not (output.gguf and source.startswith("fp8"))
    if container == "folder" and own_dialect(source) == "comfy":
        fits = False  # diffusers ignores scales it does not know: the weights would be wrong
    flat = output.flat(source, assignment.shape) if fits else None
    if flat is not None and _is_whole(assignment, tensors):
        return replace(decision, shape=flat)
    why = f"not storable in {container}"
    if fits:
        why = "split or fused" if flat is not None else f"needs a reshape {_NO_RESHAPE}"
    plain = output.plain(key, assignment.shape)
    reason = f"{decision.reason}; {source or tensors[0].foreign or tensors[0].dtype} {why}: {plain}"
    return Decision(plain, reason)


def _copy_packed(
    name: str, shape: Shape, tensors: tuple[LogicalTensor, ...], output: _Output
) -> tuple[Packed, ...]:
    first = tensors[0]
    if first.is_quantized:  # companions change names with the container's dialect, not their bytes
        packed = pack(
            own_dialect(first.format), name, first.format, shape, first.decodes_to or "bf16"
        )
        if own_dialect(first.format) == "comfy":
            beside = first.beside.get("input_scale")
            packed = with_use(packed, output.specs[beside].shape if beside else None, first.notes)
        return tuple(_as_stored(one, first, output.specs) for one in packed)
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise PolicyError(
            f"{name}: its pieces are stored as {', '.join(sorted(dtypes))}; give --dtype"
        )
    if output.gguf and first.dtype == "F64":
        raise PolicyError(f"{name}: F64 in GGUF; give --tensor-type")
    return (Packed(TensorSpec(name, first.dtype, shape), "weight"),)


def _as_stored(
    one: Packed, tensor: LogicalTensor, source_specs: Mapping[str, TensorSpec]
) -> Packed:
    """Give a scale the shape it has in the source: some files keep one per row, some one in all."""
    if one.part != "scale":
        return one
    shape = source_specs[tensor.parts["scale"]].shape
    return Packed(TensorSpec(one.spec.key, one.spec.dtype, shape), one.part)


def _read_nbytes(assignment: Assignment, tensors: Sequence[LogicalTensor]) -> list[int]:
    sizes = []
    for piece, tensor in zip(assignment.pieces, tensors, strict=True):
        rows = tensor.shape[0] if tensor.shape else 1
        size = 1
        for length in tensor.shape:
            size *= length
        stored = tensor.reshaped or tensor.shape
        per = FORMATS[tensor.format].nbytes(stored) if tensor.format else size * 2
        sizes.append(per * (piece.stop - piece.start) // max(rows, 1))
    return sizes
