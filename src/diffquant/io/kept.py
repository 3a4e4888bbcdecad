"""A partial file that outlives its process, so that another one can continue it.

`.<name>.resume` lies beside its target and is locked while a process writes it; the lock belongs to
the open file, so it ends with the process however that dies. `Claim` takes the lock and changes
nothing yet: the caller first decides whether what is there can be continued.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from diffquant.core.errors import CheckpointError, UsageError
from diffquant.io.atomic import PartialFile, check_disk, check_parent

__all__ = ["Claim", "KeptFile", "journal_path", "kept_path"]

_BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_LOCKED_BYTE = 1 << 60  # Windows locks bytes: one that no file has


def kept_path(target: Path) -> Path:
    """Where the unfinished bytes of `target` are."""
    return target.with_name(f".{target.name}.resume")


def journal_path(target: Path) -> Path:
    """Where it is noted which of them are finished."""
    return target.with_name(f".{target.name}.resume.jsonl")


class Claim:
    """The sole right to continue a target; given up on leaving the context."""

    __slots__ = ("_descriptor", "nbytes", "path", "target")

    def __init__(self, target: Path) -> None:
        """Open or create the kept file and lock it.

        Raises:
            UsageError: another process has it.
            CheckpointError: it cannot be opened or locked, or is no regular file.
        """
        check_parent(target)
        self.target, self.path = target, kept_path(target)
        self._descriptor = -1
        while self._descriptor < 0:
            self._descriptor = self._open()
        self.nbytes = os.fstat(self._descriptor).st_size

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        try:
            descriptor = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise CheckpointError(f"cannot be opened: {error.strerror}", path=self.path) from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError("not a regular file", path=self.path)
            _lock(descriptor, self.target)
            if self._is_still_there(descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner finished, and renamed or removed it, while we waited
        return -1

    def _is_still_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.lstat())
        except FileNotFoundError:
            return False

    def take(self) -> int:
        """Hand the open file over; its new owner closes it."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def clear(self) -> None:
        """Forget what an earlier process left: no bytes, no journal."""
        journal_path(self.target).unlink(missing_ok=True)
        os.truncate(self._descriptor if os.truncate in os.supports_fd else self.path, 0)
        self.nbytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor < 0:
            return
        if not self.nbytes:  # we created it, and nothing came of it
            _remove(self.path, self._descriptor)
        else:
            os.close(self._descriptor)
        self._descriptor = -1


def _lock(descriptor: int, target: Path) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            raise UsageError(
                f"{target}: another process is writing it with --resume; wait for it, or choose "
                "another output"
            ) from None
        raise CheckpointError(
            f"cannot be locked, which --resume needs ({error.strerror}): run without --resume",
            path=kept_path(target),
        ) from error


def _remove(path: Path, descriptor: int) -> None:
    """Remove a locked file; before its lock ends where the system lets an open file be removed."""
    if os.name == "nt":
        os.close(descriptor)
    path.unlink(missing_ok=True)
    if os.name != "nt":
        os.close(descriptor)


class KeptFile(PartialFile):
    """A PartialFile at a fixed place, which `abort` closes and leaves there."""

    __slots__ = ("_claim",)

    def __init__(self, target: Path, nbytes: int, *, claim: Claim) -> None:
        self._claim = claim
        super().__init__(target, nbytes)

    def _open(self) -> tuple[Path, int]:
        check_disk(self.target, max(self.nbytes - _allocated(self._claim.path), 0))
        return self._claim.path, self._claim.take()

    def _reserve(self) -> None:
        if os.fstat(self._descriptor).st_size > self.nbytes:
            os.truncate(self._path, self.nbytes)
        super()._reserve()

    def abort(self) -> None:
        """Close, and leave the bytes for another process, if a journal tells what they are."""
        if journal_path(self.target).exists():
            self._close()
        else:
            self.discard()

    def discard(self) -> None:
        """Remove the bytes, and the journal that speaks of them."""
        if self._descriptor >= 0:
            journal_path(self.target).unlink(missing_ok=True)
            _remove(self._path, self._descriptor)
            self._descriptor = -1


def _allocated(path: Path) -> int:
    found = path.stat()
    return getattr(found, "st_blocks", 0) * 512 if os.name != "nt" else found.st_size
