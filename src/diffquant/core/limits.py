"""What a container leaves to a process: memory and processors by Linux control groups.

A group's limit holds for all below it, so the tightest on the way up counts. Version 2 keeps its
files in one tree, version 1 in a tree per controller:

    v2  /proc/self/cgroup "0::/a/b"          memory.max  memory.current  cpu.max "200000 100000"
    v1  /proc/self/cgroup "4:memory:/a/b"    memory.limit_in_bytes  memory.usage_in_bytes
                          "1:cpu,cpuacct:/"  cpu.cfs_quota_us  cpu.cfs_period_us

Inside a container the path may name a group that is mounted as the root, so the root is always
looked at. File pages that can be dropped at once (inactive_file) are no use of memory.

Source: torvalds/linux@v6.6:Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst,
scheduler/sched-bwc.rst.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Limits", "limits"]

_NONE = 1 << 60  # v1 writes a huge number for no limit


@dataclass(frozen=True, slots=True)
class Limits:
    """What control groups allow.

    Attributes:
        ram: bytes, None where nothing limits them.
        ram_free: of them, what the group has not used.
        cores: processors' worth of time, None where nothing limits it.
    """

    ram: int | None
    ram_free: int | None
    cores: float | None


def limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Limits:
    """Read the limits of this process; none where there are no control groups.

    Args:
        root: where groups are mounted.
        own: the file that names this process's groups.
    """
    memory: list[tuple[int, int]] = []  # (free, limit)
    cores: list[float] = []
    for folder in _folders(root, own):
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        if limit is not None and limit < _NONE:
            used = _number(folder, "memory.current", "memory.usage_in_bytes") or 0
            memory.append((max(limit - used + _droppable(folder), 0), limit))
        quota = _quota(folder)
        if quota is not None:
            cores.append(quota)
    free = min((one for one, _ in memory), default=None)
    limit = min((one for _, one in memory), default=None)
    return Limits(limit, free if limit is None else min(free or 0, limit), min(cores, default=None))


def _folders(root: Path, own: Path) -> Iterator[Path]:
    """Every folder with limits of this process: of each tree the groups up to its root."""
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        # v1 mounts controllers that share a tree under both names, or under each alone.
        for name in {controllers, *controllers.split(",")}:
            if name not in ("", "memory", "cpu", "cpu,cpuacct"):
                continue
            tree = root / name
            yield tree
            group = tree / path.lstrip("/")
            if ".." in group.parts:  # a group outside of this namespace: nothing of it is mounted
                continue
            while group != tree:
                yield group
                group = group.parent


def _quota(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split()
    if not words:
        words = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if len(words) != 2 or not all(word.isdigit() for word in words) or words[1] == "0":
        return None  # "max", and -1 in v1: no limit
    return int(words[0]) / int(words[1])


def _droppable(folder: Path) -> int:
    pairs = (line.split() for line in _text(folder / "memory.stat").splitlines())
    stat: Mapping[str, str] = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
    return int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))


def _number(folder: Path, *names: str) -> int | None:
    """The number in the first of these files that exists; None for "max"."""
    for name in names:
        text = _text(folder / name).strip()
        if text:
            return int(text) if text.isdigit() else None
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # no such group, controller or platform
        return ""
