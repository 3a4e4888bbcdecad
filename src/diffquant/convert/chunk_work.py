"""What is done to one chunk for one output: reduce, or encode or copy, pack, hash and write.

Everything touched here is thread-safe or owned by the chunk.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.dialects import Packed
from diffquant.convert.gather import raw_range, raw_rows
from diffquant.convert.logical import LogicalSource
from diffquant.convert.plan import Step
from diffquant.convert.step_state import ChunkRows, Encoded, StepState, amax_of, encoding_of
from diffquant.core.errors import QuantError
from diffquant.core.floats import float32_of
from diffquant.core.tensors import ByteArray
from diffquant.quant.backends import Statistic, backend
from diffquant.quant.formats import QuantFormat, format_named
from diffquant.quant.metrics import ErrorStats

__all__ = ["Encoder", "reduce_chunk", "statistic_of", "write_chunk"]


class Encoder(Protocol):
    """What encodes on cards: quant/staging.py's Stages, which imports torch."""

    def encode(
        self,
        weight: NDArray[np.float32],
        stats: Statistic | None,
        *,
        fmt: str,
        importance: NDArray[np.float32] | None = None,
    ) -> Any:  # noqa: ANN401 - parts
        """Encode (R, K) rows to the parts of `fmt`."""
        ...


def reduce_chunk(state: StepState, index: int, chunk: ChunkRows) -> None:
    """Take a chunk's share of the statistic that the format needs first.

    Raises:
        QuantError: values that are not finite.
    """
    fmt = format_named(state.step.decision.format)
    if not math.isfinite(chunk.amax):
        raise _not_finite(chunk.weight, state.step, fmt)
    state.partial[index] = backend(fmt.codec, "reduce")(chunk.weight, None, fmt=fmt.name)


def statistic_of(state: StepState) -> Any:  # noqa: ANN401 - what the codec's reduce returns
    """Bring the chunks' shares together, in chunk order."""
    fmt = format_named(state.step.decision.format)
    return _TOGETHER[fmt.statistic]([state.partial[i] for i in range(len(state.chunks))])


def write_chunk(
    state: StepState,
    index: int,
    chunk: ChunkRows,
    *,
    check: bool,
    hashes: bool,
    cards: Encoder | None = None,
) -> None:
    """Write every part of a chunk.

    Args:
        state: of the output's step.
        index: of the chunk.
        chunk: its rows; several outputs are written from the same.
        check: decode what was encoded and measure the error.
        hashes: take the sha256 of what is written.
        cards: encodes where the step says so.

    Raises:
        QuantError: a weight has values its format cannot hold; names the tensor.
    """
    step = state.step
    if step.decision.format:
        written = _encoded(state, index, chunk, check=check, cards=cards)
    elif step.copies_packed:
        written = _copied(state, index, chunk.logical)
    else:
        written = [(step.packed[0], raw_rows(chunk.logical.source, step, chunk.rows))]
    for one, data in written:
        key = one.spec.key
        state.output.sink.write(key, state.extents[key][index][0], data)
        if hashes:
            digest = hashlib.sha256(data.data).hexdigest()
            with state.lock:
                state.digests.setdefault(key, {})[index] = digest


def _encoded(
    state: StepState, index: int, chunk: ChunkRows, *, check: bool, cards: Encoder | None
) -> list[tuple[Packed, ByteArray]]:
    asked = encoding_of(state)
    last = chunk.encoded
    if last is None or asked is None or last.asked != asked:
        chunk.encoded = last = None  # not two at once
        last = _made(state, index, chunk, check=check, asked=asked, cards=cards)
        chunk.encoded = last
    if last.errors is not None:
        state.errors[index] = last.errors
    return [
        (one, one.data(last.parts[one.part] if one.part else None))
        for one in state.step.packed
        if index < len(state.extents[one.spec.key])
    ]


def _made(
    state: StepState,
    index: int,
    chunk: ChunkRows,
    *,
    check: bool,
    asked: Hashable,
    cards: Encoder | None,
) -> Encoded:
    """Encode a chunk, and look at what came of it."""
    step = state.step
    fmt = format_named(step.decision.format)
    weight, amax = chunk.weight, chunk.amax
    if state.shift is not None:
        weight = weight + state.shift[None, :]  # a vector is one row
        amax = amax_of(weight)
    if not fmt.is_cast and not math.isfinite(amax):
        raise _not_finite(weight, step, fmt)
    weigh: dict[str, Any] = {}
    if fmt.importance != "unused" and not step.flat:  # columns are not those of the layer
        weigh["importance"] = state.output.importance.get(step.key)
    if step.flat:
        weight = weight.reshape(-1, step.flat[1])
    if step.encoder == "cuda":
        assert cards is not None
        parts = cards.encode(weight, state.stats, fmt=fmt.name, **weigh)
    elif step.rounding == "nearest":
        parts = backend(fmt.codec, "encode")(weight, state.stats, fmt=fmt.name, **weigh)
    else:
        parts = _rounded(state, weight, fmt)
    stats = None
    if check or state.mean is not None or (fmt.limited and not amax <= fmt.safe_amax):
        decoded = backend(fmt.codec, "decode")(parts, weight.shape, fmt=fmt.name)
        _refuse_overflow(weight, decoded, step, fmt)
        if check:
            stats = ErrorStats()
            stats.add(weight, decoded)
            if state.carry is not None:
                state.costs[index] = state.carry.costs(weight, decoded)
        if state.mean is not None:
            lost = (weight - decoded).reshape(-1, state.mean.size)
            state.shifts[index] = np.einsum("rk,k->r", lost, state.mean, dtype=np.float64)
    return Encoded(asked, parts, stats)


def _rounded(state: StepState, weight: NDArray[np.float32], fmt: QuantFormat) -> Any:  # noqa: ANN401 - parts
    """Encode with searched scales, and with error feedback where the plan says so."""
    from diffquant.quant.rounding.encode import encode  # compiled only where it is asked for
    from diffquant.quant.rounding.feedback import carry_of

    step, inputs = state.step, state.output.plan.inputs
    if step.rounding == "feedback":
        assert inputs is not None
        with state.lock:  # the first chunk prepares it, the others wait
            if state.carry is None:
                state.carry = carry_of(
                    inputs.covariance(step.key),
                    rotation=format_named(step.decision.format).rotation,
                )
    known = state.output.importance.get(step.key)
    return encode(weight, state.stats, fmt=fmt.name, importance=known, carry=state.carry)


def _copied(state: StepState, index: int, logical: LogicalSource) -> list[tuple[Packed, ByteArray]]:
    """Slices of every part of a packed weight, as the source has them."""
    tensor = logical.tensors[state.step.assignment.pieces[0].key]
    found = []
    for one in state.step.packed:
        extents = state.extents[one.spec.key]
        if index >= len(extents):
            continue
        key = tensor.parts.get(one.part) or tensor.beside.get(one.part)
        if key:
            stored = logical.source.specs[key]
            if stored.dtype != one.spec.dtype and one.spec.dtype == "F32":
                whole = float32_of(logical.source.read(key), stored.dtype)
                data = one.data(whole)  # a scale of 16 bits, that loaders stop at
            else:
                data = raw_range(logical.source, key, *extents[index])
        else:
            held = tensor.constants.get(one.part)
            data = one.data(None if held is None else np.float32(held))
        found.append((one, data))
    return found


def _sums(partial: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """Sum up in the order of the chunks: the same for any number of workers."""
    return sum(total for total, _ in partial), sum(count for _, count in partial)


_TOGETHER: Mapping[str, Callable[[Any], Any]] = {"max": max, "mean": _sums}


def _not_finite(weight: NDArray[np.float32], step: Step, fmt: QuantFormat) -> QuantError:
    bad = int((~np.isfinite(weight)).sum())
    return QuantError(
        f"{step.key}: {bad} values are NaN or infinite, which {fmt.name} cannot hold; keep the "
        f"tensor with --tensor-type '{step.key}=f32'"
    )


def _refuse_overflow(
    weight: NDArray[np.float32], decoded: NDArray[np.float32], step: Step, fmt: QuantFormat
) -> None:
    """A value or a scale beyond the format's range turned into infinity or NaN."""
    if math.isfinite(amax_of(decoded)):
        return
    if np.isfinite(weight).all():
        largest = float(np.abs(weight).max())
        raise QuantError(
            f"{step.key}: values up to {largest:.3g} overflow {fmt.name}; keep the "
            f"tensor with --tensor-type '{step.key}=f32' or bf16"
        )
