"""Runs of the real command line on two devices side by side, and the table of what they found.

A command runs in a process of its own, forked from one that has imported torch and nothing else: so
it has its own context on the card, its exit code is the real one, a crash ends it alone, and nobody
waits for imports thirty times. `fresh` starts `python -m diffquant` instead. Both sides run at the
same time, each with a folder of its own; seconds are those of a machine that does both.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAST_ITS_TIME = 124  # in place of an exit code, as `timeout` has it
MIB = 1 << 20
HEAD = f"{'command':36} {'exit':>4} {'':>4} {'s, cpu':>7} {'card':>7} {'MiB':>6}"


@dataclass(frozen=True)
class Side:
    """Where a command runs: "cpu" or "card", torch's name of the device, and its files."""

    name: str
    device: str
    folder: Path


@dataclass(frozen=True)
class Ran:
    """What came of a command; `memory` holds bytes of the card, empty where it used none."""

    arguments: tuple[str, ...]
    code: int
    seconds: float
    out: str
    log: str
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def result(self) -> dict[str, Any]:
        """`result` of what --json printed."""
        found: dict[str, Any] = json.loads(self.out)["result"]
        return found

    @property
    def warnings(self) -> list[str]:
        """`warnings` of it."""
        found: list[str] = json.loads(self.out)["warnings"]
        return found

    def last(self, lines: int = 15) -> str:
        """The end of its output: the problems it reports, else stdout, then stderr."""
        try:
            found = list(_problems(json.loads(self.out)["result"]))
        except (ValueError, KeyError):  # not what --json prints
            found = self.out.splitlines()
        return "\n".join([*found, *self.log.splitlines()][-lines:]) or "(no output)"


def _problems(found: Any) -> Iterator[str]:
    """Every sentence under "problems" in a report."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from map(str, value) if key == "problems" else _problems(value)
    elif isinstance(found, list):
        for one in found:
            yield from _problems(one)


def _memory() -> dict[str, int]:
    """Bytes of the card, at their highest; `context` is what no allocator of torch counts."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "context": total - free - torch.cuda.memory_reserved(),
    }


def _child(arguments: Sequence[str], base: Path, *, fresh: bool) -> None:
    """Be the command; does not return."""
    code = 70
    try:
        os.setpgid(0, 0)
        for number, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(base.with_suffix(suffix), os.O_WRONLY | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if fresh:
            os.execv(sys.executable, [sys.executable, "-m", "diffquant", *arguments])
        sys.argv = ["diffquant", *arguments]
        from diffquant.cli import main

        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        base.with_suffix(".json").write_text(json.dumps(_memory()))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@dataclass
class Running:
    """A command that was started."""

    arguments: tuple[str, ...]
    base: Path
    pid: int
    began: float = field(default_factory=time.perf_counter)

    def wait(self, limit_s: float) -> Ran:
        """Wait for its end, or end it after `limit_s` seconds from its start."""
        ended, status = 0, 0
        try:
            while not ended and time.perf_counter() - self.began < limit_s:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                time.sleep(0.01)
        finally:
            seconds = time.perf_counter() - self.began
            if not ended:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status) if ended else PAST_ITS_TIME
        out, log = (
            self.base.with_suffix(suffix).read_text(errors="replace") for suffix in (".out", ".err")
        )
        told = self.base.with_suffix(".json")
        memory = json.loads(told.read_text()) if told.exists() else {}
        return Ran(self.arguments, code, seconds, out, log, memory)


def start(arguments: Sequence[str], base: Path, *, fresh: bool = False) -> Running:
    """Start a command whose output goes to files beside `base`."""
    for suffix in (".out", ".err"):
        base.with_suffix(suffix).write_text("")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(arguments, base, fresh=fresh)
    return Running(tuple(arguments), base, pid)


def run_sides(
    sides: Sequence[Side],
    arguments: Callable[[Side], Sequence[object]],
    name: str,
    limit_s: float,
    *,
    fresh: bool = False,
) -> list[Ran]:
    """Run a command on every side at once."""
    started = [
        start([str(one) for one in arguments(side)], side.folder / f"{name}.log", fresh=fresh)
        for side in sides
    ]
    with ThreadPoolExecutor(len(started)) as threads:
        return list(threads.map(lambda one: one.wait(limit_s), started))


# --- rows of the table ----------------------------------------------------------------------------


class RowEndError(Exception):
    """Nothing more can be said in this row."""


@dataclass
class Row:
    """A command on both sides."""

    bench: Bench
    name: str
    codes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    figures: list[tuple[str, str, bool]] = field(default_factory=list)
    trouble: str = ""

    def run(
        self,
        arguments: Callable[[Side], Sequence[object]],
        *,
        exits: int = 0,
        fresh: bool = False,
    ) -> list[Ran]:
        """Run a command, CPU first; the row ends where an exit code is another than expected."""
        left = self.bench.left_s()
        if left < 5:
            self.trouble = "not run: no time is left"
            raise RowEndError
        stem = "".join(one if one.isalnum() else "-" for one in self.name)
        limit = min(left, self.bench.limit_s)
        ran = run_sides(self.bench.sides, arguments, stem, limit, fresh=fresh)
        self.codes, self.seconds = [one.code for one in ran], [one.seconds for one in ran]
        self.peak = max(one.memory.get("reserved", 0) for one in ran)
        for side, one in zip(self.bench.sides, ran, strict=True):
            if one.code != exits:
                past = one.code == PAST_ITS_TIME
                ended = f"ended after {limit:.0f} s" if past else f"exit {one.code}"
                self.trouble += f"{side.name} ({side.device}): {ended}, expected {exits}: "
                self.trouble += f"{' '.join(one.arguments)}\n{one.last()}\n"
        if self.trouble:
            raise RowEndError
        return ran

    def holds(self, name: str, told: str, agrees: bool) -> None:
        """Judge a figure."""
        self.figures.append((name, told, bool(agrees)))

    def near(self, name: str, cpu: float | None, card: float | None, within: float) -> None:
        """Judge two numbers; None is a number too: identical pictures have no PSNR."""
        agrees = cpu == card
        if cpu is not None and card is not None:
            agrees = abs(cpu - card) <= within  # NaN does not
        self.holds(name, f"{text_of(cpu)} and {text_of(card)}, within {within:g}", agrees)

    def told(self, name: str, text: str) -> None:
        """Say what nothing hangs on."""
        self.holds(name, text, True)

    @property
    def agrees(self) -> bool:
        return not self.trouble and all(good for _, _, good in self.figures)


@dataclass
class Bench:
    """All rows; written as they come."""

    sides: list[Side]
    until: float
    limit_s: float
    found: dict[str, Any]
    json: Path | None
    rows: list[Row] = field(default_factory=list)

    @property
    def card(self) -> bool:
        return self.sides[1].device != "cpu"

    def left_s(self) -> float:
        return self.until - time.monotonic()

    @contextlib.contextmanager
    def row(self, name: str) -> Iterator[Row]:
        """Say a row when it is over, whatever became of it."""
        row = Row(self, name)
        try:
            yield row
        except RowEndError:
            pass
        except Exception:  # the card's time is dear: the other rows go on
            row.trouble = traceback.format_exc()
        self.rows.append(row)
        show(row)
        fields = {name: value for name, value in vars(row).items() if name != "bench"}
        self.found.setdefault("rows", []).append({**fields, "agrees": row.agrees})
        if self.json is not None:
            self.json.write_text(json.dumps(self.found, indent=1))


def text_of(value: float | None) -> str:
    return "identical" if value is None else f"{value:.4g}"


def show(row: Row) -> None:
    codes, seconds = row.codes or ["-", "-"], [f"{one:.1f}" for one in row.seconds] or ["-", "-"]
    peak = f"{row.peak / MIB:.0f}" if row.peak else "-"
    verdict = "agrees" if row.agrees else "DISAGREES"
    print(f"{row.name:36} {codes[0]!s:>4} {codes[-1]!s:>4} {seconds[0]:>7} {seconds[-1]:>7} "
          f"{peak:>6}  {verdict}")  # fmt: skip
    for name, told, good in row.figures:
        print(f"      {'' if good else 'NOT '}{name}: {told}")
    for line in row.trouble.splitlines():
        print(f"      | {line}")
    sys.stdout.flush()
