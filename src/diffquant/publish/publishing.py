"""publish(): a release to a repository, once: made, staged, compared with what is there, uploaded.

Nothing is sent that is there already, and a run that would change nothing makes no commit. What is
never done unasked: a public repository, another visibility for one that exists, a card that
somebody else wrote or edited. A cut leaves nothing to clean up; the same command goes on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffquant.core.errors import UsageError, shorten
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.publish.card import is_own_card
from diffquant.publish.hubs import Commit, HubClient, RemoteFile, RepoState, Target
from diffquant.publish.release import Release, ReleaseRequest, make_release
from diffquant.publish.staging import CARD, StagedFile, StagingPlan, plan_staging, staged
from diffquant.publish.tokens import redacted_logs

__all__ = ["PublishReport", "PublishRequest", "SentFile", "open_client", "publish", "target_from"]

_TARGET = re.compile(r"(hf|modelscope):([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})", re.ASCII)
_NAME = re.compile(r"(?!.*\.\.)(?!-)[\w./+-]{1,200}", re.ASCII)


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """Where a release goes, and how.

    Attributes:
        target: None to make the card only.
        public: make the repository public, or say that it may be.
        create_pr: propose the files instead of committing them.
        tag: tag the commit.
        message: of the commit.
        force: write over a card that somebody else wrote or edited.
        dry_run: plan only; the network is not touched.
    """

    release: ReleaseRequest
    target: Target | None
    public: bool = False
    create_pr: bool = False
    tag: str = ""
    message: str = ""
    force: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class SentFile:
    """A file of the release; `state` is planned, new, changed or there."""

    place: str
    nbytes: int
    label: str
    sha256: str
    state: str


@dataclass(frozen=True, slots=True)
class PublishReport:
    """What was published, or would be.

    Attributes:
        state: planned, created, updated, proposed, or nothing to do.
        visibility: private, public, or "" where the hub does not say.
        copied_nbytes: what could not be linked into the staging folder.
        notes: what a publisher should know.
    """

    target: str
    url: str
    state: str
    visibility: str
    card: str
    files: tuple[SentFile, ...]
    nbytes: int
    sent_nbytes: int
    copied_nbytes: int
    commit: str
    pull_request: str
    tag: str
    notes: tuple[str, ...]


def target_from(text: str, revision: str = "") -> Target:
    """Read --to.

    Raises:
        UsageError: neither hf:owner/name nor modelscope:owner/name.
    """
    found = _TARGET.fullmatch(text)
    if found is None or found[2].endswith((".git", ".ipynb")) or ".." in found[2]:
        raise UsageError(f"--to {text!r:.120}: expected hf:OWNER/NAME or modelscope:OWNER/NAME")
    if revision and not _NAME.fullmatch(revision):
        raise UsageError(f"--revision {revision!r:.120}: no name of a branch")
    return Target(found[1], found[2], revision)


def open_client(target: Target, token_file: Path | None = None, *, bars: bool = False) -> HubClient:
    """The client of a target's hub.

    Raises:
        UsageError: no token, or the client is not installed.
        RemoteError: the network is forbidden.
    """
    if target.hub == "modelscope":
        from diffquant.publish.modelscope import ModelScope

        return ModelScope(token_file, bars=bars)
    from diffquant.publish.huggingface import HuggingFace

    return HuggingFace(token_file, bars=bars)


def publish(
    request: PublishRequest,
    connect: Callable[[Target], HubClient] = open_client,
    *,
    progress: Progress = NO_PROGRESS,
) -> PublishReport:
    """Publish, or plan to.

    Args:
        request: what and where.
        connect: opens the client; not called for a dry run or a card alone.
        progress: told about bytes that are hashed.

    Raises:
        UsageError: a value, a name, a missing license, a card of somebody else's hand.
        RemoteError: the hub refuses or is cut off.
        ResourceError: no room for a copy.
    """
    target = request.target
    if request.tag and not _NAME.fullmatch(request.tag):
        raise UsageError(f"--tag {request.tag!r:.120}: no name of a tag")
    if request.create_pr and target is not None and target.revision:
        raise UsageError(
            "--create-pr opens a pull request against the default branch: leave out --revision (to "
            "go on with one, leave out --create-pr and give --revision refs/pr/N)"
        )
    if target is None or request.dry_run:
        release = make_release(request.release, progress=progress)
        return _planned(request, release, plan_staging(release))
    client = connect(target)
    with redacted_logs(client.redactor):
        # What the hub refuses, it refuses before hours of hashing.
        client.check(target.repo)
        found = client.state(target, write=not request.create_pr)
        told = _check_there(request, target, found) if found is not None else []
        if found is None and request.create_pr:
            raise UsageError(f"{target}: --create-pr needs a repository that exists")
        release = make_release(
            request.release, lookup=getattr(client, "card_of", None), progress=progress
        )
        notes = [*release.notes, *told]
        return _sent(request, client, _Job(target, found, release, plan_staging(release)), notes)


@dataclass(frozen=True, slots=True)
class _Job:
    """A release beside the repository it goes to, None where that is yet to be made."""

    target: Target
    found: RepoState | None
    release: Release
    plan: StagingPlan


def _planned(request: PublishRequest, release: Release, plan: StagingPlan) -> PublishReport:
    return PublishReport(
        target=str(request.target or ""),
        url="",
        state="planned",
        visibility="public" if request.public else "private",
        card=plan.card,
        files=tuple(_row(one, "planned") for one in plan.files),
        nbytes=plan.nbytes,
        sent_nbytes=0,
        copied_nbytes=0,
        commit="",
        pull_request="",
        tag=request.tag,
        notes=release.notes,
    )


def _sent(request: PublishRequest, client: HubClient, job: _Job, notes: list[str]) -> PublishReport:
    target, found, release, plan = job.target, job.found, job.release, job.plan
    if found is not None:
        _check_card(request, target, client, plan, found)
    states = {one.place: _state(one, found) for one in plan.files}
    changed = [one for one in plan.files if states[one.place] != "there"]
    created = found is None
    if created:
        client.create(target.repo, private=not request.public)
    copied, done = 0, Commit(found.commit if found else "", client.url(target.repo))
    if changed:
        with staged(plan) as (folder, copied):
            try:
                done = client.upload(
                    target,
                    folder,
                    unchanged=[place for place, state in states.items() if state == "there"],
                    message=request.message or _message(release),
                    parent=found.commit if found else "",
                    create_pr=request.create_pr,
                )
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    "interrupted; what the hub has got it keeps, the same command goes on"
                ) from None
    if copied:
        notes.append(f"{copied} bytes were copied for the upload, they could not be linked")
    if request.tag:
        client.tag(target, request.tag, done.id)
    private = not request.public if found is None else found.private
    state = "created" if created else "updated" if changed else "nothing to do"
    return PublishReport(
        target=str(target),
        url=client.url(target.repo),
        state="proposed" if done.pull_request else state,
        visibility="" if private is None else "private" if private else "public",
        card=plan.card,
        files=tuple(_row(one, states[one.place]) for one in plan.files),
        nbytes=plan.nbytes,
        sent_nbytes=sum(one.nbytes for one in changed),
        copied_nbytes=copied,
        commit=done.id,
        pull_request=done.pull_request,
        tag=request.tag,
        notes=tuple(notes),
    )


def _check_there(request: PublishRequest, target: Target, found: RepoState) -> list[str]:
    """What holds for a repository that exists: its visibility stays, a tag is set once."""
    if found.private is False and not request.public and not request.create_pr:
        raise UsageError(
            f"{target} is public, and everybody would see the files: give --public if they may"
        )
    if request.tag and request.tag in found.tags:
        raise UsageError(f"{target} has a tag {request.tag} already; choose another --tag")
    if found.private and request.public:
        return [f"{target} is private and stays so: change that in its settings"]
    return []


def _check_card(
    request: PublishRequest,
    target: Target,
    client: HubClient,
    plan: StagingPlan,
    found: RepoState,
) -> None:
    """Never write over a card that somebody else wrote or edited, unless told to or proposed."""
    there = found.files.get(CARD)
    ours = next(one for one in plan.files if one.place == CARD)
    if there is None or request.force or request.create_pr or _same(ours, there):
        return
    card = client.read_text(target, CARD)
    if is_own_card(card) or card.strip() == "":
        return
    new = set(plan.card.splitlines())
    lost = [line for line in card.splitlines() if line.strip() and line not in new]
    raise UsageError(
        f"{target}: its {CARD} was written or edited by somebody, and {len(lost)} of its lines are "
        f"not in the new one, such as {shorten([repr(line)[:60] for line in lost], 2)}; "
        "--card-only -o NEW.md shows the new one, --force replaces the old, --create-pr proposes"
    )


def _state(one: StagedFile, found: RepoState | None) -> str:
    there = found.files.get(one.place) if found else None
    if there is None:
        return "new"
    return "there" if _same(one, there) else "changed"


def _same(one: StagedFile, there: RemoteFile) -> bool:
    if one.nbytes != there.nbytes:
        return False
    if there.sha256:
        return one.sha256 == there.sha256
    return bool(there.blob_sha1) and one.blob_sha1 == there.blob_sha1


def _message(release: Release) -> str:
    labels = [one.name.label or one.facts.type or one.name.name for one in release.files]
    return f"Add {shorten(labels)} (diffquant)"


def _row(one: StagedFile, state: str) -> SentFile:
    return SentFile(one.place, one.nbytes, one.label, one.sha256, state)
