"""run_download(): a plan carried out; files come whole, checked, or not at all.

Before the first byte is fetched it is known that nothing is overwritten that should not be, and
that the disk is large enough.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffquant.core.errors import RemoteError, ResourceError, UsageError, shorten
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.io.quant_label import quant_label
from diffquant.io.remote_path import RemoteTree
from diffquant.publish.download_plan import DownloadPlan, PlannedFile
from diffquant.publish.fetch import Fetched, checksum_name, fetch, fits, part_path

__all__ = ["DownloadReport", "FileOutcome", "run_download"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FileOutcome:
    """What became of a file.

    Attributes:
        state: downloaded, resumed, restarted (the server cannot resume), already there; of a plan:
            new, part, there, differs.
        sent_nbytes: what came over the wire.
        checksum: sha256, git sha1, or "" where the server states none.
    """

    path: str
    target: str
    nbytes: int
    label: str
    kind: str
    state: str
    sent_nbytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class DownloadReport:
    """A download, or the plan of one."""

    source: str
    dry_run: bool
    listed_files: int
    files: tuple[FileOutcome, ...]
    nbytes: int
    sent_nbytes: int
    left_out: Mapping[str, str]
    no_models: tuple[str, ...]


def run_download(
    plan: DownloadPlan, *, dry_run: bool = False, progress: Progress = NO_PROGRESS
) -> DownloadReport:
    """Carry a plan out, or report it.

    Raises:
        UsageError: a file differs, and the request did not say to replace it.
        ResourceError: not enough disk.
        RemoteError: the server fails; what has come stays, and the message says where.
        VerificationError: a checksum is wrong.
        KeyboardInterrupt: with a message that says what is kept.
    """
    outcomes: list[FileOutcome] = []
    if dry_run:
        outcomes = [_outcome(one, one.state, 0) for one in plan.files]
    else:
        progress.start("download", plan.nbytes)
        try:
            there = _there(plan, progress)
            _check_room(plan, there)
            for one in plan.files:
                if one.target in there:
                    outcomes.append(_outcome(one, "already there", 0))
                else:
                    outcomes.append(_download(plan.tree, one, progress))
        finally:
            progress.stop()
    return DownloadReport(
        source=plan.source,
        dry_run=dry_run,
        listed_files=plan.listed_files,
        files=tuple(outcomes),
        nbytes=plan.nbytes,
        sent_nbytes=sum(one.sent_nbytes for one in outcomes),
        left_out=plan.left_out,
        no_models=plan.no_models,
    )


def _there(plan: DownloadPlan, progress: Progress) -> set[Path]:
    """The targets that exist and are what the repository has.

    Raises:
        UsageError: one exists, is something else, and may not be replaced.
    """
    there = {one.target for one in plan.files if one.state == "there" and _is_same(one, progress)}
    changed = [one for one in plan.files if one.state in ("there", "differs")]
    lost = [str(one.target) for one in changed if one.target not in there]
    if lost and not plan.force:
        raise UsageError(
            f"exist, and are not what the repository has: {shorten(lost)}; use --force to replace "
            "them"
        )
    folders = [str(one.target) for one in changed if one.target.is_dir()]
    if folders:
        raise UsageError(f"a folder has the name of a file: {shorten(folders)}")
    return there


def _is_same(one: PlannedFile, progress: Progress) -> bool:
    """Compare by checksum; without one, the size has to do, and is said to."""
    if checksum_name(one.entry):
        return fits(one.target, one.entry, progress)
    _LOG.warning("%s: kept, it has the right size; the server states no checksum", one.target)
    return True


def _check_room(plan: DownloadPlan, there: set[Path]) -> None:
    missing = [one for one in plan.files if one.target not in there]
    if not missing:
        return
    needed = sum(one.entry.nbytes - min(one.part_nbytes, one.entry.nbytes) for one in missing)
    folder = next(parent for parent in missing[0].target.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"{plan.source}: needs {needed} bytes, {free} bytes are free in {folder}: free "
            f"{needed - free} bytes or write elsewhere (--to)"
        )


def _download(tree: RemoteTree, one: PlannedFile, progress: Progress) -> FileOutcome:
    one.target.parent.mkdir(parents=True, exist_ok=True)
    part = part_path(one.target, one.entry, one.version)
    try:
        fetched = fetch(
            tree.resource(one.entry.path),
            one.entry,
            one.target,
            transport=tree.transport,
            progress=progress,
            version=one.version,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_kept(part)}") from None
    except RemoteError as error:
        raise RemoteError(f"{error}; {_kept(part)}", status=error.status) from error
    return _outcome(one, _became(fetched), fetched.sent_nbytes)


def _became(fetched: Fetched) -> str:
    if fetched.restarted:
        return "restarted"
    return "resumed" if fetched.kept_nbytes else "downloaded"


def _kept(part: Path) -> str:
    nbytes = part.stat().st_size if part.exists() else 0
    return f"{nbytes} bytes are kept in {part}, the same command goes on from there"


def _outcome(one: PlannedFile, state: str, sent_nbytes: int) -> FileOutcome:
    return FileOutcome(
        path=one.entry.path,
        target=str(one.target),
        nbytes=one.entry.nbytes,
        label=quant_label(one.entry.path),
        kind=one.kind,
        state=state,
        sent_nbytes=sent_nbytes,
        checksum=checksum_name(one.entry),
    )
