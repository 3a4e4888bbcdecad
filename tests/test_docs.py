"""What the documents show parses, and what the tables hold is documented."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from diffquant.cli.main import cli
from diffquant.convert.architectures import ARCHITECTURES
from diffquant.io import CONTAINERS
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import TYPES, type_named

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")) if path.is_file()
)
_FENCE = re.compile(r"^( *)```\w*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^(?:    .*\n)+", re.MULTILINE)
_SPAN = re.compile(r"`(diffquant [^`]+)`")
_OPTIONS = re.compile(r"`(--[^`]+)`")
# What was true on its day; commands in them are checked, options alone are not.
_RECORDS = ("CHANGELOG.md", "lab-log.md")
# Other programs' options that the documents speak of.
_ELSEWHERE = {
    "--sweep", "--kernels",  # benchmarks
    "--imat-in", "--imat-out",  # sd.cpp
    "--clip_l", "--clip_g",  # sd.cpp
}  # fmt: skip
_ANCHOR = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)")


def _blocks(text: str) -> list[str]:
    fenced = [found.group(2) for found in _FENCE.finditer(text)]
    return fenced + [found.group(0) for found in _INDENTED.finditer(_FENCE.sub("", text))]


def _lines(path: Path) -> list[str]:
    """Command lines of a document: in blocks, and whole ones between backticks."""
    text = path.read_text(encoding="utf-8")
    joined = "\n".join(_blocks(text)).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    return [line for line in lines if line.startswith("diffquant ")]


COMMANDS = [(path.name, line) for path in DOCUMENTS for line in _lines(path)]
TEXTS = {
    path.name: " ".join(_FENCE.sub("", path.read_text(encoding="utf-8")).split())
    for path in DOCUMENTS
}
SPANS = [(name, span) for name, text in TEXTS.items() for span in _SPAN.findall(text)]
FRAGMENTS = [
    (name, span)
    for name, text in TEXTS.items()
    if name not in _RECORDS
    for span in dict.fromkeys(_OPTIONS.findall(text))
]


def command_named(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, name
    return command


def all_commands(group: click.Group = cli, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command by its name, those of groups as `lora merge`."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None, name
        if isinstance(command, click.Group):
            yield from all_commands(command, f"{name} ")
        else:
            yield prefix + name, command


def options_of(command: click.Command) -> set[str]:
    found = {text for one in command.params for text in (*one.opts, *one.secondary_opts)}
    return {one for one in found if one.startswith("-")} | {"--help", "-h"}


OPTIONS = {name: options_of(command) for name, command in all_commands()}


def parse(line: str) -> tuple[click.Command, dict[str, object]]:
    """Parse a line with click, without running it."""
    words = shlex.split(line, comments=True)[1:]
    command = command_named(words[0])
    if isinstance(command, click.Group):
        found = command.get_command(click.Context(command), words[1])
        assert found is not None, line
        command, words = found, words[1:]
    with command.make_context(words[0], words[1:]) as context:
        return command, dict(context.params)


def test_documents_have_commands() -> None:
    assert {name for name, _ in COMMANDS} >= {"README.md", "formats.md", "architectures.md"}


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_command_lines_parse(name: str, line: str) -> None:
    _, options = parse(line)
    for kind in (options.get("type_name"), *_sequence(options.get("type_names"))):
        if kind:
            type_named(str(kind))
    for value in (options.get("source"), *_sequence(options.get("files"))):
        if value and str(value).startswith("examples/"):
            assert (ROOT / str(value)).exists(), value


def _sequence(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, tuple) else ()


def parse_span(span: str) -> None:
    """Parse what a sentence shows of a command: operands may be left out, options must be right."""
    line = re.sub(r"\.\.\.|[\[\]]", "", span)
    if shlex.split(line)[1].startswith("-"):
        return
    try:
        parse(line)
    except click.BadOptionUsage as error:
        if not line.endswith(error.option_name):  # `diffquant quantize --imatrix` names an option
            raise
    except (click.MissingParameter, click.exceptions.Exit):
        return  # --help, or operands left out, which is told last


@pytest.mark.parametrize(("name", "span"), SPANS)
def test_commands_between_backticks_parse(name: str, span: str) -> None:
    parse_span(span)


@pytest.mark.parametrize(("name", "span"), FRAGMENTS)
def test_options_between_backticks_are_options_of_one_command(name: str, span: str) -> None:
    words = {one.partition("=")[0] for one in span.split() if re.match(r"--?[a-zA-Z]", one)}
    assert words <= _ELSEWHERE or any(words <= known for known in OPTIONS.values()), span


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "completion"])
def test_every_command_is_documented(name: str) -> None:
    shown = [line for file, line in (*COMMANDS, *SPANS) if file not in _RECORDS]
    assert any(f"{line} ".startswith(f"diffquant {name} ") for line in shown)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("diffquant quantize MODEL -o OUT.gguf -t q4_k_s --no-such-option", click.NoSuchOption),
        ("diffquant inspect FILE --size", click.BadOptionUsage),
        ("diffquant verify OUT --against MODEL --level picture", click.BadParameter),
        ("diffquant verify --level picture", click.BadParameter),
        ("diffquant diff A B C", click.UsageError),
        ("diffquant quantise MODEL", AssertionError),
    ],
)
def test_a_wrong_line_would_be_found(line: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse(line)
    if error is not click.BadOptionUsage:
        with pytest.raises(error):
            parse_span(line)


@pytest.mark.parametrize(
    "line", [line for _, line in COMMANDS if shlex.split(line)[1] in ("quantize", "convert")]
)
def test_jobs_on_the_examples_plan(line: str, tmp_path: Path) -> None:
    words = shlex.split(line, comments=True)[1:]
    if not any(word.startswith("examples/") for word in words):
        pytest.skip("not on an example")
    if "--lora" in words:
        pytest.skip("names a LoRA that is not here")
    words = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
    for flag in ("-o", "--output"):
        if flag in words:
            at = words.index(flag) + 1
            folder = "/" if words[at].endswith("/") else ""
            words[at] = str(tmp_path / Path(words[at]).name) + folder
    result = CliRunner().invoke(cli, [*words, "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*FORMATS, *TYPES, *CONTAINERS])
def test_every_format_type_and_container_is_documented(name: str) -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| `{re.escape(name)}` \|", text, re.MULTILINE)


@pytest.mark.parametrize("row", FORMATS.values(), ids=lambda row: row.name)
def test_documented_bits_and_errors_are_the_rows(row) -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    section = text.split("## Number formats")[1].split("## ")[0]
    cells = next(line for line in section.splitlines() if line.startswith(f"| `{row.name}` |"))
    _, _, bits, _, error, _, _ = (cell.strip() for cell in cells.split("|"))
    assert float(bits) == row.bits
    if not row.encodes:
        assert error == "read only"
        return
    assert float(error) == pytest.approx(row.gaussian_error, rel=0.03)  # two digits are shown


@pytest.mark.parametrize("slug", ARCHITECTURES)
def test_every_architecture_is_documented(slug: str) -> None:
    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| `{slug}` |"))
    architecture = ARCHITECTURES[slug]
    variants = {one.name for one in architecture.variants} - {""}
    variants |= {name for _, name in architecture.pipelines.values()}
    assert variants <= set(re.findall(r"[\w.]+", row))
    assert f"`{architecture.gguf_architecture}`" in row
    for one in (*architecture.keep, *architecture.tuned_keep):
        assert f"`{one.pattern}`" in text.replace("\\|", "|")
    for family in (*architecture.families, *architecture.tuned_families):
        assert f"`{family.pattern}`" in text.replace("\\|", "|")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in _ANCHOR.findall(path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file = path.parent / target if target else path
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{target}#{anchor}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_documents_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for named in re.findall(r"`((?:src|tests|benchmarks|scripts|docs)/[\w./]+\w)`", text):
        assert (ROOT / named).exists(), named
    rooms = "core|io|quant|convert|inspect|runtime|publish|cli"
    for named in re.findall(rf"`((?:{rooms})/[\w./]+\.py)`", text):
        assert (ROOT / "src" / "diffquant" / named).exists(), named
