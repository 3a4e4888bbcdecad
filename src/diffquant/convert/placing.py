"""Where each weight of a plan is encoded: on a card or by the CPU, and why; the bytes are equal.

A card takes what costs the CPU more than the way to the card and back: the searches of block
formats. Reading, the check of every chunk (decoded again by the CPU, whoever encoded it), hashes
and writing stay with the CPU's threads.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from diffquant.convert.plan import Plan
from diffquant.convert.step import Step
from diffquant.quant.backends import BACKENDS, WEIGHTED_ON_CARDS
from diffquant.quant.cards import Cards
from diffquant.quant.formats import format_named

__all__ = ["place"]


def place(plan: Plan, cards: Cards) -> Plan:
    """Decide for every step of a plan; a note says what was decided and why.

    Args:
        plan: from make_plan.
        cards: that there are.
    """
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
