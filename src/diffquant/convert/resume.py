"""Conversions that survive their process: `--resume` keeps what is finished, and continues it.

Beside the target lie `.<name>.resume` (the output so far, locked while a process writes it) and
`.<name>.resume.jsonl` (convert/journal.py). A run with `--resume` that is interrupted, by Ctrl-C,
a full disk, kill -9 or a power cut, leaves both; the same request finds them, compares the bytes
of every finished weight with their hashes, converts what is missing or altered, and ends with
the same file as an uninterrupted run. Another request is refused and told what differs; `--force`
starts over. Where the same request must fail again (a weight its format cannot hold), and where no
weight was finished, nothing is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant import __version__
from diffquant.convert import cutting
from diffquant.convert.bias import whole_pairs
from diffquant.convert.engine import StepResult, run_plan
from diffquant.convert.journal import Found, Journal, read_journal
from diffquant.convert.logical import LogicalSource
from diffquant.convert.output import fingerprint
from diffquant.convert.plan import Plan
from diffquant.convert.reread import altered_tensors
from diffquant.core.errors import PlanMismatch, QuantError, UsageError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.core.tensors import TensorSource
from diffquant.io import open_resumable, open_source
from diffquant.io.atomic import FlatSink
from diffquant.io.kept import Claim, journal_path, kept_path
from diffquant.io.locations import is_remote
from diffquant.quant.cards import NO_CARDS, Cards

__all__ = [
    "Resumed",
    "identity_of",
    "left_by_another_run",
    "refuse_folder",
    "run_resumable",
    "stamps",
]

_SHOWN = 120  # characters of a value in a message
_HASHED = ("decisions", "header", "importance", "mean inputs")  # told apart, but not worth printing


@dataclass(frozen=True, slots=True)
class Resumed:
    """A finished conversion.

    Attributes:
        results: one per step.
        continued: weights taken over from an earlier process.
        warnings: what could not be taken over, and why.
    """

    results: tuple[StepResult, ...]
    continued: int
    warnings: tuple[str, ...]


def refuse_folder(out: Path) -> None:
    """A folder is several files swapped in at once.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        f"{out}: --resume continues single files (.gguf, .safetensors), not folders; run without "
        "it, or convert the parts to files"
    )


def left_by_another_run(out: Path) -> tuple[str, ...]:
    """A warning where an interrupted run with --resume left files that this run does not use."""
    kept = kept_path(out)
    if not kept.exists():
        return ()
    return (
        f"{kept} is kept from an interrupted run and was not used: --resume continues it, or "
        f"remove it and {journal_path(out).name}",
    )


def identity_of(
    plan: Plan,
    source: TensorSource,
    metadata: Mapping[str, Any],
    *,
    check: bool,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
) -> dict[str, str]:
    """Everything that the output's bytes and the report depend on, as text that can be compared.

    The source counts with name, size and time of change: its fingerprint reads samples only, and
    tensors of two sources must never meet in one file.
    """
    decisions, weighed = hashlib.sha256(), hashlib.sha256()
    for step in plan.steps:
        adapters = [one.name for one in step.adapters]
        decisions.update(f"{step.target}\0{step.assignment}\0{step.packed}\0".encode())
        decisions.update(f"{step.decision.format}\0{step.stored}\0{adapters}\n".encode())
    for key, values in sorted((importance or {}).items()):
        weighed.update(key.encode() + b"\0" + np.ascontiguousarray(values).tobytes())
    means = hashlib.sha256()
    for fix in plan.bias_fixes:
        means.update(f"{fix.weight} {fix.bias}\0".encode() + fix.mean.tobytes())
    asked = {one.name: getattr(plan.request, one.name) for one in dataclasses.fields(plan.request)}
    return {
        "version": __version__,
        "source": fingerprint(source),
        "source files": " ".join(stamps(source.path)),
        **{name: _text(getattr(value, "name", value)) for name, value in asked.items()},
        "verify": "tensors" if check else "load or none",
        "chunk": str(max((step.chunk for step in plan.steps), default=0) or cutting.CHUNK),
        "decisions": decisions.hexdigest(),
        "header": hashlib.sha256(repr(sorted(metadata.items())).encode()).hexdigest(),
        "importance": weighed.hexdigest(),
        "mean inputs": means.hexdigest(),
    }


def _text(value: object) -> str:
    text = repr(value)
    if len(text) <= _SHOWN:
        return text
    return f"{text[:_SHOWN]}... ({hashlib.sha256(text.encode()).hexdigest()[:16]})"


def stamps(path: Path) -> Iterator[str]:
    """Name, size and time of change of a file, or of every file of a folder."""
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    for one in files:
        found = one.stat()
        yield f"{one.relative_to(path.parent)}:{found.st_size}:{found.st_mtime_ns}"


def run_resumable(
    logical: LogicalSource,
    plan: Plan,
    out: Path,
    metadata: Mapping[str, Any],
    *,
    force: bool,
    workers: int,
    check: bool,
    progress: Progress = NO_PROGRESS,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    cards: Cards = NO_CARDS,
) -> Resumed:
    """Begin or continue an output, and commit it.

    Args:
        logical: the bound source.
        plan: from make_plan.
        out: a .gguf or .safetensors file.
        metadata: of its header.
        force: replace `out`, and start over where what was kept is another conversion's.
        workers: threads.
        check: measure errors, as run_plan does.
        progress: told about bytes.
        importance: as for run_plan.
        cards: as for run_plan.

    Raises:
        UsageError: what was kept belongs to another request, another process is at it, or the
            source is on a server.
        KeyboardInterrupt: interrupted; its text says what was kept.
    """
    if is_remote(logical.source.path):
        raise UsageError(
            f"{logical.source.path}: --resume needs a source on this machine, whose time of change "
            "it remembers: download it first (diffquant download)"
        )
    identity = identity_of(plan, logical.source, metadata, check=check, importance=importance)
    with Claim(out) as claim:
        found, warnings = _usable(claim, plan, identity, force=force)
        with open_resumable(claim, plan.specs, metadata, force=force) as sink:
            journal = Journal(journal_path(out), identity, found, sink.flush)
            done = dict.fromkeys(found.results)
            with _kept_or_discarded(sink, journal, done, out, len(plan.steps)):
                kept, altered = _intact(claim.path, plan, found.results, workers, progress)
                for index in kept:
                    for one in plan.steps[index].packed:
                        sink.mark_written(one.spec.key)

                def finished(index: int, result: StepResult) -> None:
                    journal.add(index, result)
                    done[index] = None

                results = run_plan(
                    logical,
                    plan,
                    sink,
                    workers=workers,
                    progress=progress,
                    check=check,
                    importance=importance,
                    kept=kept,
                    finished=finished,
                    cards=cards,
                )
                journal.close()
                sink.commit()
            journal.remove()
    return Resumed(results, len(kept), (*warnings, *altered))


def _usable(
    claim: Claim, plan: Plan, identity: Mapping[str, str], *, force: bool
) -> tuple[Found, tuple[str, ...]]:
    """What of an earlier run can be continued; nothing is changed before that is decided."""
    found = read_journal(journal_path(claim.target), plan)
    if not claim.nbytes or not found.nbytes:  # bytes without a journal, or a journal without bytes
        claim.clear()
        return Found(), ()
    differs = _differences(found.identity, identity)
    if differs and not force:
        raise UsageError(
            f"{claim.target}: an interrupted conversion is kept beside it, and is not this one "
            f"({'; '.join(differs)}): repeat its request, or pass --force to start over"
        )
    if differs:
        claim.clear()
        return Found(), (f"started over: what was kept is not this conversion ({differs[0]})",)
    if found.damaged:
        return found, (f"{found.damaged} lines of the journal were damaged: done again",)
    return found, ()


def _differences(found: Mapping[str, str] | None, ours: Mapping[str, str]) -> list[str]:
    if found is None:
        return ["the first line of its journal is damaged"]
    names = [name for name in {**ours, **found} if found.get(name) != ours.get(name)]
    plain = [
        f"{name}: kept {found.get(name, '')[:_SHOWN]}, now {ours.get(name, '')[:_SHOWN]}"
        for name in names
        if name not in _HASHED
    ]
    return plain or [f"its {name} is another" for name in names]


def _intact(
    path: Path,
    plan: Plan,
    results: Mapping[int, StepResult],
    workers: int,
    progress: Progress,
) -> tuple[dict[int, StepResult], tuple[str, ...]]:
    """The weights whose bytes are in the kept file as they were written."""
    if not results:
        return {}, ()
    nbytes = sum(plan.steps[index].nbytes for index in results)
    with open_source(path) as source:
        progress.start("check what was kept", nbytes)
        try:
            altered = altered_tensors(source, plan, results, workers, progress)
        finally:
            progress.stop()
    intact = {
        index: result for index, result in results.items() if not altered & result.digests.keys()
    }
    lost = len(results) - len(intact)
    usable = whole_pairs(plan.bias_fixes, intact)
    intact = {index: result for index, result in intact.items() if index in usable}
    return intact, (f"{lost} weights in the kept file were damaged: done again",) if lost else ()


@contextlib.contextmanager
def _kept_or_discarded(
    sink: FlatSink, journal: Journal, done: Mapping[int, None], out: Path, total: int
) -> Iterator[None]:
    """Decide on every way out what is left behind, and say so to whoever pressed Ctrl-C."""
    try:
        yield
    except (QuantError, PlanMismatch):  # the same request would end here again
        journal.remove()
        sink.discard()
        raise
    except BaseException as error:
        with contextlib.suppress(Exception):  # the first error is the one to report
            journal.close()
        if not done:
            journal.remove()
            sink.discard()
        if not isinstance(error, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt(
            f"interrupted; {len(done)} of {total} weights are kept beside {out}: the same command "
            "with --resume continues"
            if done
            else "interrupted before a weight was finished; nothing was left behind"
        ) from None
