"""What every command shares: options, the JSON envelope, progress, errors and exit codes.

stdout is the result, stderr is progress and log. A user sees a traceback only with `-v -v` or
DIFFQUANT_DEBUG=1.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from diffquant.core.failures import explain
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.core.report import SCHEMA_VERSION, envelope
from diffquant.core.shown import CONTROL, shown

__all__ = ["Options", "Outcome", "common", "echo", "human", "plain_text", "run", "table", "threads"]

_DEBUG_VERBOSITY = 2
_ONE_LINE = {**CONTROL, ord("\n"): " "}
_TEXT = {code: text for code, text in CONTROL.items() if chr(code) not in "\n\t"}


@dataclass(frozen=True, slots=True)
class Options:
    """The options every command has."""

    as_json: bool
    quiet: bool
    verbose: int
    progress: bool
    threads: int | None = None

    def bar(self) -> Progress:
        """A progress bar on stderr, or the silent one."""
        quiet = self.quiet or not self.progress or not sys.stderr.isatty()
        return NO_PROGRESS if quiet else _Bar()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command produced: report data, warnings, and the exit code it asks for.

    `errors` are of items that failed beside others that did not; shown however quiet.
    """

    result: object
    warnings: Sequence[str] = ()
    exit_code: int = 0
    ok: bool = True
    errors: Sequence[str] = ()


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json, -q, -v and --no-progress, passed to the command as one `options`."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    @click.option("-q", "--quiet", is_flag=True, help="Print results and errors only.")
    @click.option("-v", "--verbose", count=True, help="Say more; twice shows tracebacks.")
    @click.option("--no-progress", is_flag=True, help="Draw no progress bar.")
    @functools.wraps(function)
    def wrapped(
        *args: object,
        as_json: bool,
        quiet: bool,
        verbose: int,
        no_progress: bool,
        **kwargs: object,
    ) -> object:
        count = kwargs.pop("threads", None)
        threads_asked = count if isinstance(count, int) else None
        options = Options(as_json, quiet, verbose, not no_progress, threads_asked)
        return function(*args, options=options, **kwargs)

    return wrapped


def threads(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --threads, found as `options.threads`."""
    decorate = click.option(
        "--threads",
        type=click.IntRange(min=1),
        default=None,
        help="Worker threads (default: one per processor).",
    )
    return decorate(function)


def run(
    name: str,
    options: Options,
    work: Callable[[], Outcome],
    render: Callable[[Any], None],
) -> None:
    """Do a command's work, print its result, and exit with its code."""
    _set_up_logging(options)
    debug = options.verbose >= _DEBUG_VERBOSITY or bool(os.environ.get("DIFFQUANT_DEBUG"))
    try:
        outcome = work()
    except (click.ClickException, click.exceptions.Exit):
        raise
    except BaseException as error:
        if debug:
            traceback.print_exc()
        code, message = explain(error)
        _print_error(name, options, code, message)
        sys.exit(code)
    _print_outcome(name, options, outcome, render)
    sys.exit(outcome.exit_code)


def _print_error(name: str, options: Options, code: int, message: str) -> None:
    if options.as_json:
        body = {
            "schema_version": SCHEMA_VERSION,
            "command": name,
            "ok": False,
            "warnings": [],
            "error": {"exit_code": code, "message": message},
            "result": None,
        }
        click.echo(json.dumps(body, indent=2))
    click.echo(f"diffquant {name}: {message.translate(_ONE_LINE)}", err=True)


def _print_outcome(
    name: str, options: Options, outcome: Outcome, render: Callable[[Any], None]
) -> None:
    try:
        if options.as_json:
            told = [*outcome.errors, *outcome.warnings]
            body = envelope(name, outcome.result, ok=outcome.ok, warnings=told)
            click.echo(json.dumps(body, indent=2))
        else:
            render(outcome.result)
        for text in outcome.errors:
            click.echo(f"diffquant {name}: {text.translate(_ONE_LINE)}", err=True)
        if not options.quiet:
            for warning in outcome.warnings:
                click.echo(f"warning: {warning.translate(_ONE_LINE)}", err=True)
        sys.stdout.flush()
    except BrokenPipeError:  # `diffquant ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _set_up_logging(options: Options) -> None:
    level = logging.WARNING - 10 * min(options.verbose, 2)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(
        level=logging.ERROR if options.quiet else level, handlers=[handler], force=True
    )


class _OneLine(logging.Formatter):
    """Messages quote names from files: control characters are shown, not sent."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        return super().formatMessage(record).translate(_ONE_LINE)


def echo(text: str = "") -> None:
    """Print a result line; control characters are shown, not sent."""
    click.echo(plain_text(text))


def plain_text(text: str) -> str:
    """Text from a file, its control characters shown and not sent."""
    return text.translate(_TEXT)


def human(nbytes: float) -> str:
    """Bytes as people read them: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable")


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()
) -> None:
    """Print an aligned table; `right` are the columns aligned to the right.

    Plain text, so that it survives pipes, narrow terminals and NO_COLOR alike.
    """
    headers, rows = [shown(one) for one in headers], [[shown(str(c)) for c in row] for row in rows]
    widths = [max(len(str(row[i])) for row in (headers, *rows)) for i in range(len(headers))]
    for index, row in enumerate((headers, *rows)):
        cells = [
            str(cell).rjust(width) if i in right else str(cell).ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        echo("  ".join(cells).rstrip())
        if index == 0:
            echo("  ".join("-" * width for width in widths))


class _Bar:
    """tqdm on stderr, safe to advance from worker threads."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._lock = threading.Lock()

    def start(self, label: str, total: int, unit: str = "B") -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total, desc=label, unit=unit, unit_scale=unit == "B", leave=False, file=sys.stderr
        )

    def advance(self, amount: int, key: str = "") -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.update(amount)
                if key:
                    self._bar.set_postfix_str(key[-40:], refresh=False)

    def stop(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None
