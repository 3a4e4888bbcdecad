"""Moments: which tensors live at the same time, and the one at which they are most.

A model is walked as it runs; at each step that may be the largest, the tensors in memory are
listed. Peak memory is the largest sum. That keeps a number explained: every byte of it is a named
tensor. What allocators round up and what libraries take for themselves is not here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Buffer", "Moment", "laid_out_again", "largest_buffer", "peak"]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Buffer:
    """One tensor in memory, or several of one size.

    Attributes:
        nbytes: of all of them.
        tensors: how many there are.
    """

    label: str
    nbytes: int
    tensors: int = 1

    @property
    def each(self) -> int:
        """Bytes of a single one."""
        return self.nbytes // self.tensors


@dataclass(frozen=True, slots=True)
class Moment:
    """A step of a run and the tensors that live during it, weights aside."""

    where: str
    buffers: tuple[Buffer, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(one.nbytes for one in self.buffers)

    @property
    def derivation(self) -> str:
        """The sum in one line, largest first, in MiB; a thousandth of it and less is left out."""
        least = self.nbytes // 1000
        parts = sorted(
            (one for one in self.buffers if one.nbytes > least), key=lambda one: -one.nbytes
        )
        told = " + ".join(f"{one.label} {one.nbytes / _MIB:.1f}" for one in parts)
        return f"{self.where}: {told} MiB" if told else f"{self.where}: nothing"


def peak(moments: Iterable[Moment]) -> Moment:
    """The moment at which most is in memory, the first of equals."""
    return max(moments, key=lambda one: one.nbytes, default=Moment("nothing runs", ()))


def largest_buffer(moments: Iterable[Moment]) -> Buffer:
    """The largest single tensor of any moment."""
    found = (buffer for moment in moments for buffer in moment.buffers)
    return max(found, key=lambda one: one.each, default=Buffer("nothing", 0))


def laid_out_again(nbytes: int, *, copied: bool) -> Buffer:
    """Input and output of a convolution once more, where a library copies them.

    oneDNN does on a CPU, where it works on blocks of channels, and cuDNN on a GPU, channels last.
    """
    return Buffer("both as the library lays them out", nbytes if copied else 0, 2)
