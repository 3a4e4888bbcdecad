r"""Prompts with weights: what users of A1111 and ComfyUI write, read once for every text encoder.

    (fox)      weight 1.1          (fox:1.3)   weight 1.3         \( \) \[ \] \\   the character
    [snow]     weight 1 / 1.1      BREAK       the next words start a new chunk

A weight acts on the states an encoder makes of the words: `comfy` moves them away from the states
of an empty prompt by that factor, `a1111` multiplies them and then restores the mean over all
states, `plain` reads no syntax at all and cuts long prompts as diffusers does. The two also nest
differently: a weight inside brackets replaces theirs (comfy) or is multiplied with it (a1111).
CLIP reads 75 tokens at a time; longer prompts are read in chunks whose states stand side by side.
Sources: AUTOMATIC1111/stable-diffusion-webui@82a973c:modules/{prompt_parser,sd_hijack_clip,
sd_emphasis}.py; Comfy-Org/ComfyUI@a125cd84:comfy/sd1_clip.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffquant.core.errors import UsageError
from diffquant.runtime.tokenizers import Tokenizer

__all__ = ["STYLES", "Line", "Piece", "chunked", "line", "parse", "plain_text", "weigh"]

STYLES = ("comfy", "a1111", "plain")

_SYNTAX = re.compile(
    r"\\[()\[\]\\]|[()\[\]]|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[^\\()\[\]:]+|[\\:]"
)
_BREAK = re.compile(r"\bBREAK\b")
_UP = 1.1
_DEEPEST = 64  # brackets in brackets; bounds the work that a hostile prompt causes
_MOST_CHUNKS = 64
_LONG_WORD = 8  # tokens; a shorter word is never cut in two (comfy)
_COMMA_REACH = 20  # tokens; how far back a chunk ends at a comma instead (a1111)


@dataclass(frozen=True, slots=True)
class Piece:
    """Words of one weight."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Line:
    """What an encoder is given at once.

    Attributes:
        ids: tokens, those around the prompt and the padding included.
        weights: one per token; 1 for those that are no word of the prompt.
        truncated: the end that did not fit, "" if all of it did.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    truncated: str = ""


@dataclass(slots=True)
class _Open:
    """A piece whose weight is still being found; `text` None stands for BREAK."""

    text: str | None
    weight: float = 1.0
    fixed: bool = False


def parse(prompt: str, style: str = "comfy") -> tuple[tuple[Piece, ...], ...]:
    """Read a prompt: sections between BREAKs, each of pieces of one weight.

    Brackets that are never closed act to the end, closing ones that were never opened are text.

    Raises:
        UsageError: brackets nested absurdly deep, or a weight that is no finite number.
    """
    if style == "plain":
        return ((Piece(prompt),),)
    found: list[_Open] = []
    opened: list[tuple[str, int]] = []
    for token in _SYNTAX.finditer(prompt):
        text, weight = token[0], token[1]
        last = opened[-1][0] if opened else ""
        if text in ("(", "["):
            opened.append((text, len(found)))
            if len(opened) > _DEEPEST:
                raise UsageError(
                    f"brackets are nested deeper than {_DEEPEST}: write \\( for a bracket itself"
                )
        elif (text == ")" or weight is not None) and last == "(":
            _close(found[opened.pop()[1] :], weight, style)
        elif text == "]" and last == "[":
            _scale(found[opened.pop()[1] :], 1 / _UP)
        elif text.startswith("\\") and len(text) > 1:
            found.append(_Open(text[1:]))
        else:
            found.extend(_broken(text))
    while opened:
        bracket, start = opened.pop()
        _scale(found[start:], _UP if bracket == "(" else 1 / _UP)
    return tuple(_sections(found))


def _broken(text: str) -> Iterator[_Open]:
    """Cut plain words at every BREAK; white space around it goes with it."""
    parts = _BREAK.split(text)
    for index, part in enumerate(parts):
        if index:
            yield _Open(None)
            part = part.lstrip()
        if index < len(parts) - 1:
            part = part.rstrip()
        if part:
            yield _Open(part)


def _close(inside: list[_Open], weight: str | None, style: str) -> None:
    if weight is None:
        _scale(inside, _UP)
        return
    _scale(inside, float(weight))
    if style == "comfy":  # brackets further out no longer reach these words
        for one in inside:
            one.fixed = True


def _scale(inside: list[_Open], factor: float) -> None:
    for one in inside:
        if not one.fixed:
            one.weight *= factor


def _sections(found: Iterable[_Open]) -> Iterator[tuple[Piece, ...]]:
    """Join neighbours of one weight, and part at BREAK."""
    pieces: list[Piece] = []
    for one in found:
        if not math.isfinite(one.weight):
            raise UsageError(f"the weight of {one.text!r} is no finite number")
        if one.text is None:
            yield tuple(pieces)
            pieces = []
        elif pieces and pieces[-1].weight == one.weight:
            pieces[-1] = Piece(pieces[-1].text + one.text, one.weight)
        else:
            pieces.append(Piece(one.text, one.weight))
    yield tuple(pieces)


def plain_text(prompt: str, style: str = "comfy") -> str:
    """The words of a prompt without its syntax, for encoders whose states are not weighted."""
    sections = parse(prompt, style)
    return " ".join("".join(piece.text for piece in section) for section in sections)


def line(tokenizer: Tokenizer, prompt: str, style: str, length: int | None = None) -> Line:
    """A prompt in one piece, cut at the end: for T5, whose lines are as long as one likes."""
    length = length or tokenizer.length
    words = [word for section in parse(prompt, style) for word in _words(tokenizer, section, "")]
    tokens = [(one, word.weights[0]) for word in words for one in word.ids]
    room = length - len(tokenizer.prefix) - len(tokenizer.suffix)
    return _line(tokenizer, tokens[:room], length, _text(tokenizer, tokens[room:]))


def chunked(tokenizer: Tokenizer, prompt: str, style: str) -> tuple[Line, ...]:
    """A prompt in as many lines of CLIP's length as it takes; one that is cut if `plain`.

    Raises:
        UsageError: more than 64 chunks.
    """
    if style == "plain":
        return (line(tokenizer, prompt, style),)
    room = tokenizer.length - len(tokenizer.prefix) - len(tokenizer.suffix)
    fill = _by_words if style == "comfy" else _by_commas
    chunks = []
    for section in parse(prompt, style):
        chunks += fill(_words(tokenizer, section, style), room, tokenizer)
        if len(chunks) > _MOST_CHUNKS:
            raise UsageError(f"the prompt takes more than {_MOST_CHUNKS} chunks of {room} tokens")
    return tuple(_line(tokenizer, chunk, tokenizer.length) for chunk in chunks)


def _words(tokenizer: Tokenizer, section: Sequence[Piece], style: str) -> Iterator[Line]:
    """Tokens that belong together: of a word where `style` keeps words whole, else of a piece."""
    for piece in section:
        for text in piece.text.split() if style == "comfy" else (piece.text,):
            ids = tuple(tokenizer.backend.encode(text, add_special_tokens=False).ids)
            if ids:
                yield Line(ids, (piece.weight,) * len(ids))


_Chunk = list[tuple[int, float]]


def _by_words(words: Iterable[Line], room: int, _: Tokenizer) -> list[_Chunk]:
    """Fill chunks; a word that does not fit goes to the next one, unless it is very long."""
    chunks: list[_Chunk] = [[]]
    for word in words:
        tokens = list(zip(word.ids, word.weights, strict=True))
        long = len(tokens) >= min(_LONG_WORD, room)
        while len(chunks[-1]) + len(tokens) > room:
            if long:
                cut = room - len(chunks[-1])
                chunks[-1] += tokens[:cut]
                tokens = tokens[cut:]
            chunks.append([])
        chunks[-1] += tokens
    return chunks


def _by_commas(words: Iterable[Line], room: int, tokenizer: Tokenizer) -> list[_Chunk]:
    """Fill chunks; what follows a late comma goes to the next one."""
    comma = tokenizer.backend.token_to_id(",</w>")
    chunks: list[_Chunk] = [[]]
    after = 0  # tokens up to the last comma of this chunk, it included
    for word in words:
        for token in zip(word.ids, word.weights, strict=True):
            if token[0] != comma and len(chunks[-1]) == room:
                late = after and room + 1 - after <= _COMMA_REACH
                moved = chunks[-1][after:] if late else []
                chunks[-1] = chunks[-1][:after] if late else chunks[-1]
                chunks.append(moved)
                after = 0
            elif len(chunks[-1]) == room:
                chunks.append([])
                after = 0
            chunks[-1].append(token)
            if token[0] == comma:
                after = len(chunks[-1])
    return chunks


def _line(
    tokenizer: Tokenizer, tokens: Sequence[tuple[int, float]], length: int, rest: str = ""
) -> Line:
    """Put what surrounds a prompt around tokens, and pad."""
    ids = [*tokenizer.prefix, *(one for one, _ in tokens), *tokenizer.suffix]
    weights = [1.0] * len(tokenizer.prefix) + [weight for _, weight in tokens]
    weights += [1.0] * (length - len(weights))
    return Line((*ids, *[tokenizer.pad] * (length - len(ids))), tuple(weights), rest)


def _text(tokenizer: Tokenizer, tokens: Sequence[tuple[int, float]]) -> str:
    if not tokens:
        return ""
    ids = [one for one, _ in tokens]
    text: str = tokenizer.backend.decode(ids, skip_special_tokens=False)
    return text.replace("</w>", " ").strip()


def weigh(states: Tensor, weights: Tensor, empty: Tensor, style: str) -> Tensor:
    """Let weights act on the states of lines.

    Args:
        states: (n, T, width).
        weights: (n, T).
        empty: (T, width) states of an empty prompt, which `comfy` goes away from.
        style: "comfy" or "a1111".
    """
    weights = weights.to(states)[..., None]  # (n, T, 1)
    if style == "comfy":
        return torch.where(weights == 1, states, empty + (states - empty) * weights)
    found = states * weights
    before, after = states.mean(dim=(1, 2), keepdim=True), found.mean(dim=(1, 2), keepdim=True)
    # no words have a weight: exactly the states as they were
    return torch.where((weights == 1).all(dim=1, keepdim=True), states, found * (before / after))
