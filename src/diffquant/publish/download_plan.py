"""plan_download(): which files of a repository go where, before anything is written.

A plan costs the listing alone; with a ComfyUI folder, also the headers of what was chosen.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from diffquant.core.errors import DiffquantError, RemoteError, UsageError, shorten
from diffquant.inspect.subject import open_subject
from diffquant.io.hub import HubTree
from diffquant.io.remote_choice import is_model_file
from diffquant.io.remote_name import HubName, UrlName, parse_remote
from diffquant.io.remote_path import RemoteEntry, RemotePath, RemoteTree, as_path
from diffquant.io.web import UrlTree
from diffquant.publish.comfy_folders import COMFY_FOLDERS, comfy_models
from diffquant.publish.fetch import part_path
from diffquant.publish.selection import local_name, select

__all__ = ["DownloadPlan", "DownloadRequest", "PlannedFile", "plan_download"]

_SHORT_NAME = re.compile(r"[\w.-]+/[\w.-]+([/@].*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class DownloadRequest:
    """What is wanted.

    Attributes:
        source: hf://owner/repo[/path][@rev], owner/repo, or a link.
        include: patterns, of which one must fit.
        exclude: patterns, of which none may fit.
        quant: a label that names must have, "" for any.
        to: folder, None for one named as the repository (for one named file: where we are).
        comfy_root: folder of ComfyUI, whose folders the files are sorted into.
        revision: branch, tag or commit, "" for that of `source`.
        force: whether a file that differs may be replaced.
    """

    source: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    quant: str = ""
    to: Path | None = None
    comfy_root: Path | None = None
    revision: str = ""
    force: bool = False


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file to download.

    Attributes:
        entry: as it is listed.
        target: where it goes.
        kind: what inspect says it is; only asked for a ComfyUI folder.
        state: new, part (some of it is there), there (a file of that size), differs.
        part_nbytes: what is there of it.
        version: the ETag, where there is no checksum.
    """

    entry: RemoteEntry
    target: Path
    kind: str
    state: str
    part_nbytes: int
    version: str = ""


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """What will be downloaded.

    Attributes:
        listed_files: how many the repository has.
        left_out: chosen checkpoints that ComfyUI has no folder for, path -> why.
        no_models: chosen files that ComfyUI does not load.
        force: whether files that differ may be replaced.
    """

    source: str
    listed_files: int
    files: tuple[PlannedFile, ...]
    left_out: Mapping[str, str]
    no_models: tuple[str, ...]
    force: bool
    tree: RemoteTree = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(one.entry.nbytes for one in self.files)


@contextmanager
def plan_download(request: DownloadRequest) -> Iterator[DownloadPlan]:
    """Plan a download; the connection is kept while the context lasts.

    Raises:
        UsageError: no such name, nothing chosen, contradicting options, or no ComfyUI folder.
        RemoteError: the repository cannot be listed.
        MalformedFile: a name that would leave the folder.
    """
    name = _named(request)
    tree: RemoteTree = HubTree(name) if isinstance(name, HubName) else UrlTree(name)
    with tree.held():
        version = ""
        if isinstance(name, HubName):
            listing = tree.listing()
            entries = select(
                listing,
                below=name.path,
                include=request.include,
                exclude=request.exclude,
                quant=request.quant,
            )
        else:
            if request.include or request.exclude or request.quant:
                raise UsageError("--include, --exclude and --quant choose from a repository")
            entry, version = _probe(tree)
            listing, entries = {entry.path: entry}, (entry,)
        left_out: dict[str, str] = {}
        no_models: tuple[str, ...] = ()
        if request.comfy_root is not None:
            models = [entry for entry in entries if is_model_file(entry.path)]
            no_models = tuple(entry.path for entry in entries if entry not in models)
            placed = _comfy_targets(tree, models, request.comfy_root, left_out)
        else:
            placed = _plain_targets(name, entries, request.to)
        files = tuple(_planned(entry, *place, version) for entry, place in placed.items())
        _check_distinct(files)
        yield DownloadPlan(str(name), len(listing), files, left_out, no_models, request.force, tree)


def _named(request: DownloadRequest) -> HubName | UrlName:
    if request.to is not None and request.comfy_root is not None:
        raise UsageError("--to and --comfy-root both say where files go: give one")
    name = parse_remote(request.source)
    if name is None and _SHORT_NAME.fullmatch(request.source):
        name = parse_remote(f"hf://{request.source}")
    if name is None:
        raise UsageError(
            f"{request.source}: expected hf://owner/repo, owner/repo/path/file, or a link"
        )
    if not request.revision:
        return name
    if not isinstance(name, HubName) or name.revision not in ("main", request.revision):
        raise UsageError(f"--revision {request.revision}: {name} says another")
    checked = parse_remote(f"hf://{name.repo}@{request.revision}")
    assert isinstance(checked, HubName)
    return dataclasses.replace(name, revision=request.revision)


def _probe(tree: RemoteTree) -> tuple[RemoteEntry, str]:
    """Size and ETag of a file on a plain web server."""
    resource = tree.resource(tree.asked)
    with tree.transport.get(resource.url, {"Range": "bytes=0-0"}, where=resource.name) as response:
        if response.status not in (200, 206):
            raise resource.explain(response)
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        ranged = int(total) if total.isascii() and total.isdigit() else None
        nbytes = response.length if response.status == 200 else ranged
        etag = response.headers.get("ETag", "")
    if nbytes is None:
        raise RemoteError("the server does not say how large the file is", path=resource.name)
    return RemoteEntry(tree.asked, nbytes), etag


def _plain_targets(
    name: HubName | UrlName, entries: tuple[RemoteEntry, ...], to: Path | None
) -> dict[RemoteEntry, tuple[Path, str]]:
    if isinstance(name, UrlName) or (len(entries) == 1 and entries[0].path == name.path):
        (only,) = entries
        return {only: ((to or Path()) / local_name(only.path).name, "")}
    root = to or Path(name.repo.partition("/")[2])
    return {entry: (root / local_name(entry.path), "") for entry in entries}


def _comfy_targets(
    tree: RemoteTree, entries: Iterable[RemoteEntry], root: Path, left_out: dict[str, str]
) -> dict[RemoteEntry, tuple[Path, str]]:
    """Sort checkpoints into the folders of ComfyUI by what their headers say."""
    models = comfy_models(root)
    placed: dict[RemoteEntry, tuple[Path, str]] = {}
    for entry in entries:
        try:
            with open_subject(as_path(RemotePath(tree, entry.path))) as subject:
                kind = subject.kind
        except RemoteError:
            raise
        except DiffquantError as error:
            left_out[entry.path] = str(error)
            continue
        if kind not in COMFY_FOLDERS:
            left_out[entry.path] = f"kind {kind}, no folder known: download it with --to"
            continue
        target = models / COMFY_FOLDERS[kind] / local_name(entry.path).name
        placed[entry] = target, kind
    if not placed:
        reasons = shorten(f"{path}: {why}" for path, why in left_out.items())
        raise UsageError(f"no file that ComfyUI loads was chosen ({reasons or 'no checkpoint'})")
    return placed


def _planned(entry: RemoteEntry, target: Path, kind: str, version: str) -> PlannedFile:
    if target.exists():
        same = target.is_file() and target.stat().st_size == entry.nbytes
        return PlannedFile(entry, target, kind, "there" if same else "differs", 0, version)
    part = part_path(target, entry, version)
    kept = part.stat().st_size if part.is_file() else 0
    return PlannedFile(entry, target, kind, "part" if kept else "new", kept, version)


def _check_distinct(files: tuple[PlannedFile, ...]) -> None:
    """Refuse two files for one target; systems that fold case would lose one."""
    seen: dict[str, str] = {}
    for one in files:
        folded = str(one.target).casefold()
        if folded in seen:
            raise UsageError(
                f"{seen[folded]} and {one.entry.path} would both be {one.target}: choose one with "
                "--include"
            )
        seen[folded] = one.entry.path
