"""render_card(): the README.md of a release, front matter and all, the same bytes every time.

Every string in it may be hostile (publish/markdown.py): the template's output is escaped by
default, and only what this module made itself passes as it is. The last line is a comment with the
hash of what stands above it: so a later run can tell our own card from one that somebody has since
edited, and never writes over the latter unasked.

Front matter: huggingface/hub-docs modelcard.md; `base_model_relation` is stated, since the Hub
takes safetensors files for a fine-tune.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from diffquant import __version__
from diffquant.convert.request import POLICIES, ROUNDINGS
from diffquant.convert.targets import TARGETS
from diffquant.publish.facts import FileFacts, Kept
from diffquant.publish.loading import loading_of
from diffquant.publish.markdown import cell_code, code, fenced, prose, text
from diffquant.publish.measured import MeasuredRow, cell
from diffquant.publish.memory import cards, memory_cell, memory_notes
from diffquant.publish.names import base_name
from diffquant.publish.release import Published, Release
from diffquant.publish.rows import size_text
from diffquant.publish.samples import GRID_NAME
from diffquant.publish.tasks import library_name, pipeline_tag, tags_of
from diffquant.runtime.comparison import METRICS

__all__ = ["is_own_card", "render_card"]

_MARK = re.compile(r"<!-- diffquant card [0-9A-Za-z.+-]{1,40} sha256:([0-9a-f]{64}) -->\n?\Z")
_WIDGETS = 8
# Option of quantize -> values that it has by itself, values there are.
_OPTIONS = (
    ("target", ("universal", "comfyui"), tuple(TARGETS)),
    ("policy", POLICIES[:1], POLICIES),
    ("rounding", ROUNDINGS[:1], ROUNDINGS),
)
# Options that a header states as they were typed -> how many words each takes.
_STATED = {
    "--all": 1, "--pure": 1, "--part": 2, "--exclude": 2, "--tensor-type": 2, "--recipe-from": 2,
}  # fmt: skip
_ALLOCATION = re.compile(  # convert/allocation.py, as `diffquant.allocation` has it
    r"(?P<option>--max-size|--bpw|--vram) (?P<value>[0-9.]{1,24} ?[A-Za-z]{0,3})"
    r"(?P<free>; with --free-kept)?; among: (?P<among>[a-z0-9_]+(?:, [a-z0-9_]+)*)"
    r"; sensitivity: (?P<method>weights|outputs) of (?:[0-9a-f]{16}|unknown)"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of the file table; cells are ready."""

    name: Markup
    label: Markup
    bits: str
    size: str
    memory: str
    metrics: tuple[str, ...]
    use: str


def render_card(release: Release, license_link: str = "") -> str:
    """Write the card.

    Args:
        release: what is published.
        license_link: of the front matter, where the license's text is a file of the repository.
    """
    environment = Environment(
        loader=PackageLoader("diffquant.publish"),
        autoescape=False,
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(code=code, cell_code=cell_code, fenced=fenced, prose=prose)
    facts = [one.facts for one in release.files]
    metrics = _metric_columns(release)
    body = environment.get_template("card.md.jinja").render(
        release=release,
        license_link=license_link or release.license.link,
        is_url="://" in (license_link or release.license.link),
        front=Markup(_front(release, license_link)),
        bases=[(repo, Markup(f"https://huggingface.co/{repo}")) for repo in release.base_models],
        what=_what(facts),
        metrics=[METRICS[key].title for key in metrics],
        metrics_arrows=[
            (METRICS[key].title, "higher" if METRICS[key].better == "up" else "lower")
            for key in metrics
        ],
        rows=[_row(one, release, metrics) for one in release.files],
        others=_other_rows(release, metrics),
        fit_notes=memory_notes(facts),
        kept=_kept(release.files),
        loads=loading_of(release.files),
        commands=[_command(one) for one in release.files],
        hashes=[(one.place, one.facts.sha256) for one in release.files],
        unmeasured=_unmeasured(release),
        gguf=any(
            one.report.container == "gguf" and one.report.kind in ("checkpoint", "diffusion_model")
            for one in facts
        ),
        grid=next((one for one in release.samples if one.name == GRID_NAME), None),
        samples=[one for one in release.samples if one.name != GRID_NAME],
        version=__version__,
        merged=[
            (one.place, one.facts.mark("merged"))
            for one in release.files
            if one.facts.mark("merged")
        ],
        mixed=[
            one.name.name for one in release.files if one.facts.type and one.facts.mark("mixed")
        ],
    )
    body = re.sub(r"\n{3,}", "\n\n", body).rstrip("\n") + "\n"
    return f"{body}\n<!-- diffquant card {__version__} sha256:{_digest(body)} -->\n"


def is_own_card(card: str) -> bool:
    """Whether a card is one that render_card wrote, and nobody has edited since."""
    card = card.replace("\r\n", "\n")
    found = _MARK.search(card)
    if found is None:
        return False
    return _digest(card[: found.start()].removesuffix("\n")) == found[1]


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode("utf-8", "replace")).hexdigest()


def _escaped(value: object) -> Markup:
    return value if isinstance(value, Markup) else text(value)


def _front(release: Release, license_link: str) -> str:
    """The YAML block, without its fences."""
    from huggingface_hub import ModelCardData

    facts = [one.facts for one in release.files]
    tasks = Counter(filter(None, map(pipeline_tag, facts)))
    known = release.license
    extra: dict[str, Any] = {
        "base_model_relation": _relation(facts) if release.base_models else None,
        "license_link": license_link or known.link or None,
        "quantized_by": release.request.quantized_by or None,
        "widget": [
            {"text": one.prompt, "output": {"url": one.name}}
            for one in release.samples
            if one.prompt
        ][:_WIDGETS]
        or None,
    }
    data = ModelCardData(
        base_model=list(release.base_models) or None,
        language=list(release.request.language) or None,
        library_name=library_name(facts) or None,
        license=known.id,
        license_name=known.name or None,
        pipeline_tag=tasks.most_common(1)[0][0] if tasks else None,
        tags=list(tags_of(facts)),
        **{key: value for key, value in extra.items() if value is not None},
    )
    return str(data.to_yaml()).strip("\n")


def _relation(facts: Sequence[FileFacts]) -> str | None:
    if any(one.is_quantized for one in facts):
        return "quantized"
    return "adapter" if all(one.report.kind == "lora" for one in facts) else None


def _what(facts: Sequence[FileFacts]) -> str:
    """What the files are, by name: Flux.1 dev."""
    names = dict.fromkeys(
        " ".join((one.report.title, one.report.variant)).strip()
        for one in facts
        if one.report.title
    )
    return " and ".join(names) or "A model that is not recognised here"


def _metric_columns(release: Release) -> tuple[str, ...]:
    """Metrics with a value for one of the files."""
    measured = release.measured
    if measured is None:
        return ()
    rows = [row for row in measured.rows if row.kind == "candidate"]
    return tuple(key for key in measured.metrics if any(key in row.values for row in rows))


def _row(one: Published, release: Release, metrics: Sequence[str]) -> _Row:
    facts = one.facts
    row = release.measured.row(facts.path) if release.measured else None
    link = quote(one.place)
    return _Row(
        name=Markup(f"[{cell_code(one.place)}](./{link})"),
        label=cell_code(one.name.label or facts.type or facts.largest),
        bits=f"{facts.bits_per_weight:.2f}" if facts.bits_per_weight else "-",
        size=_size(facts.nbytes),
        memory=memory_cell(facts.fit, [other.facts.fit for other in release.files]),
        metrics=tuple(cell(row, key) for key in metrics),
        use=_use(one, release),
    )


def _other_rows(release: Release, metrics: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """The floor and the control: what the numbers are worth."""
    if release.measured is None:
        return []
    named: Mapping[str, MeasuredRow | None] = {
        "noise floor: the original against itself in bfloat16": release.measured.named("floor"),
        "control: a damaged file, which must be far off": release.measured.named("control"),
    }
    return [(name, tuple(cell(row, key) for key in metrics)) for name, row in named.items() if row]


def _size(nbytes: int) -> str:
    """As the Hub counts, and as disks do."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB ({size_text(nbytes)})"
    return f"{nbytes / 1e6:.1f} MB ({size_text(nbytes)})"


def _use(one: Published, release: Release) -> str:
    """When to take this file: the card it fits on, and its place among the others."""
    told = []
    bits = [
        other.facts.bits_per_weight
        for other in release.files
        if other.facts.is_quantized and other.facts.part == one.facts.part
    ]
    if len(bits) > 1 and one.facts.is_quantized:
        names = {min(bits): "fewest bits", max(bits): "most bits"}
        told += [name for value, name in names.items() if value == one.facts.bits_per_weight]
    told += cards(one.facts.fit)
    return ", ".join(told) or "-"


def _kept(files: Sequence[Published]) -> list[tuple[str, tuple[Kept, ...]]]:
    """Files that keep the same weights share an entry."""
    found: dict[tuple[Kept, ...], list[str]] = {}
    for one in files:
        if one.facts.kept:
            found.setdefault(one.facts.kept, []).append(one.name.name)
    return [(", ".join(names), kept) for kept, names in found.items()]


def _command(one: Published) -> tuple[str, str]:
    """The command that the header tells of, and what it does not tell."""
    facts = one.facts
    name = base_name(facts.mark("source.name"))
    if not facts.mark("type") or not name:
        return one.place, ""
    output = PurePosixPath(one.place).name
    words = ["diffquant", "quantize", _argument(name), "-o", _argument(output)]
    formats = _formats(facts.mark("type"), facts.mark("allocation"))
    if not formats:
        return one.place, ""
    words += formats
    for option, usual, known in _OPTIONS:
        value = facts.mark(option)
        if value in known and value not in usual:
            words += [f"--{option}", value]
    if matrix := facts.header.get("quantize.imatrix.file"):
        words += ["--imatrix", matrix]
    if inputs := facts.mark("rounding.inputs"):
        words += ["--inputs", inputs]
    if facts.mark("bias_correction"):
        words.append("--bias-correction")
    words += _stated_options(facts.mark("options"))
    if any(_CONTROL.search(word) for word in words):
        return one.place, ""  # no command of ours: a header that somebody else wrote
    return one.place, shlex.join(words)


def _formats(kind: str, allocation: str) -> list[str]:
    """What chose a file's formats: its type, or the budget it was made under."""
    if not allocation:
        return ["-t", kind]
    found = _ALLOCATION.fullmatch(allocation)
    if found is None:
        return []
    words = [found["option"], found["value"]]
    words += ["--free-kept"] if found["free"] else []
    words += ["--among", found["among"].replace(" ", "")]
    # The header says that pictures were measured, and not what the file was called.
    return words + (["--sensitivity", "FILE"] if found["method"] == "outputs" else [])


def _argument(text: str) -> str:
    """A name that no program takes for an option."""
    return f"./{text}" if text.startswith("-") else text


def _stated_options(text: str) -> list[str]:
    """Options of a header, word by word: those that quantize writes there, or none.

    A header is anybody's text, and the card shows commands that people paste.
    """
    try:
        words = shlex.split(text)
    except ValueError:
        return []
    found, at = [], 0
    while at < len(words):
        count = _STATED.get(words[at], 0)
        if not count or at + count > len(words):
            return []
        found += words[at : at + count]
        at += count
    return found


def _unmeasured(release: Release) -> list[str]:
    """Files whose pictures nobody compared."""
    measured = release.measured
    return [
        one.name.name
        for one in release.files
        if measured is None or measured.row(one.facts.path) is None
    ]
