"""allocate(): the best choice there is, never over the budget, as brute force finds it."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from diffquant.core.errors import UsageError
from diffquant.quant.allocate import Item, Option, allocate, error_within, extremes


def random_items(rng: random.Random, count: int, most: int, *, sizes: int = 1000) -> list[Item]:
    items = []
    for index in range(count):
        options = [
            Option(f"f{at}", rng.randint(1, sizes), rng.random() ** 3)
            for at in range(rng.randint(1, most))
        ]
        items.append(Item(f"t{index}", tuple(options)))
    return items


def brute(items: list[Item], budget: int) -> float:
    best = math.inf
    for taken in itertools.product(*(item.options for item in items)):
        if sum(one.nbytes for one in taken) <= budget:
            best = min(best, math.fsum(one.error for one in taken))
    return best


def flux_shaped(rng: random.Random, count: int, bits: list[float]) -> list[Item]:
    """Few shapes, many tensors, errors that fall by four a bit: what real models look like."""
    shapes = [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 15360), (21504, 3072)]
    items = []
    for index in range(count):
        n, k = rng.choice(shapes)
        weight = math.exp(rng.gauss(0, 1.5))
        options = tuple(
            Option(f"b{b}", round(n * k * b / 8), weight * 4**-b * rng.uniform(0.8, 1.25))
            for b in bits
        )
        items.append(Item(f"t{index}", options))
    return items


@pytest.mark.parametrize("seed", range(40))
def test_small_cases_are_solved_as_brute_force_solves_them(seed):
    rng = random.Random(seed)
    items = random_items(rng, rng.randint(1, 6), 5)
    least, best = extremes(items)
    for share in (0.0, 0.1, 0.3, 0.5, 0.7, 0.95):
        budget = int(least + share * (best - least))
        found = allocate(items, budget)
        taken = [item.options[at] for item, at in zip(items, found.chosen, strict=True)]
        assert found.nbytes == sum(one.nbytes for one in taken) <= budget
        assert found.error == math.fsum(one.error for one in taken)
        assert found.error == pytest.approx(brute(items, budget), rel=1e-12)
        assert found.bound <= found.error
        assert found.exact


def test_equal_sizes_and_equal_errors_do_not_confuse_it():
    one = Item("a", (Option("x", 4, 1.0), Option("y", 4, 0.5), Option("z", 8, 0.5)))
    other = Item("b", (Option("x", 4, 0.0),))
    found = allocate([one, other], 8)
    assert (found.chosen, found.nbytes, found.error) == ((1, 0), 8, 0.5)
    assert allocate([one, other], 100).nbytes == 8


def test_a_real_size_is_within_a_thousandth_of_the_bound_and_spends_the_budget():
    rng = random.Random(5)
    bits = [2.6, 3.4, 4.25, 4.5, 5.0, 5.5, 6.0, 6.6, 8.5, 12.0, 14.0, 16.0]
    items = flux_shaped(rng, 1000, bits)
    least, best = extremes(items)
    for share in (0.05, 0.2, 0.5, 0.8):
        budget = int(least + share * (best - least))
        found = allocate(items, budget)
        assert found.nbytes <= budget
        assert found.nbytes >= 0.999 * budget
        assert found.error <= found.bound * 1.001


def test_a_larger_budget_never_costs():
    items = random_items(random.Random(3), 12, 6)
    least, best = extremes(items)
    errors = [allocate(items, budget).error for budget in range(least, best + 50, 37)]
    assert errors == sorted(errors, reverse=True)


def test_a_budget_below_the_smallest_choice_is_told():
    items = [Item("a", (Option("x", 10, 1.0), Option("y", 12, 0.0)))]
    with pytest.raises(UsageError, match="9 bytes are asked for, the smallest choice takes 10"):
        allocate(items, 9)


def test_nothing_to_choose_is_no_choice():
    assert allocate([], 0).chosen == ()
    assert extremes([]) == (0, 0)


def test_the_curve_is_a_bound_of_every_choice():
    items = random_items(random.Random(9), 8, 5)
    least, best = extremes(items)
    budgets = [least - 1, least, (least + best) // 2, best, best * 2]
    curve = error_within(items, budgets)
    assert math.isinf(curve[0])
    for budget, bound in zip(budgets[1:], curve[1:], strict=True):
        found = allocate(items, budget)
        assert bound <= found.error + 1e-12
        assert bound == pytest.approx(found.bound)
