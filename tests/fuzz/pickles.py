"""Seeded damage to pickles: opcodes exchanged, and attacks put in.

Every attack that could run something creates the canary file if it does.
"""

from __future__ import annotations

import pickletools
import random
import struct
from pathlib import Path

_GLOBALS = (
    "os system", "posix system", "nt system", "builtins eval", "builtins exec", "builtins getattr",
    "builtins __import__", "subprocess Popen", "collections OrderedDict", "torch load",
    "torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch.storage UntypedStorage",
    "numpy.core.multiarray _reconstruct", "torch Size", "torch device", "_codecs encode",
    "torch._tensor _rebuild_from_type_v2", "torch._utils _rebuild_parameter", "torch float32",
    "collections OrderedDict.__class__", "torch.hub load", "diffquant.io open_sink", "pathlib Path",
    "torch QInt8Storage", "builtins set", "copyreg _reconstructor", "functools partial", "a b\0c",
)  # fmt: skip


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _command(canary: Path) -> str:
    return f"touch {canary}"


def _touch(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


def attack(canary: Path, rng: random.Random) -> bytes:
    """One value on the stack, by some way that would run code or hurt a reader."""
    name = rng.choice(_GLOBALS)
    module, _, attribute = name.partition(" ")
    call = rng.choice((_text(_command(canary)), _text(_touch(canary))))
    found = b"c" + name.replace(" ", "\n", 1).encode() + b"\n"
    stack = _text(module) + _text(attribute) + b"\x93"
    many = rng.choice((30, 200, 5000))
    return rng.choice(
        (
            b"cos\nsystem\n" + _tuple(_text(_command(canary))) + b"R",
            b"cbuiltins\nexec\n" + _tuple(_text(_touch(canary))) + b"R",
            b"(" + call + b"iposix\nsystem\n",
            b"(cbuiltins\neval\n" + call + b"o",
            found + _tuple(call) + b"R",
            found + _tuple(call) + b"\x81",
            found + b")\x81" + b"}" + call + b"Ns" + b"b",
            found + _tuple(call) + b"}" + b"\x92",
            found + _tuple(found, b")", call) + b"R",
            stack + _tuple(call) + b"R",
            _text("os")
            + b"\x94"
            + _text("system")
            + b"\x94"
            + b"h\x00h\x01\x93"
            + _tuple(call)
            + b"R",
            b"\x82\x01",
            b"\x83\xff\xff",
            b"\x84\xff\xff\xff\x7f",
            call + b"Q",  # a persistent id that is no tuple
            _tuple(_text("storage"), found, call, _text("cpu"), b"K\x04") + b"Q",
            _tuple(
                _text("storage"),
                b"ctorch\nFloatStorage\n",
                _text("0"),
                _text("cpu"),
                b"J\xff\xff\xff\xff",
            )
            + b"Q",
            b"Pname\n",
            b"]" * many + b"a" * (many - 1),  # nested lists
            b"N" + b"\x85" * many,  # nested tuples
            b"]q\x05" + b"(h\x05h\x05e" * 1 + b"",  # a list that holds itself
            _laughs(rng.choice((10, 30, 60))),
            b"r\xff\xff\xff\x7fN",
            b"Nr\xff\xff\xff\x7f",
            b"p99999999999\nN",
            b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",  # BINUNICODE8
            b"X\xff\xff\xff\x7f",
            b"\x8b\xff\xff\xff\x7f",  # LONG4
            b"\x8b\xff\xff\xff\xff",
            b"\x8a\xff" + b"\x7f" * 255,
            b"I" + b"9" * 5000 + b"\n",
            b"F1e999\n",
            b"L" + b"9" * 6000 + b"L\n",
            b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",  # FRAME
            b"}" + call + call + b"s" + _text("\ud800") + b"Ns",
            b"}" + _text("a\0b") + b"Ns" + _text("../x") + b"Ns" + b"K\x01Ns",
            b"ctorch\nSize\n" + _tuple(_tuple(b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\x7f")) + b"R",
            b"ctorch._utils\n_rebuild_tensor_v2\n" + _tuple(call, b"K\x00", b")", b")") + b"R",
            b"ccollections\nOrderedDict\n" + _tuple(b"](K\x01K\x02e") + b"R",
            b"\x8f(" + call + b"\x90",
            b"(" + b"\x91",
            b"\x96\xff\xff\xff\xff\x00\x00\x00\x00",  # BYTEARRAY8
            b"\x97",
            b"N\x98",
        )
    )


def _laughs(levels: int) -> bytes:
    """A list of two references to a list of two references ...: 2**levels leaves to walk."""
    out = b"](K\x01K\x02eq\x10"
    for level in range(levels):
        before, after = 0x10 + level, 0x11 + level
        out += b"](" + bytes([0x68, before, 0x68, before]) + b"eq" + bytes([after])
        # the earlier list lies below on the stack: swap it away by a tuple that is popped
    return out + b"0" * 0


def mutate_pickle(raw: bytes, rng: random.Random, canary: Path) -> bytes:
    """Damage the pickle at the start of `raw`; what follows it stays."""
    try:
        opcodes = list(pickletools.genops(raw))
    except Exception:  # already damaged: pickletools raises whatever it meets
        opcodes = []
    if not opcodes:
        return raw + b"\x80\x02" + attack(canary, rng) + b"."
    ends = [position for _, _, position in opcodes[1:]]
    end = (opcodes[-1][2] or 0) + 1
    kind = rng.randrange(8)
    at = rng.choice(ends) if ends else end
    if (
        kind <= 2
    ):  # an attack on top of what was there; dropped again, so that the rest is as it was
        return raw[:at] + attack(canary, rng) + rng.choice((b"0", b"")) + raw[at:]
    if kind == 3:  # the whole pickle is an attack
        return b"\x80\x02" + attack(canary, rng) + b"." + raw[end:]
    if kind == 4:  # a state dict with an attack for a value
        body = b"}" + _text("state_dict") + attack(canary, rng) + b"s"
        return b"\x80\x02" + body + b"." + raw[end:]
    if kind == 5:  # names exchanged
        old = rng.choice(
            (
                b"torch\nFloatStorage",
                b"torch\nHalfStorage",
                b"_rebuild_tensor_v2",
                b"collections\nOrderedDict",
            )
        )
        new = rng.choice(_GLOBALS).replace(" ", "\n").encode()
        if b"\n" not in old:
            new = new.split(b"\n")[1]
        return raw.replace(old, new, rng.choice((1, -1)))
    if kind == 6:  # numbers exchanged
        spots = [p for op, _, p in opcodes if op.name in ("BININT1", "BININT2", "BININT") and p]
        if spots:
            spot = rng.choice(spots)
            return raw[:spot] + rng.choice(_NUMBERS) + raw[_after(raw, spot) :]
    victim = rng.choice(opcodes)[2] or 0
    return raw[:victim] + bytes([rng.randrange(256)]) + raw[victim + 1 :]


_NUMBERS = (
    b"K\x00", b"K\xff", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"N", b"\x88",
    b"G" + b"\x7f\xf0" + bytes(6),
    b"\x8a\x09" + b"\xff" * 8 + b"\x00", b")", b"]", b"}", b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
)  # fmt: skip


def _after(raw: bytes, spot: int) -> int:
    return spot + {ord("K"): 2, ord("M"): 3, ord("J"): 5}.get(raw[spot], 1)
