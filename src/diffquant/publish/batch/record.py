"""The journal of a batch: a small file per output, and the locks that go with it.

    OUTPUT/.diffquant-batch/lock               held by the run that is at work
    OUTPUT/.diffquant-batch/NAME.json          begun (an output that exists is a stopped run's), or
                                               done: what it was made of, its size and its hash
    OUTPUT/.diffquant-batch/NAME.lock          held by the process that writes NAME

A record appears whole or not at all. Before an output is begun its record says so: what lies under
its name afterwards is ours, and may be replaced. Nothing is taken on trust: a record that cannot be
read, or does not fit the bytes, costs its own output only, which is made again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffquant.convert.allocation_choice import Choice, choice_from
from diffquant.core.errors import CheckpointError, UsageError
from diffquant.io.atomic import disk_errors, partial_path, remove_stale, sync_folder

__all__ = ["FOLDER", "Record", "digest_of", "locked", "read_record", "record_path", "write_record"]

FOLDER = ".diffquant-batch"
_SCHEMA = 1
_LIMIT = 1 << 22  # bytes; a record has about two thousand, and a hundred per tensor chosen for
_PIECE = 1 << 20
_POLL_S = 0.1
_BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


@dataclass(frozen=True, slots=True)
class Record:
    """What is noted of one output.

    Attributes:
        identity: everything its bytes depend on, by name; {} where the record is damaged.
        done: whether it was finished; else it was begun.
        nbytes: of the file, or of all files of a folder.
        sha256: as `digest_of` tells it.
        report: what the summary shows: bits per weight, error, verdict, warnings.
        pictures: identity and verdict of a comparison by pictures; None without one.
        choice: formats that a budget was spent on; None where a type or a recipe says them.
    """

    identity: Mapping[str, str]
    done: bool = False
    nbytes: int = 0
    sha256: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Any] | None = None
    choice: Choice | None = None


def record_path(folder: Path, name: str) -> Path:
    """Where the record of an output lies.

    Args:
        folder: the batch's output folder.
        name: the output's, relative to it.
    """
    return folder / FOLDER / f"{name}.json"


def read_record(path: Path) -> Record | None:
    """Read a record; None where there is none, one without an identity where it is damaged.

    Raises:
        CheckpointError: it is there, and cannot be opened.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_LIMIT + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from error
    try:
        found = json.loads(raw) if len(raw) <= _LIMIT else None
    except (ValueError, RecursionError):
        found = None
    return _checked(found) or Record({})


def _checked(row: Any) -> Record | None:  # noqa: ANN401 - any JSON
    if not isinstance(row, dict) or row.get("schema") != _SCHEMA:
        return None
    kinds: dict[str, Any] = {
        "identity": dict,
        "done": bool,
        "nbytes": int,
        "sha256": str,
        "report": dict,
        "pictures": dict | None,
    }
    if not all(isinstance(row.get(name), kind) for name, kind in kinds.items()):
        return None
    if not all(isinstance(value, str) for value in row["identity"].values()):
        return None
    report, pictures = row["report"], row["pictures"]
    if row["done"] and (not _told(report) or not (pictures is None or _told(pictures))):
        return None
    try:
        choice = choice_from(row["choice"]) if row.get("choice") is not None else None
    except ValueError:
        return None
    return Record(**{name: row[name] for name in kinds}, choice=choice)


def _told(row: Mapping[str, Any]) -> bool:
    """Whether a verdict and its warnings are what the summary can show."""
    warnings, verdict = row.get("warnings", []), row.get("verdict")
    numbers = (row.get(name) for name in ("error", "bits_per_weight", "psnr_db"))
    return (
        (verdict is None or isinstance(verdict, str))
        and isinstance(warnings, list)
        and all(isinstance(text, str) for text in warnings)
        and all(one is None or isinstance(one, int | float) for one in numbers)
    )


def write_record(path: Path, record: Record) -> None:
    """Write a record that exists only when it is whole, and is on the disk when this returns.

    Raises:
        ResourceError: the disk is full.
        CheckpointError: it cannot be written.
    """
    body = {name: getattr(record, name) for name in record.__slots__}
    body["choice"] = record.choice.to_json() if record.choice is not None else None
    text = json.dumps({"schema": _SCHEMA, **body}, indent=1, sort_keys=True).encode()
    with disk_errors(path, len(text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        beside = partial_path(path)
        try:
            with beside.open("wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        sync_folder(path.parent)


def digest_of(path: Path) -> tuple[int, str]:
    """Size and sha256 of a file; of a folder, of its files' names, sizes and bytes in order."""
    digest = hashlib.sha256()
    if not path.is_dir():
        return _add(digest, path), digest.hexdigest()
    total = 0
    for one in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{one.relative_to(path).as_posix()}\0{one.stat().st_size}\n".encode())
        total += _add(digest, one)
    return total, digest.hexdigest()


def _add(digest: Any, path: Path) -> int:  # noqa: ANN401 - hashlib has no public type for it
    total = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            total += len(piece)
    return total


@contextlib.contextmanager
def locked(path: Path, what: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock that ends with this process, however that ends.

    Args:
        path: a file that is made for it, and stays.
        what: it stands for, in the message.
        wait_s: how long another process may take to end: a killed run's children see it at once,
            and leave when their write is done.

    Raises:
        UsageError: another process has it.
        CheckpointError: it cannot be opened or locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise CheckpointError(f"cannot be opened: {error.strerror}", path=path) from error
    try:
        until = time.monotonic() + wait_s
        while not _lock(descriptor, path):
            if time.monotonic() >= until:
                raise UsageError(f"another batch is at work on {what}: wait for it, or stop it")
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        raise CheckpointError(f"cannot be locked: {error.strerror}", path=path) from error
    return True
