"""Where each weight of a plan is encoded: on a card or by the CPU, and why; the bytes are equal.

A card takes what costs the CPU more than the way to the card and back: the searches of block
formats. Reading, the check of every chunk (decoded again by the CPU, whoever encoded it), hashes
and writing stay with the CPU's threads.

Plans of which a card encodes something are cut into larger chunks. A chunk costs Python the same
however large it is, one thread at a time: with 16 threads and chunks of a million weights Flux.1 as
Q4_K_S took 19.8 s beside an H100 that needs 0.4 s for it, with chunks of four million 9.6 s
(docs/lab-log.md, 2026-11-27).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from diffquant.convert import cutting
from diffquant.convert.plan import Plan
from diffquant.convert.step import Step
from diffquant.quant.backends import BACKENDS, WEIGHTED_ON_CARDS
from diffquant.quant.cards import Cards, too_few
from diffquant.quant.formats import format_named

__all__ = ["AUTO_WEIGHTS", "cards_worth", "place"]

# Weights that are searched for, from which `auto` takes a card. A format's kernel is compiled once
# per machine, for half a minute: as long as 16 cores take for 12 billion weights.
AUTO_WEIGHTS = 1 << 32
# What no card is started for, since the CPU encodes it in the time of two or three copies of the
# weight; where there is a card it goes there too.
_QUICK = frozenset({"mxfp4", "nf4_dq"})
# How many times as long as for Q4_K the CPU searches, measured side by side.
_LONGER = {"iq2_xxs": 9, "iq2_xs": 18, "iq2_s": 6, "iq3_xxs": 15, "iq3_s": 9}
_CHUNKS = 4  # chunks of the CPU's size in one of a card's: staging.py takes them whole


def cards_worth(asked: str, plans: Sequence[Plan], find: Callable[[str], Cards]) -> Cards:
    """The cards that plans are encoded on: those asked for, by `auto` where that pays.

    Args:
        asked: as quant/cards.py's `cards_for` takes it.
        plans: of one run.
        find: `cards_for`.

    Raises:
        DiffquantError: as `find`.
    """
    if asked == "auto":
        searched = sum(
            math.prod(step.assignment.shape) * _LONGER.get(step.decision.format, 1)
            for plan in plans
            for step in plan.steps
            if step.decision.format
            and step.decision.format not in _QUICK
            and not _why_cpu(step, plan)
        )
        if searched < AUTO_WEIGHTS:
            return too_few(searched, AUTO_WEIGHTS)
    return find(asked)


def place(plans: Sequence[Plan], cards: Cards) -> tuple[Plan, ...]:
    """Decide for every step of the plans of a run; notes say what was decided and why.

    Args:
        plans: from make_plan; all are cut alike, for what they share is read once.
        cards: that there are.
    """
    placed = tuple(_placed(plan, cards) for plan in plans)
    if any(step.encoder == "cuda" for plan in placed for step in plan.steps):
        return tuple(map(_cut_larger, placed))
    return placed


def _placed(plan: Plan, cards: Cards) -> Plan:
    if not cards.devices:
        told = (f"encoded on the CPU: {cards.why}",) if cards.why else ()
        return replace(plan, notes=(*plan.notes, *told))
    steps, reasons = [], Counter[str]()
    for step in plan.steps:
        why = _why_cpu(step, plan) if step.decision.format else ""
        reasons.update([why] if why else [])
        on_card = bool(step.decision.format) and not why
        steps.append(replace(step, encoder="cuda") if on_card else step)
    taken = [step for step in steps if step.encoder == "cuda"]
    formats = ", ".join(sorted({step.decision.format for step in taken}))
    note = f"encoded on {cards.name}: {len(taken)} weights" + (f" ({formats})" if taken else "")
    for why, count in reasons.most_common():
        note += f"; on the CPU: {count}, {why}"
    return replace(plan, steps=tuple(steps), notes=(*plan.notes, note))


def _cut_larger(plan: Plan) -> Plan:
    chunk = _CHUNKS * cutting.CHUNK
    return replace(plan, steps=tuple(replace(step, chunk=chunk) for step in plan.steps))


def _why_cpu(step: Step, plan: Plan) -> str:
    """Why a weight is encoded by the CPU though there are cards; "" if it is not."""
    fmt = format_named(step.decision.format)
    if step.rounding != "nearest":
        return f"rounded by {step.rounding}"
    if fmt.is_cast:
        return "plain casts cost less than the way to a card"
    if (fmt.codec, "encode", "cuda") not in BACKENDS:
        return f"{fmt.name} has no encoder for cards"
    weighed = fmt.importance != "unused" and not step.flat and step.key in plan.importance
    if weighed and fmt.codec not in WEIGHTED_ON_CARDS:
        return f"{fmt.name} weighed by the importance matrix"
    return ""
