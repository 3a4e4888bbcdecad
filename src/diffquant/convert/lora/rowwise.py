"""Which parts of an adapter are rows of its module: those are cut and put together, others shared.

    kind      parts with a row for each row of the weight        shared by all rows
    LoRA      up, magnitude                                      down, mid
    LoHa      hada_w1_a, hada_w2_a                               hada_w1_b, hada_w2_b, cores
    LoKr      lokr_w1 (or its _a): a row for each c of the       lokr_w2 of c rows
              weight's
    GLoRA     b1                                                 a1, a2, b2
    OFT       oft_blocks: a block for each b of the weight's     -
    IA3       its numbers, where outputs are scaled              its numbers, of inputs
    diff      diff, set_weight, diff_b                           -

So rows of any of these are an adapter of the same kind. Rows that a file does not have get zeros
where zero means no change. Layers of several files' modules are put together where nothing is
shared; LoRA's factors are joined in rewrite.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from diffquant.convert.lora.alphas import scalar
from diffquant.convert.lora.deltas.magnitude import is_by_columns
from diffquant.convert.lora.group import Adapter
from diffquant.core.tensors import TensorSource

__all__ = ["Run", "Unit", "cut_refusal", "row_parts"]

_MERGE = "merge it into the checkpoint instead (lora merge)"
# Kinds whose rows change nothing where their row parts are zero.
_PADDED = frozenset({"lora", "loha", "lokr", "oft", "ia3", "full", "norm"})
# Single numbers that say how rows are meant; an OFT with a limit is refused before.
_NUMBERS = frozenset({"on_input", "alpha"})
_NEVER_ZERO = frozenset({"magnitude", "set_weight", "rescale"})


class Unit(NamedTuple):
    """Where a part has its rows: the axis, and how many of the weight's each stands for."""

    axis: int
    size: int = 1


class Run(NamedTuple):
    """Rows [start, stop) of an adapter's module that are rows of another from `at` on."""

    adapter: Adapter
    start: int
    stop: int
    at: int


def row_parts(adapter: Adapter) -> dict[str, Unit]:
    """The parts of an adapter that have rows; others are shared by all rows."""
    shapes = adapter.shapes
    found = {
        role: Unit(0)
        for role in ("up", "up_bias", "diff", "diff_b", "set_weight", "w_norm", "b_norm", "rescale")
        if role in shapes
    }
    for one in "12":
        if f"hada_w{one}_a" in shapes:
            found[f"hada_w{one}_a"] = Unit(1 if f"hada_t{one}" in shapes else 0)
    if adapter.kind == "lokr":
        found["lokr_w1" if "lokr_w1" in shapes else "lokr_w1_a"] = Unit(0, _kronecker_rows(adapter))
    elif adapter.kind == "glora":
        current = shapes["glora_a1"][1] == shapes["glora_a2"][0]
        found["glora_b1" if current else "glora_b2"] = Unit(0)
    elif adapter.kind == "oft" and "oft_blocks" in shapes:
        found["oft_blocks"] = Unit(0, shapes["oft_blocks"][-1])
    elif adapter.kind == "ia3" and adapter.shape[0] is not None:
        found["ia3"] = Unit(_long(shapes["ia3"]))
    if "magnitude" in shapes and not is_by_columns(adapter):
        found["magnitude"] = Unit(_long(shapes["magnitude"]))
    return found


def _kronecker_rows(adapter: Adapter) -> int:
    """Rows of w2."""
    shapes = adapter.shapes
    if "lokr_w2" in shapes:
        return shapes["lokr_w2"][0]
    return shapes["lokr_w2_a"][1 if "lokr_t2" in shapes else 0]


def _long(shape: Sequence[int]) -> int:
    """The axis of a vector that is written with further ones."""
    return max(range(len(shape)), key=lambda axis: shape[axis], default=0)


def cut_refusal(source: TensorSource, runs: Sequence[Run], rows: int) -> str:
    """Why a module cannot be made of these rows; empty where it can. LoRA's factors aside.

    Args:
        source: the adapters' file; a single number is read at most.
        runs: what it is made of.
        rows: it has.
    """
    adapters = list({id(run.adapter): run.adapter for run in runs}.values())
    first = adapters[0]
    parts = row_parts(first)
    if why := next(filter(None, (_whole_kind(source, one) for one in adapters)), ""):
        return f"{why}; {_MERGE}"
    if len(adapters) > 1:
        alike = all(one.parts.keys() == first.parts.keys() for one in adapters)
        if not alike or any(row_parts(one) != parts for one in adapters):
            return f"layers of several kinds would have to become one; {_MERGE}"
        if shared := [role for role in first.parts if role not in {*parts, *_NUMBERS}]:
            return f"{first.label} layers cannot be joined: each has its own {shared[0]}; {_MERGE}"
    covered = sum(run.stop - run.start for run in runs)
    fixed = _NEVER_ZERO & set(first.parts)
    if covered < rows and (first.kind not in _PADDED or fixed or not parts):
        what = f"{first.label} with {min(fixed)}" if fixed else first.label
        return f"{what} says nothing of the module's other {rows - covered} rows; {_MERGE}"
    size = max((unit.size for unit in parts.values()), default=1)
    edges = (edge for run in runs for edge in (run.start, run.stop, run.at, rows))
    if odd := next((edge for edge in edges if edge % size), None):
        return f"{first.label} has blocks of {size} rows, and row {odd} is inside one; {_MERGE}"
    return ""


def _whole_kind(source: TensorSource, adapter: Adapter) -> str:
    """Why an adapter means nothing but for its whole module."""
    if adapter.kind in ("boft", "tlora", "embedding") or "oft_r" in adapter.parts:
        return f"{adapter.label} cannot be cut or joined"
    if "lokr_t1" in adapter.parts:
        return f"{adapter.label} with a core in w1 cannot be cut or joined"
    if "magnitude" in adapter.parts and is_by_columns(adapter):
        return f"{adapter.label} by columns measures all rows together and cannot be cut or joined"
    if adapter.kind == "oft" and _limit(source, adapter):
        return f"{adapter.label} with a limit (alpha) for all blocks cannot be cut or joined"
    return ""


def _limit(source: TensorSource, adapter: Adapter) -> float:
    return scalar(source, adapter.parts["alpha"]) if "alpha" in adapter.parts else 0.0
