"""What an output cannot give back of its source: said in the plan, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

from diffquant.convert.carried import carried
from diffquant.convert.logical import LogicalSource
from diffquant.convert.request import Request
from diffquant.convert.step import Step
from diffquant.core.errors import shorten

__all__ = ["broken_pictures", "keeps_numbers", "losses"]

# ComfyUI multiplies such layers with inputs in 4 bits as well. Layers whose output is off by more
# than 0.21 broke pictures, by less than 0.15 did not, between the two there was grain; Qwen-Image,
# Wan 2.2 and HunyuanVideo broke, Z-Image and Krea 2 did not
# (JoaoZaokk/comfy-quant-bench@3671cd1 README.md; two models, one prompt).
_GRAIN, _BROKEN = 0.15, 0.21


def keeps_numbers(logical: LogicalSource, step: Step) -> bool:
    """Whether an output weight holds the very numbers of its source: copied, or cast to its own."""
    if not step.decision.format:
        return True
    tensors = (logical.tensors[piece.key] for piece in step.assignment.pieces)
    own = all(one.format == step.stored and not one.is_quantized for one in tensors)
    return own and not step.adapters


def broken_pictures(rows: Sequence[tuple[str, float | None]]) -> tuple[str, ...]:
    """Warn of W4A4 layers, from (format, relative error of the weight or None) of each layer.

    The weight's error stands for the output's, which only a run on real inputs tells: it is lower,
    since inputs are rounded too.
    """
    w4a4 = [error for name, error in rows if name.startswith("convrot_w4a4")]
    known = sorted(error for error in w4a4 if error is not None)
    if not w4a4:
        return ()
    advice = "asym_w4a8_int8 is as large and works where this breaks"
    if not known:
        return (f"W4A4 breaks pictures of some models, Qwen-Image among them; {advice}",)
    median = known[len(known) // 2]
    verdict = "grain" if median > _GRAIN else "no damage"
    verdict = "broken pictures" if median > _BROKEN else verdict
    return (
        f"W4A4: half of the layers' weights are off by {median:.3f} or more, inputs come on top; "
        f"from weights alone {verdict} (grain from {_GRAIN}, broken from {_BROKEN}); {advice}",
    )


def losses(logical: LogicalSource, steps: Sequence[Step], request: Request) -> list[str]:
    """Rounding that stays in decoded weights, and header keys that have no place."""
    out = []
    rounded: dict[str, int] = {}
    for step in steps:
        tensors = [logical.tensors[piece.key] for piece in step.assignment.pieces]
        for name in sorted(
            {one.format or one.foreign or one.dtype.lower() for one in tensors if one.is_quantized}
        ):
            if step.decision.format:
                rounded[name] = rounded.get(name, 0) + 1
    if rounded:
        listed = ", ".join(f"{count} from {name}" for name, count in rounded.items())
        out.append(f"weights that were quantized before keep that rounding: {listed}")
    header = carried(logical.source, request.container)
    if header.lost:
        out.append(
            f"{len(header.lost)} header keys have no place in a {request.container} output: "
            f"{shorten(header.lost, 4)}"
        )
    if header.false:
        out.append(f"header keys that other bytes make false are left out: {shorten(header.false)}")
    return out
