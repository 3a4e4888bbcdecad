"""The journal of a conversion that can be continued: which weights are finished, with their hashes.

A line each, `<16 hex digits> <JSON>`, the digits from the sha256 of the JSON, so that every line
stands for itself: a torn or damaged one costs its own weight only, which is converted again.

::

    3f0c... {"version": "0.1.0", "source": "b3...", "type": "q4_k_s", ...}         what is written
    91ab... {"step": 7, "key": "img_in.weight", "error": "0x1.2p-4", "digests": {"img_in.weight":
            ["e3...", ...]}}                                                       finished

The bytes of a weight are on the disk before its line is: a thread waits for both and takes all
weights that finished meanwhile along, so no worker waits for the disk. Still nothing is taken on
trust: before a file is continued, its bytes are compared with these hashes (convert/reread.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffquant.convert.cutting import chunk_extents
from diffquant.convert.engine import StepResult
from diffquant.convert.plan import Plan
from diffquant.core.errors import CheckpointError
from diffquant.io.atomic import disk_errors, sync_folder

__all__ = ["Found", "Journal", "read_journal"]

_LIMIT = 1 << 28  # bytes; a journal of ours has about 70 for each 2**20 weights
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Found:
    """What a journal says.

    Attributes:
        identity: of the conversion it belongs to; None where there is no readable first line.
        results: index of a step -> its result.
        damaged: lines that cannot be read, a torn last one not counted.
        nbytes: up to the end of the last whole line; what follows is to be cut off.
    """

    identity: Mapping[str, str] | None = None
    results: Mapping[int, StepResult] = field(default_factory=dict)
    damaged: int = 0
    nbytes: int = 0


def read_journal(path: Path, plan: Plan) -> Found:
    """Read a journal; lines that do not fit the plan count as damaged.

    Raises:
        CheckpointError: it cannot be opened, or is absurdly large.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_LIMIT + 1)
    except FileNotFoundError:
        return Found()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from error
    if len(raw) > _LIMIT:
        raise CheckpointError(f"no journal of ours: over {_LIMIT} bytes; remove it", path=path)
    whole = raw[: raw.rfind(b"\n") + 1]
    first, *rows = map(_parse, whole.splitlines()) if whole else [None]
    identity = _identity(first)
    results: dict[int, StepResult] = {}
    damaged = 0
    for row in rows:
        found = _result(row, plan)
        if found is None:
            damaged += 1
        else:
            results[found[0]] = found[1]
    return Found(identity, results, damaged, len(whole))


def _line(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, separators=(",", ":"))
    return f"{_sum(text.encode())} {text}\n".encode()


def _sum(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def _parse(line: bytes) -> Any:  # noqa: ANN401 - any JSON, judged by the caller
    checksum, _, text = line.partition(b" ")
    if checksum.decode("latin-1") != _sum(text):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _identity(row: Any) -> Mapping[str, str] | None:  # noqa: ANN401
    if not isinstance(row, dict) or not all(isinstance(value, str) for value in row.values()):
        return None
    return row


def _result(row: Any, plan: Plan) -> tuple[int, StepResult] | None:  # noqa: ANN401
    """A line's weight, if it is one of the plan's and has a hash for each of its chunks."""
    if not isinstance(row, dict):
        return None
    index, error, digests = row.get("step"), row.get("error"), row.get("digests")
    weighted = row.get("weighted")
    if type(index) is not int or not 0 <= index < len(plan.steps):
        return None
    step = plan.steps[index]
    keys = {one.spec.key for one in step.packed}
    if row.get("key") != step.key or not isinstance(digests, dict) or digests.keys() != keys:
        return None
    for key, found in digests.items():
        if not isinstance(found, list) or len(found) != len(chunk_extents(step, key)):
            return None
        if not all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in found):
            return None
    try:
        value = None if error is None else float.fromhex(error)
        weighted = None if weighted is None else float.fromhex(weighted)
    except (TypeError, ValueError, OverflowError):
        return None
    hashed = {key: tuple(found) for key, found in digests.items()}
    return index, StepResult(step.key, value, hashed, weighted)


class Journal:
    """A journal being written; `add` may be called from any thread."""

    def __init__(
        self, path: Path, identity: Mapping[str, str], found: Found, sync: Callable[[], None]
    ) -> None:
        """Open it behind its last whole line, or begin it.

        Args:
            path: io.kept.journal_path of the target.
            identity: of this conversion; written when the journal is begun.
            found: from read_journal.
            sync: waits until everything written to the output is on the disk.
        """
        self._path, self._sync = path, sync
        self._rows: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0)
        with disk_errors(path, found.nbytes):
            self._file = os.fdopen(
                os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666), "wb", buffering=0
            )
            begun = found.nbytes if found.identity is not None else 0
            self._file.truncate(begun)
            self._file.seek(begun)
        if not begun:
            try:
                self._append(_line(identity))
            except BaseException:
                self._file.close()
                path.unlink()
                raise
            sync_folder(path.parent)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def add(self, index: int, result: StepResult) -> None:
        """Note a finished weight, soon.

        Raises:
            ResourceError, CheckpointError: an earlier one could not be noted.
        """
        if self._failure is not None:
            raise self._failure
        error = None if result.error is None else float(result.error).hex()
        digests = {key: list(found) for key, found in result.digests.items()}
        row = {"step": index, "key": result.key, "error": error, "digests": digests}
        if result.weighted is not None:
            row["weighted"] = float(result.weighted).hex()
        self._rows.put(_line(row))

    def _work(self) -> None:
        last = False
        while not last:
            rows = [self._rows.get()]
            with contextlib.suppress(queue.Empty):
                while rows[-1] is not None:
                    rows.append(self._rows.get_nowait())
            last = rows[-1] is None
            lines = b"".join(row for row in rows if row is not None)
            if lines and self._failure is None:
                try:
                    self._sync()
                    self._append(lines)
                except BaseException as error:  # raised by the next `add`, or by `close`
                    self._failure = error

    def _append(self, lines: bytes) -> None:
        with disk_errors(self._path, len(lines)):
            view = memoryview(lines)
            while view:
                view = view[self._file.write(view) or 0 :]
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Note what is waiting and close.

        Raises:
            ResourceError, CheckpointError: something could not be noted.
        """
        if self._file.closed:
            return
        self._rows.put(None)
        self._thread.join()
        self._file.close()
        if self._failure is not None:
            raise self._failure

    def remove(self) -> None:
        """The output is finished, or given up: nothing is left to continue."""
        with contextlib.suppress(OSError):
            self.close()
        self._path.unlink(missing_ok=True)
