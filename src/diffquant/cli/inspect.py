"""`diffquant inspect FILE...`: what files are, from their headers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from diffquant.cli.ask_fit import FitAsked, each_fit, each_latents, fit_options, fits, pairs
from diffquant.cli.frame import Options, Outcome, common, echo, run, threads
from diffquant.cli.view_inspect import render_lines, render_page
from diffquant.cli.view_loaders import render_verdict
from diffquant.core.errors import DiffquantError, SeveralCheckpoints
from diffquant.inspect.describe import FileReport, describe
from diffquant.inspect.loaders import LOADERS, LoaderVerdict, check_loader, judge
from diffquant.inspect.many import Unreadable, describe_each

__all__ = ["command"]


@click.command("inspect")
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option("--explain", is_flag=True, help="Show the evidence and the metadata.")
@click.option(
    "--audit",
    "audited",
    is_flag=True,
    help="Check the file against the specifications of its container and formats instead.",
)
@click.option("--full", is_flag=True, help="With --audit: look at every block, not at samples.")
@click.option(
    "--deep", is_flag=True, help="Read every weight instead: NaN, dead blocks, hashes and more."
)
@click.option("--hash", "hashed", is_flag=True, help="Print sha256, AutoV1, AutoV2 and AutoV3.")
@click.option(
    "--for",
    "loader",
    default="",
    metavar="NAME",
    help="Say whether this program can load each FILE, and why not: " + ", ".join(LOADERS) + ".",
)
@fit_options
@threads
@common
def command(
    files: tuple[str, ...],
    explain: bool,
    audited: bool,
    deep: bool,
    hashed: bool,
    full: bool,
    loader: str,
    asked: FitAsked,
    options: Options,
) -> None:
    """Say what each FILE (or folder) is: architecture, parts, storage, size.

    Reads headers only. Unknown files are not an error; unreadable ones are. With --audit: which
    rules a file breaks; exit code 3 for a violation, warnings alone are 0. With --deep: what is
    wrong with its numbers; exit code 3 for a damaged file. With --for: exit code 3 when the program
    would not load one of them. With --vram or --size: what making a picture takes and how it fits;
    a file that does not fit is no error. With --with: whether two files share their latents.
    """
    if sum((bool(asked.others), asked.is_fit, bool(loader), audited, deep, hashed)) > 1:
        raise click.UsageError(
            "--with, --for, --audit, --deep, --hash and the fit of a picture (--vram, --size, "
            "--batch, --dtype) are different questions: ask one at a time"
        )
    if asked.others:
        run("inspect", options, lambda: pairs(files, asked), each_latents)
    if asked.is_fit:
        show = functools.partial(each_fit, explain=explain)
        run("inspect", options, lambda: fits(files, asked), show)
    if loader:
        run("inspect", options, lambda: _judge(files, loader), render_verdict)
    if deep or hashed:  # what few ask for is loaded when it is
        from diffquant.cli import deep as cli_deep
        from diffquant.cli.view_health import render_hashes, render_health

        if deep:
            run("inspect", options, lambda: cli_deep.deep(files, options), render_health)
        run("inspect", options, lambda: cli_deep.hashes(files, options), render_hashes)
    if audited:
        from diffquant.cli.audit import render_audit

        run("inspect", options, lambda: _audit(files, full=full), render_audit)
    if full:
        raise click.UsageError("--full looks at blocks for --audit: give both")

    def work() -> Outcome:
        if len(files) == 1:
            try:
                report = describe(files[0])
            except SeveralCheckpoints:
                from diffquant.inspect.repository import list_repository

                return Outcome({"files": [], "repositories": [list_repository(files[0])]})
            return Outcome({"files": [report]}, [f"{report.path}: {t}" for t in report.warnings])
        found = describe_each(files, judged=explain or options.as_json)
        failed = [one for one in found if isinstance(one, Unreadable)]
        reports = [one for one in found if isinstance(one, FileReport)]
        warnings = [f"{one.path}: {text}" for one in reports for text in one.warnings]
        code = max((one.exit_code for one in failed), default=0)
        errors = [one.error for one in failed]
        result = {"files": reports, "unreadable": failed}
        return Outcome(result, warnings, code, ok=not failed, errors=errors)

    def render(result: dict[str, Any]) -> None:
        reports, failed = result["files"], result.get("unreadable", [])
        for repository in result.get("repositories", []):
            from diffquant.cli.view_repository import render_repository

            render_repository(repository)
        if len(files) == 1 or explain:
            for index, report in enumerate(reports):
                if index:
                    echo()
                render_page(report, explain=explain)
            return
        by_path = {one.path: one for one in (*reports, *failed)}
        render_lines([by_path[path] for path in files])

    run("inspect", options, work, render)


def _judge(files: tuple[str, ...], loader: str) -> Outcome:
    """One program's verdict on every file; a condition is a warning, a refusal exit code 3."""
    check_loader(loader)
    found: dict[str, LoaderVerdict] = {}
    failures: list[DiffquantError] = []
    for path in files:
        try:
            found[path] = next(one for one in judge(path) if one.loader == loader)
        except DiffquantError as error:
            if len(files) == 1:
                raise
            failures.append(error)
    warnings = [
        f"{path}: {reason.text}"
        for path, one in found.items()
        for reason in one.reasons
        if reason.verdict in ("caveat", "unknown") and one.verdict != "refuses"
    ]
    warnings += [
        f"{path}: nothing is known of such a file and {loader}"
        for path, one in found.items()
        if one.verdict == "unknown" and not one.reasons
    ]
    refused = any(one.verdict == "refuses" for one in found.values())
    code = max([3 if refused else 0, *(error.exit_code for error in failures)])
    errors = [str(error) for error in failures]
    return Outcome({"for": loader, "files": found}, warnings, code, ok=not code, errors=errors)


def _audit(files: tuple[str, ...], *, full: bool) -> Outcome:
    from diffquant.inspect.audit import audit

    reports = [report for path in files for report in audit(Path(path), full=full)]
    bad = any(report.violations for report in reports)
    return Outcome({"audits": reports}, (), 3 if bad else 0, ok=not bad)
