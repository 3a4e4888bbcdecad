"""What an adapter file touches: parts of the model, families of layers, blocks of each stack."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from diffquant.convert.lora.base import BaseGuess
from diffquant.convert.lora.group import Adapter
from diffquant.convert.templates import template

__all__ = ["LoraBlocks", "LoraPart", "touched_blocks", "touched_parts"]

# By the words in a module's name, dots or underscores between them; the first that fits.
_FAMILIES = (
    (
        "attention_and_mlp",
        r"single_blocks[._]\d+[._]linear\d|single_transformer_blocks[._]\d+[._]proj_out",
    ),
    ("modulation", r"mod[._]lin|modulation|img_mod|txt_mod|adaln|norm\w*[._]linear"),
    ("time", r"time_emb|emb_layers|time_embed|timestep|t_embedder|guidance_in|vector_in"),
    ("feed_forward", r"mlp|[._]ff[._]|ff_net|ff_context|ffn|feed_forward|experts|fc[12]$"),
    ("attention", r"attn|attention|to_[qkv]|qkv|[qkv]_proj|out_proj|SelfAttention"),
    ("convolution", r"conv|in_layers|out_layers|skip_connection|resnets|[._]op$"),
    ("projection", r"proj|_in$|_out$|embedder|linear|out[._]\d$"),
)
_MIDDLE = re.compile(r"mid(dle)?_block(?=[._]|$)")  # a UNet's one block between the way down and up
_COMPILED = tuple((name, re.compile(pattern)) for name, pattern in _FAMILIES)


@dataclass(frozen=True, slots=True)
class LoraPart:
    """What a file does to one part of the model.

    Attributes:
        name: denoiser, text_encoder, text_encoder_2 or _3; "" where the file does not say and
            nothing tells.
        model: the text encoder it is, "" for the denoiser.
        layers: adapted modules.
        families: attention, feed_forward, modulation ... -> modules.
    """

    name: str
    model: str
    layers: int
    families: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class LoraBlocks:
    """Blocks of one stack of the denoiser: `touched` as ranges ("0-18"), of how many there are.

    `total` is None where the base is not known.
    """

    stack: str
    touched: str
    count: int
    total: int | None


def touched_parts(adapters: Sequence[Adapter], guess: BaseGuess) -> Iterator[LoraPart]:
    """The parts that adapters change, the denoiser first."""
    groups: dict[str, list[Adapter]] = {}
    for one in adapters:
        groups.setdefault(_part_name(one.part, guess), []).append(one)
    for name in sorted(groups, key=lambda one: (one != "denoiser", one)):
        members = groups[name]
        encoder = next(
            (
                encoder.title
                for part, encoder in (guess.encoders or {}).items()
                if _part_name(part, guess) == name
            ),
            "",
        )
        families = Counter(_family(one.module) for one in members)
        yield LoraPart(name, encoder, len(members), dict(families.most_common()))


def _part_name(part: str, guess: BaseGuess) -> str:
    """The part as the base counts it: what sd-scripts calls te3 is Flux's second encoder."""
    if not part:
        return "denoiser" if guess.fit is not None else "text_encoder" if guess.encoders else ""
    encoder = (guess.encoders or {}).get(part)
    t5 = encoder is not None and encoder.kind == "t5_xxl"
    third = t5 and part == "text_encoder_2" and guess.architecture in ("sd3", "hidream")
    return "text_encoder_3" if third else part


def _family(module: str) -> str:
    return next((name for name, pattern in _COMPILED if pattern.search(module)), "other")


def touched_blocks(adapters: Sequence[Adapter], guess: BaseGuess) -> Iterator[LoraBlocks]:
    """Stacks of the denoiser's blocks, by the first number in a module's name."""
    touched: dict[str, set[int]] = {}
    for one in adapters:
        if _part_name(one.part, guess) in ("denoiser", ""):
            stack, number = _stack(*template(one.module))
            if stack:
                touched.setdefault(stack, set()).add(number)
    totals = _totals(guess)
    for stack, numbers in touched.items():
        total = totals.get(stack.replace(".", "_"))
        if total != 1 or _MIDDLE.match(stack):  # a layer with a number in its name is no block
            yield LoraBlocks(stack, _ranges(sorted(numbers)), len(numbers), total)


def _stack(text: str, numbers: Sequence[int]) -> tuple[str, int]:
    """The stack and number of the block a module is in; "" for none."""
    if middle := _MIDDLE.match(text):
        return middle[0], 0
    head, mark, _ = text.partition("#")
    return (head.rstrip("._"), numbers[0]) if mark and head else ("", 0)


def _totals(guess: BaseGuess) -> dict[str, int]:
    """Stack, underscored -> how many blocks the base has."""
    if guess.fit is None:
        return {}
    base = guess.fit.base
    found: dict[str, set[int]] = {}
    for own in (True, False):
        for text in base.templates(own=own, underscored=True):
            for numbers in base.weights(text, underscored=True):
                stack, number = _stack(text, numbers)
                if stack:
                    found.setdefault(stack, set()).add(number)
    return {stack: len(numbers) for stack, numbers in found.items()}


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for one in numbers:
        if runs and one == runs[-1][1] + 1:
            runs[-1][1] = one
        else:
            runs.append([one, one])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
