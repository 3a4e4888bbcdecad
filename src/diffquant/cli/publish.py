"""`diffquant publish FILE... --to hf:owner/name`: files and a model card to a hub."""

from __future__ import annotations

from pathlib import Path

import click

from diffquant.cli.frame import Options, Outcome, common, echo, human, run, table
from diffquant.cli.values import check_free, prompts_from, write_text
from diffquant.core.errors import UsageError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.publish.draw import draw_release
from diffquant.publish.licences import License
from diffquant.publish.publishing import (
    PublishReport,
    PublishRequest,
    open_client,
    publish,
    target_from,
)
from diffquant.publish.release import LAYOUTS, ReleaseRequest

__all__ = ["command"]

_DIGITS = 12
_PATH = click.Path(path_type=Path)


@click.command("publish")
@click.argument("paths", nargs=-1, required=True, type=_PATH)
@click.option(
    "--to", "to", metavar="HUB:OWNER/NAME", help="hf:OWNER/NAME or modelscope:OWNER/NAME."
)
@click.option(
    "--base-model",
    "base_models",
    multiple=True,
    metavar="OWNER/NAME",
    help="Repository that the files were made from; several for a merge.",
)
@click.option("--license", "license_id", metavar="ID", help="License; default: the source's own.")
@click.option("--license-name", default="", metavar="NAME", help="Name, with --license other.")
@click.option("--license-link", default="", metavar="URL|FILE", help="Where its text is.")
@click.option("--base-card", type=_PATH, metavar="FILE", help="README.md of the original.")
@click.option("--comparison", type=_PATH, metavar="FILE", help="JSON of `diffquant compare`.")
@click.option(
    "--samples", multiple=True, type=_PATH, metavar="PATH", help="Picture, or folder of pictures."
)
@click.option("--grid", type=_PATH, metavar="FILE", help="PNG that is shown large, at the top.")
@click.option(
    "--draw",
    type=_PATH,
    metavar="ORIGINAL",
    help="Draw --grid first, unless it exists: the original and every file, the same prompts.",
)
@click.option("--prompts", type=_PATH, metavar="FILE", help="Prompts for --draw, one per line.")
@click.option("--steps", type=click.IntRange(1, 1000), default=20, help="Steps for --draw.")
@click.option("--title", default="", help="Heading of the card.")
@click.option("--name", "stem", default="", metavar="STEM", help="What file names begin with.")
@click.option(
    "--layout", type=click.Choice(LAYOUTS), default=LAYOUTS[0], help="flat, or ComfyUI's folders."
)
@click.option("--language", multiple=True, metavar="CODE", help="Of prompts.  [default: en]")
@click.option("--quantized-by", default=None, metavar="NAME", help="Default: the owner.")
@click.option("--public", is_flag=True, help="Make the repository public; else it is private.")
@click.option("--create-pr", is_flag=True, help="Propose the files instead of committing them.")
@click.option("--revision", default="", metavar="BRANCH", help="Branch to commit to.")
@click.option("--tag", default="", metavar="NAME", help="Tag the commit, such as v1.")
@click.option("-m", "--message", default="", help="Message of the commit.")
@click.option("--token-file", type=_PATH, metavar="FILE", help="File with the access token alone.")
@click.option("--card-only", is_flag=True, help="Write the card to -o (or print it), offline.")
@click.option("-o", "--output", type=_PATH, help="Where --card-only writes.")
@click.option("--dry-run", is_flag=True, help="Print plan and card; no network is used.")
@click.option("--force", is_flag=True, help="Write over a card of somebody else's hand.")
@common
def command(
    paths: tuple[Path, ...],
    to: str | None,
    base_models: tuple[str, ...],
    license_id: str | None,
    license_name: str,
    license_link: str,
    base_card: Path | None,
    comparison: Path | None,
    samples: tuple[Path, ...],
    grid: Path | None,
    draw: Path | None,
    prompts: Path | None,
    steps: int,
    title: str,
    stem: str,
    layout: str,
    language: tuple[str, ...],
    quantized_by: str | None,
    public: bool,
    create_pr: bool,
    revision: str,
    tag: str,
    message: str,
    token_file: Path | None,
    card_only: bool,
    output: Path | None,
    dry_run: bool,
    force: bool,
    options: Options,
) -> None:
    """Publish PATHS (.gguf and .safetensors files, or a folder of them) with a model card.

    The repository is private unless --public. Names are such that the Hub lists each file under its
    type. A second run sends what changed, and nothing when nothing did; after a cut it goes on. The
    token comes from `hf auth login`, HF_TOKEN or --token-file.

    diffquant publish out/ --to hf:me/FLUX.1-dev-GGUF --base-model black-forest-labs/FLUX.1-dev
    """

    def work() -> Outcome:
        if card_only == (to is not None) and not (card_only and to):
            raise UsageError("give --to HUB:OWNER/NAME, or --card-only")
        if output is not None and not card_only:
            raise UsageError("-o is where --card-only writes the card")
        if output is not None and output.suffix.lower() != ".md":
            raise UsageError(f"-o {output}: a card is a .md file, such as README.md")
        if output is not None:
            read = (*paths, base_card, prompts, comparison, grid, draw, token_file)
            check_free(output, read, force=force)
        target = target_from(to, revision) if to else None
        bar = options.bar()
        drawn = _drawn(paths, grid, draw, prompts, steps, bar, dry_run=dry_run)
        planned = dry_run and draw is not None and grid is not None and not grid.exists()
        by = quantized_by if quantized_by is not None else to and to.split(":")[-1].split("/")[0]
        release = ReleaseRequest(
            paths=paths,
            title=title,
            base_models=base_models,
            license=_license(license_id, license_name, license_link),
            base_card=base_card,
            quantized_by=by or "",
            comparison=comparison,
            samples=samples,
            grid=None if planned else grid,
            layout=layout,
            stem=stem,
            language=language or ("en",),
        )
        request = PublishRequest(
            release=release,
            target=target,
            public=public,
            create_pr=create_pr,
            tag=tag,
            message=message,
            force=force,
            dry_run=dry_run or card_only,
        )
        bars = bar is not NO_PROGRESS
        report = publish(
            request, lambda where: open_client(where, token_file, bars=bars), progress=bar
        )
        if output is not None:
            write_text(output, report.card)
        return Outcome(report, (*drawn, *report.notes))

    def render(report: PublishReport) -> None:
        if card_only:
            echo(report.card.rstrip("\n") if output is None else f"wrote {output}")
            return
        _render(report)
        if report.state == "planned":
            echo()
            echo(report.card.rstrip("\n"))

    run("publish", options, work, render)


def _drawn(
    paths: tuple[Path, ...],
    grid: Path | None,
    original: Path | None,
    prompts: Path | None,
    steps: int,
    progress: Progress,
    *,
    dry_run: bool,
) -> tuple[str, ...]:
    """Draw the grid where that was asked for; what is worth saying of it.

    Raises:
        UsageError: no name for the grid, or no prompts.
    """
    if original is None:
        return ()
    if grid is None or prompts is None:
        raise UsageError("--draw needs --grid FILE, which it writes, and --prompts FILE")
    if grid.exists():
        return (f"{grid} exists and is used as it is: remove it to have it drawn again",)
    check_free(grid, paths, force=False)
    lines = prompts_from(prompts)
    if dry_run:
        return (f"{grid} is not there and not in this card: a dry run draws nothing",)
    return draw_release(paths, original, grid, prompts=lines, steps=steps, progress=progress)


def _license(identifier: str | None, name: str, link: str) -> License | None:
    """The license asked for; a link that is a file here is put into the repository.

    Raises:
        UsageError: name or link without an identifier.
    """
    if identifier is None:
        if name or link:
            raise UsageError("--license-name and --license-link go with --license other")
        return None
    file = Path(link) if link and "://" not in link and Path(link).is_file() else None
    told = file.name if file is not None else link
    return License(identifier.lower(), name, told, "the publisher", file)


def _render(report: PublishReport) -> None:
    table(
        ("file", "size", "listed as", "state", "sha256"),
        [
            (one.place, human(one.nbytes), one.label or "-", one.state, one.sha256[:_DIGITS])
            for one in report.files
        ],
        right=(1,),
    )
    echo()
    size = human(report.nbytes)
    if report.state == "planned":
        echo(f"[dry-run] would publish {len(report.files)} files, {size}, to {report.target}")
        echo(f"  {report.visibility}, if the repository does not exist yet")
    elif report.state == "nothing to do":
        echo(f"{report.url}: nothing to do, all {len(report.files)} files are there")
    else:
        echo(f"{report.pull_request or report.url}: {report.state}")
        echo(f"  sent {human(report.sent_nbytes)} of {size}; {report.visibility or 'visibility?'}")
    if report.tag:
        echo(f"  tagged {report.tag}")
