"""Read a pickle's opcodes without running them: what it names, how deep and how large it is.

The opcodes are walked over an abstract stack that holds only strings and tuple depths. That is
enough to know every global a pickle asks for, also where STACK_GLOBAL takes the name from the
memo, and to refuse what would hurt the real unpickler: memo indices that make it allocate
gigabytes, tuples nested so deep that hashing them overflows the C stack, opcodes by the million.
A name that cannot be known before running is an offence in itself.

Source: CPython Lib/pickletools.py (opcode table with argument sizes and stack effects).
"""

from __future__ import annotations

import functools
import pickletools
from dataclasses import dataclass

from diffquant.core.errors import MalformedFile

__all__ = ["UNKNOWN_NAME", "Scan", "scan"]

UNKNOWN_NAME = "<a name computed while loading>"
_MAX_OPCODES = 5_000_000
_MAX_DEPTH = 100
_MAX_MEMO_GAP = 1 << 16  # the unpickler's memo is an array as long as the largest index

# What lies on the abstract stack: a string, a tuple's depth (0: anything else), or None, a mark.
_Item = str | int | None


@dataclass(frozen=True, slots=True)
class Scan:
    """One pickle: the globals it names ("module.name", sorted) and the position after its STOP."""

    names: tuple[str, ...]
    end: int


@dataclass(frozen=True, slots=True)
class _Opcode:
    name: str
    arg: int  # bytes of the argument, or one of pickletools' negative codes
    pops: int  # below the mark, where there is one
    to_mark: bool
    pushes: int
    is_text: bool


@functools.cache
def _opcodes() -> tuple[_Opcode | None, ...]:
    table: list[_Opcode | None] = [None] * 256
    for info in pickletools.opcodes:
        before = info.stack_before
        to_mark = pickletools.markobject in before
        table[ord(info.code)] = _Opcode(
            info.name,
            0 if info.arg is None else info.arg.n,
            before.index(pickletools.markobject) if to_mark else len(before),
            to_mark,
            len(info.stack_after),
            info.name in ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"),
        )
    return tuple(table)


def scan(data: bytes, names: set[str]) -> Scan:
    """Walk the pickle at the start of `data` to its STOP.

    Args:
        data: the pickle, and whatever follows it.
        names: gets every global as it is met, so that it is known of a broken pickle too.

    Raises:
        EOFError: the data ends before STOP.
        MalformedFile: no valid pickle, or one over the limits.
    """
    walker = _Walker(data, names)
    table = _opcodes()
    for count in range(_MAX_OPCODES):
        opcode = table[data[walker.position]] if walker.position < len(data) else _end()
        if opcode is None:
            raise MalformedFile(
                f"byte {data[walker.position]:#04x} at {walker.position} is no pickle opcode"
            )
        walker.position += 1
        argument = walker.take_argument(opcode)
        if opcode.name == "STOP":
            return Scan(tuple(sorted(walker.names)), walker.position)
        walker.step(opcode, argument, count)
    raise MalformedFile(f"pickle of more than {_MAX_OPCODES} opcodes")


def _end() -> _Opcode:
    raise EOFError("pickle ends before STOP")


class _Walker:
    def __init__(self, data: bytes, names: set[str]) -> None:
        self.data = data
        self.position = 0
        self.names = names
        self._stack: list[_Item] = []
        self._memo: dict[int, _Item] = {}

    def take_argument(self, opcode: _Opcode) -> bytes:
        """Return an opcode's argument without its length prefix, and step over it."""
        size = opcode.arg
        if size == pickletools.UP_TO_NEWLINE:
            begin = self.position
            for _ in range(2 if opcode.name in ("GLOBAL", "INST") else 1):
                newline = self.data.find(b"\n", self.position)
                if newline < 0:
                    raise EOFError("pickle ends inside a line")
                self.position = newline + 1
            return self.data[begin : self.position - 1]
        if size < 0:
            prefix = {
                pickletools.TAKEN_FROM_ARGUMENT1: 1,
                pickletools.TAKEN_FROM_ARGUMENT4: 4,
                pickletools.TAKEN_FROM_ARGUMENT4U: 4,
                pickletools.TAKEN_FROM_ARGUMENT8U: 8,
            }[size]
            size = int.from_bytes(self._take(prefix), "little")
        return self._take(size)

    def _take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise EOFError("pickle ends inside an argument")
        raw = self.data[self.position : end]
        self.position = end
        return raw

    def step(self, opcode: _Opcode, argument: bytes, count: int) -> None:
        """Apply one opcode to the abstract stack."""
        name, stack = opcode.name, self._stack
        if name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            index = len(self._memo) if name == "MEMOIZE" else _number(name, argument)
            if index > max(count, _MAX_MEMO_GAP):
                raise MalformedFile(f"pickle memo index {index} after {count} opcodes")
            self._memo[index] = self._top()
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            index = _number(name, argument)
            if index not in self._memo:
                raise MalformedFile(f"pickle takes memo entry {index}, which it never stored")
            stack.append(self._memo[index])
        elif name == "MARK":
            stack.append(None)
        elif name == "DUP":
            stack.append(self._top())
        elif name == "STACK_GLOBAL":
            attribute, module = self._pop(), self._pop()
            known = isinstance(attribute, str) and isinstance(module, str)
            self.names.add(f"{module}.{attribute}" if known else UNKNOWN_NAME)
            stack.append(0)
        else:
            self._step_generic(opcode, argument)

    def _step_generic(self, opcode: _Opcode, argument: bytes) -> None:
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            self.names.add(_text(argument).replace("\n", "."))
        elif name in ("EXT1", "EXT2", "EXT4"):
            self.names.add(f"<copyreg extension {int.from_bytes(argument, 'little')}>")
        items: list[_Item] = []
        if opcode.to_mark:
            while (item := self._pop_any()) is not None:
                items.append(item)
        items += [self._pop() for _ in range(opcode.pops)]
        if opcode.is_text:
            self._stack.append(_text(argument))
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"):
            depth = 1 + max((item for item in items if isinstance(item, int)), default=0)
            if depth > _MAX_DEPTH:
                raise MalformedFile(f"pickle nests tuples more than {_MAX_DEPTH} deep")
            self._stack.append(depth)
        else:
            self._stack += [0] * opcode.pushes

    def _pop_any(self) -> _Item:
        if not self._stack:
            raise MalformedFile(f"pickle takes from an empty stack before byte {self.position}")
        return self._stack.pop()

    def _pop(self) -> str | int:
        item = self._pop_any()
        if item is None:
            raise MalformedFile(f"pickle takes past a mark before byte {self.position}")
        return item

    def _top(self) -> str | int:
        item = self._pop()
        self._stack.append(item)
        return item


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _number(name: str, argument: bytes) -> int:
    if name in ("PUT", "GET"):
        if not argument.strip().isdigit() or len(argument) > 12:
            raise MalformedFile(f"pickle memo index {argument!r:.40}")
        return int(argument)
    return int.from_bytes(argument, "little")
