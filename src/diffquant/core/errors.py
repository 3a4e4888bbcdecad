"""The error tree. Every error a user can meet is one of these, and each carries its objects.

::

    DiffquantError
    ├── CheckpointError            the file itself (exit 1)
    │   ├── MalformedFile          bytes contradict the container's rules
    │   ├── TruncatedFile          the file ends before its header says
    │   ├── UnsafePickle           a pickle asks for code (exit 5)
    │   ├── UnsupportedContainer   not a container we read, or not one we write (exit 4)
    │   ├── RemoteError            a server that refuses, fails or changes its mind (exit 1)
    │   └── SeveralCheckpoints     a repository of many; carries their names
    ├── ArchitectureError          what the tensors are (exit 4)
    │   ├── UnknownArchitecture    carries the nearest candidates and their missing keys
    │   └── AmbiguousArchitecture
    ├── MappingError               keys against rules
    │   ├── UnmappedKeys  MissingKeys  DuplicateTarget  NotInvertible
    ├── QuantError                 number formats
    │   ├── UnsupportedShape  UnsupportedDtype  ImportanceRequired
    │   └── UnknownFormat          carries the known names (exit 4)
    ├── PolicyError                rules that contradict each other or the target
    ├── UsageError                 the request itself makes no sense (exit 2)
    ├── ResourceError              disk, RAM or VRAM, known before work starts (exit 6)
    ├── PlanMismatch               our own bug: what was written is not what was planned
    └── VerificationError          a gate failed (exit 3)

Messages say what, where, expected and found, and what to do next; lower case, no full stop.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AmbiguousArchitecture",
    "ArchitectureError",
    "CheckpointError",
    "DiffquantError",
    "DuplicateTarget",
    "ImportanceRequired",
    "MalformedFile",
    "MappingError",
    "MissingKeys",
    "NotInvertible",
    "PlanMismatch",
    "PolicyError",
    "QuantError",
    "RemoteError",
    "ResourceError",
    "SeveralCheckpoints",
    "TruncatedFile",
    "UnknownArchitecture",
    "UnknownFormat",
    "UnmappedKeys",
    "UnsafePickle",
    "UnsupportedContainer",
    "UnsupportedDtype",
    "UnsupportedShape",
    "UsageError",
    "VerificationError",
    "closest",
    "shorten",
]


class DiffquantError(Exception):
    """Root of the tree; `exit_code` is what the command line returns for it."""

    exit_code = 1


class CheckpointError(DiffquantError):
    """A file cannot be read; `path` names it."""

    def __init__(self, message: str, *, path: object = None) -> None:
        self.path = path
        super().__init__(f"{path}: {message}" if path is not None else message)


class MalformedFile(CheckpointError):
    """Bytes that contradict the container's own rules."""


class TruncatedFile(CheckpointError):
    """The file ends before the end its header promises.

    Attributes:
        cut: tensors that are not whole, in file order, where the header could be read.
        missing_nbytes: how many bytes are missing, 0 where that cannot be known.
    """

    def __init__(
        self,
        message: str,
        *,
        path: object = None,
        cut: tuple[str, ...] = (),
        missing_nbytes: int = 0,
    ) -> None:
        self.cut = cut
        self.missing_nbytes = missing_nbytes
        super().__init__(message, path=path)


class UnsafePickle(CheckpointError):
    """A pickle that names something outside the allow-list; nothing of it was called."""

    exit_code = 5

    def __init__(self, message: str, *, path: object = None, names: tuple[str, ...] = ()) -> None:
        self.names = names
        super().__init__(message, path=path)


class UnsupportedContainer(CheckpointError):
    """A file or extension we do not read, or do not write."""

    exit_code = 4


class RemoteError(CheckpointError):
    """A server refuses, fails, or changes a file while it is read; `status` is its last answer."""

    def __init__(self, message: str, *, path: object = None, status: int | None = None) -> None:
        self.status = status
        super().__init__(message, path=path)


class SeveralCheckpoints(CheckpointError):
    """A repository or folder holds several checkpoints, `names`: one has to be named."""

    def __init__(self, message: str, *, path: object = None, names: tuple[str, ...] = ()) -> None:
        self.names = names
        super().__init__(message, path=path)


class ArchitectureError(DiffquantError):
    """The tensors do not tell one architecture."""

    exit_code = 4


class UnknownArchitecture(ArchitectureError):
    """No signature matches; `candidates` are (architecture, missing keys), nearest first."""

    def __init__(
        self, message: str, *, candidates: tuple[tuple[str, tuple[str, ...]], ...] = ()
    ) -> None:
        self.candidates = candidates
        super().__init__(message)


class AmbiguousArchitecture(ArchitectureError):
    """More than one signature matches."""


class MappingError(DiffquantError):
    """Source keys and rules do not fit; `keys` are the offenders."""

    def __init__(self, message: str, *, keys: tuple[str, ...] = ()) -> None:
        self.keys = keys
        super().__init__(message)


class UnmappedKeys(MappingError):
    """Keys that no rule consumes."""


class MissingKeys(MappingError):
    """Keys that a rule needs and the source lacks."""


class DuplicateTarget(MappingError):
    """Two rules write the same key."""


class NotInvertible(MappingError):
    """A rule that cannot be run backwards was asked to."""


class QuantError(DiffquantError):
    """A number format cannot do what was asked."""


class UnsupportedShape(QuantError):
    """A shape the format's own requirements refuse."""


class UnsupportedDtype(QuantError):
    """A dtype the codec does not take."""


class ImportanceRequired(QuantError):
    """A format that can only be encoded with an importance matrix was asked to without one."""


class UnknownFormat(QuantError):
    """A format or type name that no table has; `known` are the names there are."""

    exit_code = 4

    def __init__(self, name: str, known: Iterable[str], *, what: str = "format") -> None:
        self.name = name
        self.known = tuple(known)
        near = closest(name, self.known)
        hint = f", did you mean {near!r}?" if near else ""
        super().__init__(f"unknown {what} {name!r}{hint} (known: {', '.join(self.known)})")


class PolicyError(DiffquantError):
    """Precision rules that contradict each other or the target."""


class UsageError(DiffquantError):
    """The request itself makes no sense: wrong option value, conflicting options."""

    exit_code = 2


class ResourceError(DiffquantError):
    """Not enough disk, RAM or VRAM; raised before work starts wherever it can be known."""

    exit_code = 6


class PlanMismatch(DiffquantError):
    """What happened is not what was planned: a bug of ours, worth a report."""


class VerificationError(DiffquantError):
    """A verification gate failed."""

    exit_code = 3


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most like `name`, whatever its case, or None."""
    folded = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def shorten(items: Iterable[str], limit: int = 5) -> str:
    """Join at most `limit` items and count the rest: 'a, b and 12 more'."""
    names = list(items)
    head = ", ".join(names[:limit])
    return head if len(names) <= limit else f"{head} and {len(names) - limit} more"
