"""audit(): a file against the specification of its container and of the formats in it.

Opening a file refuses what cannot be read safely and stops at the first fault; an audit goes on and
lists them all, legal oddities that are known to do harm among them. Rules are rows:
audit_gguf.GGUF_RULES and audit_safetensors.SAFETENSORS_RULES. No tensor is decoded, and neither
torch nor numba is loaded; block contents are looked at in samples, or all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffquant.core.errors import CheckpointError, UnsupportedContainer, UsageError
from diffquant.inspect.audit_gguf import GGUF_RULES, GgufFile
from diffquant.inspect.audit_rules import Finding, run_rules
from diffquant.inspect.audit_safetensors import SAFETENSORS_RULES, SafetensorsFile
from diffquant.io import gguf, safetensors, sharded
from diffquant.io.gguf_header import read_header as read_gguf_header
from diffquant.io.reading import RandomFile
from diffquant.io.remote_name import parse_remote

__all__ = ["AuditReport", "audit", "audit_file"]

_HEAD_NBYTES = 64
_INDEX = ".index.json"
_READ_ONLY = (
    "has no specification that is audited here; known: .gguf, .safetensors, folders of them"
)

Findings = tuple[tuple[Finding, ...], dict[str, int]]


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What one file breaks.

    Attributes:
        path: the file.
        container: "gguf" or "safetensors".
        full: whether every block was looked at, not samples.
        rules: how many rules were checked; 0 where the header cannot be read to its end.
        violations, warnings: how many findings there were.
        findings: at most 20 a rule, violations first.
        counts: rule -> how many.
    """

    path: str
    container: str
    full: bool
    rules: int
    violations: int
    warnings: int
    findings: tuple[Finding, ...]
    counts: Mapping[str, int] = field(default_factory=dict)


def audit(path: Path, *, full: bool = False) -> tuple[AuditReport, ...]:
    """Audit a file, or every weight file of a folder or shard index.

    Raises:
        UsageError: a file on a server, whose blocks are not fetched to be looked at.
        CheckpointError: no such file, or a folder without weight files.
        UnsupportedContainer: a container without rules.
    """
    if (name := parse_remote(path)) is not None:
        raise UsageError(
            f"{name}: an audit reads blocks all over a file: download it first (diffquant download)"
        )
    return tuple(audit_file(one, full=full) for one in _files(path))


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".gguf"))
        if not found:
            raise CheckpointError("no .safetensors or .gguf in this folder", path=path)
        yield from (one for one in found if one.is_file())
    elif path.name.endswith(_INDEX) and path.is_file():
        yield from _shards(path)
    else:
        yield path


def _shards(path: Path) -> list[Path]:
    """Shards as an index names them, whether they are there or not."""
    weight_map, _ = sharded.read_index(path)
    return [path.with_name(name) for name in sorted(set(weight_map.values()))]


def audit_file(path: Path, *, full: bool = False) -> AuditReport:
    """Audit one file.

    Raises:
        CheckpointError: no such file.
        UnsupportedContainer: a container without rules.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError("not a regular file", path=path)
    file = RandomFile(path)
    try:
        head = file.read(0, min(file.size, _HEAD_NBYTES)).tobytes()
        container = _container(path, head)
        found = _AUDITS[container](file, full)
    finally:
        file.close()
    findings, counts = found
    severities = {one.rule: one.severity for one in findings}
    bad = sum(count for rule, count in counts.items() if severities[rule] == "violation")
    return AuditReport(
        path=str(path),
        container=container,
        full=full,
        rules=0 if "header" in counts else _RULES[container],
        violations=bad,
        warnings=sum(counts.values()) - bad,
        findings=findings,
        counts=counts,
    )


def _container(path: Path, head: bytes) -> str:
    """By content, then by name: a damaged start is a finding, not another container."""
    for name, sniff in (("gguf", gguf.sniff), ("safetensors", safetensors.sniff)):
        if sniff(path, head):
            return name
    name = {".gguf": "gguf", ".safetensors": "safetensors", ".sft": "safetensors"}.get(
        path.suffix.lower(), ""
    )
    if not name:
        raise UnsupportedContainer(_READ_ONLY, path=path)
    return name


def _gguf(file: RandomFile, full: bool) -> Findings:
    try:
        header = read_gguf_header(file)
    except CheckpointError as error:
        return _unreadable(error, "docs/gguf.md, ggml-org/ggml@01f0d4d")
    return run_rules(GGUF_RULES, GgufFile(file, header, full))


def _safetensors(file: RandomFile, full: bool) -> Findings:
    try:
        start, header = safetensors.read_header(file)
    except CheckpointError as error:
        return _unreadable(error, "README.md Format, huggingface/safetensors@24b0b28")
    return run_rules(SAFETENSORS_RULES, SafetensorsFile(file, start, header, full))


def _unreadable(error: CheckpointError, source: str) -> Findings:
    text = str(error).removeprefix(f"{error.path}: ")
    one = Finding("header", "violation", "", "a header that can be read to its end", text, source)
    return (one,), {"header": 1}


_AUDITS: dict[str, Callable[[RandomFile, bool], Findings]] = {
    "gguf": _gguf,
    "safetensors": _safetensors,
}
_RULES = {"gguf": len(GGUF_RULES), "safetensors": len(SAFETENSORS_RULES)}
