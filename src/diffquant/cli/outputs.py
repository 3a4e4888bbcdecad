"""Names of outputs: of one file, of a mix, and of several from a folder or a template."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffquant.convert.allocation_report import AllocationReport
from diffquant.convert.encoders.parts import MMPROJ
from diffquant.convert.output_names import output_name
from diffquant.core.errors import UsageError
from diffquant.io.locations import locate
from diffquant.quant.type_sets import types_of_set
from diffquant.quant.types import QuantType, type_named

__all__ = [
    "PLACE",
    "allocated_name",
    "check_several",
    "default_output",
    "folder_made",
    "named_outputs",
    "stem_of",
    "types_from",
]

PLACE = "{type}"
_CONTAINERS = {".gguf": "gguf", ".safetensors": "safetensors"}


_DEFAULT_SUFFIX = {"gguf": ".gguf", "safetensors": ".safetensors", "folder": ""}


def stem_of(source: Path, parts: tuple[str, ...]) -> str:
    """What an output's name begins with: the source's name, and the part that is written alone."""
    source = locate(source)
    stem = source.stem if source.is_file() else source.name
    if len(parts) == 1 and parts != ("denoiser",):
        stem += "-text_encoder-mmproj" if parts == (MMPROJ,) else f"-{parts[0]}"
    return stem


def default_output(source: Path, kind: QuantType, parts: tuple[str, ...]) -> Path:
    """Name the output as the Hub reads quant labels: stem-PART-TYPE.ext, in the current folder.

    An image tower is named after its language model: ComfyUI-GGUF looks for `mmproj` and the
    encoder's name in one file name (city96/ComfyUI-GGUF@795e451:loader.py:213-284).
    """
    container = next(iter(kind.dialects))
    return Path(f"{stem_of(source, parts)}-{kind.name.upper()}{_DEFAULT_SUFFIX[container]}")


def allocated_name(container: str, report: AllocationReport, label: QuantType) -> str:
    """The label of a mix, with its bits: `4.60bpw-62Q4_K-30Q5_K`, `9.10bpw_fp8_scaled`.

    In GGUF the two largest shares are named in percent, which the Hub reads as the larger one
    (huggingface.js packages/tasks/src/gguf.ts, parseGGUFQuantMix); `Q4_K` alone is no label of its.
    """
    bits = f"{report.bits_per_weight:.2f}bpw"
    if container != "gguf":
        return f"{bits}_{label.name}"
    shares = [(round(share * 100), name) for name, share in report.formats.items()]
    named = [f"{share}{name.upper()}" for share, name in shares[:2] if share]
    return f"{bits}-{'-'.join(named)}" if len(named) > 1 else f"{bits}-{label.name.upper()}"


def types_from(names: Sequence[str], sets: Sequence[str]) -> tuple[QuantType, ...]:
    """The types of -t and --set, in the order given.

    Raises:
        UsageError: a type comes twice.
        UnknownFormat: no such type or set.
    """
    found: dict[str, str] = {}
    kinds = []
    given = [(type_named(name), f"-t {name}") for name in names]
    given += [(kind, f"--set {name}") for name in sets for kind in types_of_set(name)]
    for kind, option in given:
        if kind.name in found:
            where = found[kind.name]
            both = where if where == option else f"{where} and {option}"
            raise UsageError(f"type {kind.name} is asked for twice ({both}); give it once")
        found[kind.name] = option
        kinds.append(kind)
    return tuple(kinds)


def check_several(**single: object) -> None:
    """Refuse what makes sense for one output only.

    Raises:
        UsageError: says which option.
    """
    for name, value in single.items():
        if value:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is for one output: give one type, or run without it")


def named_outputs(output: str | None, stem: str, kinds: Sequence[QuantType]) -> tuple[Path, ...]:
    """A path for each of several types.

    Args:
        output: as given with -o: a folder, or a name with {type}; None is the current folder.
        stem: what names begin with in a folder.
        kinds: the types.

    Raises:
        UsageError: one name for several files.
    """
    if output is not None and PLACE in output:
        upper = _CONTAINERS.get(Path(output).suffix.lower()) == "gguf"
        names = [kind.name.upper() if upper else kind.name for kind in kinds]
        return tuple(Path(output.replace(PLACE, name)) for name in names)
    if output is not None and not _is_folder(output):
        raise UsageError(
            f"{output}: {len(kinds)} types make {len(kinds)} files; give -o a folder (with a slash "
            f"at its end: {Path(output).with_suffix('')}/), or a name with {PLACE} in it"
        )
    folder = Path(output or "")
    return tuple(folder / output_name(stem, kind) for kind in kinds)


def _is_folder(output: str) -> bool:
    """Whether -o names a folder to put files into."""
    return output.endswith(("/", os.sep)) or Path(output).is_dir()


@contextlib.contextmanager
def folder_made(output: str | None, *, dry_run: bool) -> Iterator[None]:
    """Make the folder that -o names with a slash at its end; one that stays empty is removed.

    Raises:
        UsageError: its own folder does not exist.
    """
    folder = Path(output) if output is not None and PLACE not in output else None
    if folder is None or dry_run or folder.exists():
        yield
        return
    if not folder.parent.is_dir():
        raise UsageError(f"{folder}: folder {folder.parent} does not exist, create it first")
    folder.mkdir()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it holds the outputs
            folder.rmdir()
