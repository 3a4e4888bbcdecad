"""allocate(): bits under a size budget, a format for each tensor that makes the summed error least.

A multiple-choice knapsack: of every item one option is taken, their bytes stay within the budget,
and the sum of their errors, which are additive, is as small as it can be made.

1. *Linear bound.* Of each item only the options on its lower convex hull matter to the linear
   relaxation. Steps down the hulls, sorted by error saved per byte, are taken until the next does
   not fit; a part of that step gives a lower bound that no choice can beat (Dyer, Zemel 1984).
2. *Rounding.* The whole steps that were taken, and any later ones that still fit, are a choice.
3. *Exact search of the gap.* At the slope of the step that did not fit, every option of an item
   costs its error plus slope times its bytes, over the cheapest of that item. An option whose cost
   is more than what is left between choice and bound is in no better choice. What remains is
   searched by dynamic programming over (bytes, error) pairs that no other pair beats on both.

The search is exact unless it is cut at `_MOST_STATES`; either way `bound` tells how much could be
left to win. Sources: E. Dyer, A. Zemel (1984), "An O(n) algorithm for the multiple-choice knapsack
linear program"; D. Pisinger (1995), "A minimal algorithm for the multiple-choice knapsack problem".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import UsageError

__all__ = ["Allocation", "Item", "Option", "allocate", "error_within", "extremes"]

_MOST_STATES = 20_000
_SLACK = 1e-12  # relative: sums of floats in another order

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Option:
    """A format that a tensor could have: its bytes in the file, and the error it is predicted."""

    format: str
    nbytes: int
    error: float


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor and the formats it could have, at least one."""

    key: str
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Allocation:
    """A choice.

    Attributes:
        chosen: index of the option taken, per item.
        nbytes: of all chosen options, at most the budget.
        error: their sum.
        bound: no choice within the budget has a smaller error than this.
        slope: error that one more byte saves at this budget, the price options are weighed at.
        exact: whether the search was not cut: then no choice is better than this.
    """

    chosen: tuple[int, ...]
    nbytes: int
    error: float
    bound: float
    slope: float
    exact: bool


@dataclass(frozen=True, slots=True)
class _Step:
    """One step along a hull: to a larger option, for less error."""

    slope: float
    item: int
    to: int
    nbytes: int
    saved: float


def extremes(items: Sequence[Item]) -> tuple[int, int]:
    """Bytes of the smallest choice, and of the smallest that has the least error."""
    least = sum(min(one.nbytes for one in item.options) for item in items)
    best = (min(item.options, key=lambda one: (one.error, one.nbytes)) for item in items)
    return least, sum(one.nbytes for one in best)


def allocate(items: Sequence[Item], budget: int) -> Allocation:
    """Choose an option for every item.

    Args:
        items: with finite errors that are not negative.
        budget: bytes that the chosen options may take together.

    Returns:
        The choice; never over the budget, and at most `error - bound` from the best there is.

    Raises:
        UsageError: the smallest options are larger than the budget.
    """
    hulls = [_hull(item.options) for item in items]
    chosen = [hull[0] for hull in hulls]
    used = sum(item.options[at].nbytes for item, at in zip(items, chosen, strict=True))
    if used > budget:
        raise UsageError(f"{budget} bytes are asked for, the smallest choice takes {used}")
    error = math.fsum(item.options[at].error for item, at in zip(items, chosen, strict=True))
    base, bound, slope = list(chosen), None, 0.0
    base_used, base_error = used, error
    for step in _steps(items, hulls):
        if used + step.nbytes <= budget and chosen[step.item] == _before(hulls, step):
            chosen[step.item] = step.to
            used += step.nbytes
            error -= step.saved
            if bound is None:
                base, base_used, base_error = list(chosen), used, error
        elif bound is None:
            slope = step.slope
            bound = error - (budget - used) * slope
    if bound is None:
        found = _summed(items, chosen)
        return Allocation(tuple(chosen), found[0], found[1], found[1], 0.0, exact=True)
    _fill(items, chosen, budget - used)
    better, exact = _search(items, (base, base_used, base_error), budget, (chosen, bound, slope))
    nbytes, error = _summed(items, better)
    return Allocation(tuple(better), nbytes, error, min(bound, error), slope, exact=exact)


def error_within(items: Sequence[Item], budgets: Sequence[int]) -> tuple[float, ...]:
    """Lower bounds of the error at each budget, infinite where nothing fits: a curve, quickly."""
    hulls = [_hull(item.options) for item in items]
    used = sum(item.options[hull[0]].nbytes for item, hull in zip(items, hulls, strict=True))
    error = math.fsum(item.options[hull[0]].error for item, hull in zip(items, hulls, strict=True))
    steps = _steps(items, hulls)
    nbytes = used + np.cumsum([0, *(step.nbytes for step in steps)])
    errors = error - np.cumsum([0.0, *(step.saved for step in steps)])
    found = np.interp(np.array(budgets, np.float64), nbytes.astype(np.float64), errors)
    return tuple(
        math.inf if budget < used else max(float(value), 0.0)
        for budget, value in zip(budgets, found, strict=True)
    )


def _hull(options: Sequence[Option]) -> tuple[int, ...]:
    """Indices of the lower convex hull, from the smallest option to the one of least error."""
    order = sorted(range(len(options)), key=lambda at: (options[at].nbytes, options[at].error, at))
    hull: list[int] = []
    for at in order:
        one = options[at]
        if hull and one.error >= options[hull[-1]].error:
            continue
        while len(hull) > 1 and _slope(options, hull[-2], hull[-1]) <= _slope(
            options, hull[-1], at
        ):
            hull.pop()
        hull.append(at)
    return tuple(hull)


def _slope(options: Sequence[Option], first: int, then: int) -> float:
    one, other = options[first], options[then]
    return (one.error - other.error) / (other.nbytes - one.nbytes)


def _steps(items: Sequence[Item], hulls: Sequence[Sequence[int]]) -> list[_Step]:
    """Steps of all hulls, the most error saved per byte first; of one item in hull order."""
    found = []
    for index, (item, hull) in enumerate(zip(items, hulls, strict=True)):
        for first, then in itertools.pairwise(hull):
            one, other = item.options[first], item.options[then]
            saved = one.error - other.error
            nbytes = other.nbytes - one.nbytes
            found.append(_Step(saved / nbytes, index, then, nbytes, saved))
    return sorted(found, key=lambda step: -step.slope)


def _before(hulls: Sequence[Sequence[int]], step: _Step) -> int:
    hull = hulls[step.item]
    return hull[hull.index(step.to) - 1]


def _fill(items: Sequence[Item], chosen: list[int], room: int) -> None:
    """Spend what is left: the single change that saves most, until none fits. In place."""
    while True:
        best: tuple[float, int, int, int] | None = None
        for index, item in enumerate(items):
            now = item.options[chosen[index]]
            for at, one in enumerate(item.options):
                saved, more = now.error - one.error, one.nbytes - now.nbytes
                if saved > 0 and more <= room and (best is None or saved > best[0]):
                    best = (saved, index, at, more)
        if best is None:
            return
        _, index, at, more = best
        chosen[index] = at
        room -= more


def _summed(items: Sequence[Item], chosen: Sequence[int]) -> tuple[int, float]:
    taken = [item.options[at] for item, at in zip(items, chosen, strict=True)]
    return sum(one.nbytes for one in taken), math.fsum(one.error for one in taken)


def _search(
    items: Sequence[Item],
    base: tuple[list[int], int, float],
    budget: int,
    known: tuple[list[int], float, float],
) -> tuple[list[int], bool]:
    """Search the gap between a known choice and the bound.

    Args:
        items: all.
        base: choice at the break, which is cheapest at the slope; its bytes and its error.
        budget: as given.
        known: the best choice so far, the bound and the slope.

    Returns:
        A choice at least as good as the known one, and whether it is the best there is.
    """
    start, used, error = base
    best, bound, slope = list(known[0]), known[1], known[2]
    best_error = _summed(items, best)[1]
    gap = best_error - bound
    if gap <= _SLACK * max(best_error, 1e-300):
        return best, True
    open_items = _left_open(items, start, slope, gap)
    states = _States(budget - used, error, slope, best_error)
    exact = True
    for index, options in open_items:
        now = items[index].options[start[index]]
        moves = [
            (at, items[index].options[at].nbytes - now.nbytes, items[index].options[at].error
             - now.error)
            for at in options
        ]  # fmt: skip
        exact &= states.widen(moves)
    picks = states.best()
    if picks is None:
        return best, exact
    improved = list(start)
    for (index, _), at in zip(open_items, picks, strict=True):
        if at >= 0:
            improved[index] = at
    nbytes, total = _summed(items, improved)
    return (improved if nbytes <= budget and total < best_error else best), exact


def _left_open(
    items: Sequence[Item], start: Sequence[int], slope: float, gap: float
) -> list[tuple[int, list[int]]]:
    """Options that a better choice could have, beside those of the start; cheapest item first."""
    found: list[tuple[float, int, list[int]]] = []
    for index, item in enumerate(items):
        now = item.options[start[index]]
        least = now.error + slope * now.nbytes
        costs = [
            (one.error + slope * one.nbytes - least, at)
            for at, one in enumerate(item.options)
            if at != start[index]
        ]
        left = [(cost, at) for cost, at in costs if cost < gap]
        if left:
            found.append((min(left)[0], index, [at for _, at in left]))
    return [(index, options) for _, index, options in sorted(found)]


class _States:
    """Pairs of (bytes, error) beyond the start that nothing beats on both, and how they came."""

    def __init__(self, room: int, error: float, slope: float, best_error: float) -> None:
        self._room, self._error, self._slope = room, error, slope
        self._best = best_error
        self._nbytes: _Ints = np.zeros(1, np.int64)
        self._errors: _Floats = np.zeros(1)
        self._trail: list[tuple[_Ints, _Ints]] = []  # per item: state before, option (-1: as it is)

    def widen(self, moves: Sequence[tuple[int, int, float]]) -> bool:
        """Let one more item change, or not; whether no state was given up for want of room."""
        count = self._nbytes.size
        nbytes = np.concatenate([self._nbytes, *(self._nbytes + more for _, more, _ in moves)])
        errors = np.concatenate([self._errors, *(self._errors + add for _, _, add in moves)])
        parents = np.tile(np.arange(count), len(moves) + 1)
        taken = np.repeat(np.array([-1, *(at for at, _, _ in moves)]), count)
        fits = nbytes <= self._room
        if fits.any():
            self._best = min(self._best, self._error + float(errors[fits].min()))
        # Whatever follows, at this slope nothing gets cheaper than the start's options.
        costs = self._error + errors + self._slope * (nbytes - self._room)
        keep = np.flatnonzero(costs <= self._best * (1 + _SLACK))
        order = keep[np.lexsort((errors[keep], nbytes[keep]))]
        least = np.minimum.accumulate(errors[order])
        fresh = np.concatenate([[True], least[1:] < least[:-1]]) if order.size else order > 0
        order = order[fresh]
        whole = int(order.size) <= _MOST_STATES
        if not whole:
            order = np.sort(order[np.argsort(costs[order], kind="stable")[:_MOST_STATES]])
        self._nbytes, self._errors = nbytes[order], errors[order]
        self._trail.append((parents[order], taken[order]))
        return whole

    def best(self) -> list[int] | None:
        """Options of the state of least error that fits, -1 for the start's; None without one."""
        fits = np.flatnonzero(self._nbytes <= self._room)
        if not fits.size:
            return None
        at = int(fits[np.argmin(self._errors[fits])])
        picks = []
        for parents, taken in reversed(self._trail):
            picks.append(int(taken[at]))
            at = int(parents[at])
        return picks[::-1]
