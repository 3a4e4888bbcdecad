"""The staging folder: a release laid out as the repository will be, by hard links.

Weights are linked, not copied, where the folder is on their disk: it is made beside the largest
file. Where links are not possible they are copied, after a look at the free space, and the report
says how much. The plan is pure: names, sizes and hashes are known before a folder is made.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diffquant.core.errors import UsageError
from diffquant.io.atomic import check_disk, disk_errors
from diffquant.publish.card import render_card
from diffquant.publish.facts import sha256_of
from diffquant.publish.release import Release

__all__ = ["CARD", "StagedFile", "StagingPlan", "plan_staging", "staged"]

CARD = "README.md"
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
_MAX_LICENSE_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A file of the repository-to-be: `content` where it is made here, else `path`."""

    place: str
    nbytes: int
    sha256: str
    label: str = ""
    path: Path | None = None
    content: bytes = b""

    @property
    def blob_sha1(self) -> str:
        """The hash under which git stores it."""
        digest = hashlib.sha1(b"blob %d\0" % self.nbytes, usedforsecurity=False)
        if self.path is None:
            digest.update(self.content)
            return digest.hexdigest()
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class StagingPlan:
    """What a folder will hold, the card first."""

    card: str
    files: tuple[StagedFile, ...]

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(one.nbytes for one in self.files)


def plan_staging(release: Release) -> StagingPlan:
    """Lay a release out.

    Raises:
        UsageError: two files have one place.
    """
    link, license_file = _license(release)
    card = render_card(release, link)
    files = [_made(CARD, card.encode("utf-8", "replace"))]
    if license_file is not None:
        files.append(license_file)
    files += [
        StagedFile(
            one.place, one.facts.nbytes, one.facts.sha256, one.name.label, path=one.facts.path
        )
        for one in release.files
    ]
    files += [
        StagedFile(one.name, one.path.stat().st_size, sha256_of(one.path), path=one.path)
        for one in release.samples
    ]
    taken: set[str] = set()
    for one in files:
        if one.place.lower() in taken:
            raise UsageError(f"two files would be published as {one.place}; rename one")
        taken.add(one.place.lower())
    return StagingPlan(card, tuple(files))


@contextlib.contextmanager
def staged(plan: StagingPlan) -> Iterator[tuple[Path, int]]:
    """Lay the folder out, and remove it in the end.

    Yields:
        The folder, and how many bytes had to be copied.

    Raises:
        ResourceError: copies do not fit on the disk.
    """
    folder = _folder(plan.files)
    try:
        yield folder, sum(_put(one, folder) for one in plan.files)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _made(place: str, content: bytes) -> StagedFile:
    digest = hashlib.sha256(content).hexdigest()
    return StagedFile(place, len(content), digest, content=content)


def _license(release: Release) -> tuple[str, StagedFile | None]:
    """The license's link as the card has it, and its text where that is a file."""
    known = release.license
    if known.file is None:
        return known.link, None
    if known.file.stat().st_size > _MAX_LICENSE_NBYTES:
        raise UsageError(f"{known.file}: {known.file.stat().st_size} bytes, no license is as long")
    named = known.file.name if known.file.name.upper().startswith("LICENSE") else "LICENSE.md"
    return named, _made(named, known.file.read_bytes())


def _folder(files: Sequence[StagedFile]) -> Path:
    """Beside the largest file, so that links reach it; else where temporary files go."""
    sources = [one for one in files if one.path is not None]
    largest = max(sources, key=lambda one: one.nbytes, default=None)
    if largest is not None and largest.path is not None:
        with contextlib.suppress(OSError):  # a folder that nobody may write to: then copies
            beside = largest.path.resolve().parent
            return Path(tempfile.mkdtemp(prefix=".diffquant-publish-", dir=beside))
    return Path(tempfile.mkdtemp(prefix="diffquant-publish-"))


def _put(one: StagedFile, folder: Path) -> int:
    """Put a file in place; bytes that were copied for it."""
    target = folder.joinpath(*PurePosixPath(one.place).parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(target, one.nbytes):
        if one.path is None:
            target.write_bytes(one.content)
            return 0
        try:
            os.link(one.path.resolve(), target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            return 0
        check_disk(target, one.nbytes)
        shutil.copyfile(one.path, target)
    return one.nbytes
