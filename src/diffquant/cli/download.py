"""`diffquant download SOURCE`: files of a repository, resumed and checked."""

from __future__ import annotations

from pathlib import Path

import click

from diffquant.cli.frame import Options, Outcome, common, echo, human, run, table
from diffquant.core.errors import shorten
from diffquant.publish.download import DownloadReport, run_download
from diffquant.publish.download_plan import DownloadRequest, plan_download

__all__ = ["command"]

_PLANNED = {
    "new": "to download",
    "part": "to resume",
    "there": "there, to be checked",
    "differs": "differs (--force replaces it)",
}


@click.command("download")
@click.argument("source")
@click.option("--include", multiple=True, metavar="GLOB", help="Take only files that fit.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave out files that fit.")
@click.option("--quant", default="", metavar="LABEL", help="Take only files labelled, say, Q4_K_S.")
@click.option("--to", type=click.Path(path_type=Path), help="Folder (default: the repository's).")
@click.option(
    "--comfy-root",
    type=click.Path(path_type=Path),
    help="Folder of ComfyUI: sort files into its models/ by what they are.",
)
@click.option("--revision", default="", help="Branch, tag or commit.")
@click.option("--dry-run", is_flag=True, help="Say what would be downloaded.")
@click.option("--force", is_flag=True, help="Replace files that differ.")
@common
def command(
    source: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    quant: str,
    to: Path | None,
    comfy_root: Path | None,
    revision: str,
    dry_run: bool,
    force: bool,
    options: Options,
) -> None:
    """Download SOURCE: hf://owner/repo[/path][@revision], owner/repo, or a link.

    Goes on where it was cut, compares every checksum, and leaves alone what is there already.

    diffquant download city96/FLUX.1-dev-gguf --quant Q4_K_S --comfy-root ~/ComfyUI
    """

    def work() -> Outcome:
        request = DownloadRequest(
            source=source,
            include=include,
            exclude=exclude,
            quant=quant,
            to=to,
            comfy_root=comfy_root,
            revision=revision,
            force=force,
        )
        with plan_download(request) as plan:
            report = run_download(plan, dry_run=dry_run, progress=options.bar())
        return Outcome(report, _warnings(report))

    run("download", options, work, _render)


def _warnings(report: DownloadReport) -> list[str]:
    unchecked = [one.path for one in report.files if not one.checksum]
    told = [f"{path} is left out: {why}" for path, why in report.left_out.items()]
    if report.no_models:
        told.append(f"left out, since ComfyUI loads no such files: {shorten(report.no_models)}")
    told += [f"{path}: the server states no checksum, none was compared" for path in unchecked]
    told += [
        f"{one.path}: the server cannot resume, it was downloaded from its beginning"
        for one in report.files
        if one.state == "restarted"
    ]
    return told


def _render(report: DownloadReport) -> None:
    table(
        ("file", "size", "label", "state", "checksum"),
        [
            (
                one.target,
                human(one.nbytes),
                one.label or "-",
                _PLANNED.get(one.state, one.state),
                one.checksum or "none",
            )
            for one in report.files
        ],
        right=(1,),
    )
    many = f"{len(report.files)} of {report.listed_files} files, {_size(report.nbytes)}"
    if report.dry_run:
        echo(f"[dry-run] would download {many}")
    else:
        echo(f"{many}; {human(report.sent_nbytes)} came over the network")


def _size(nbytes: int) -> str:
    """Bytes as the hub counts them, and as disks do: 5.60 GB (5.22 GiB)."""
    for power, letter in ((3, "G"), (2, "M")):
        if nbytes >= 1000**power:
            return f"{nbytes / 1000**power:.2f} {letter}B ({human(nbytes)})"
    return human(nbytes)
