"""How much each tensor's rounding costs the pictures, by format: what bits are allocated by.

A file of a few hundred kilobytes, made once (`diffquant calibrate --sensitivity FILE`) and good for
any budget, so that asking for 6 GB and then for 5 GB measures nothing twice::

    {"diffquant_sensitivity": 1, "architecture": "flux1", "method": "outputs", "source": "<sha256>",
     "unit": "...", "context": {"steps": "4", ...},
     "errors": {"double_blocks.0.img_attn.qkv.weight": {"q4_k": 1.2e-5, ...}, ...}}

`errors` are additive: their sum over all tensors, each in its chosen format, predicts the error of
the whole model in `unit`. Keys are canonical and local to the denoiser.

A file is found again by the fingerprint of its source: beside a model, or in the user's cache
folder. convert/sensitivity_weights.py makes one without running the model.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffquant.convert.remember import cache_folder
from diffquant.core.errors import DiffquantError, MalformedFile
from diffquant.io.atomic import partial_path
from diffquant.io.safetensors import parse_json

__all__ = [
    "MAX_SENSITIVITY_NBYTES",
    "SENSITIVITY_VERSION",
    "Sensitivity",
    "cache_path",
    "find_sensitivity",
    "keep_sensitivity",
    "read_sensitivity",
    "write_sensitivity",
]

_log = logging.getLogger(__name__)
SENSITIVITY_VERSION = 1
MAX_SENSITIVITY_NBYTES = 64 << 20
_LARGEST_ERROR = 1e30  # of a tensor: no picture is that wrong, and sums of these stay finite
_MAGIC = "diffquant_sensitivity"
_METHODS = ("outputs", "weights")
_TEXTS = ("architecture", "method", "unit", "source")
_FIELDS = {_MAGIC, *_TEXTS, "errors", "context"}
_FINGERPRINT = re.compile(r"[0-9a-f]{64}|")
_NAME = re.compile(r"[a-z0-9_]{1,64}")
_ENDING = ".sensitivity.json"


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Predicted error per tensor and format.

    Attributes:
        architecture: slug.
        method: "outputs" (measured on running the model) or "weights" (from weights, and importance
            where there is some).
        unit: what the sum of errors predicts, in words.
        source: fingerprint of the checkpoint it was measured on, "" where unknown.
        errors: canonical part-local key -> format -> predicted error, finite and not negative.
        context: how it was measured: prompts, steps, seed and the like, for reports.
    """

    architecture: str
    method: str
    unit: str
    source: str
    errors: Mapping[str, Mapping[str, float]]
    context: Mapping[str, str]


def read_sensitivity(path: Path) -> Sensitivity:
    """Read a file; everything in it is checked.

    Raises:
        MalformedFile: it is too large, not such a file, or holds what no measurement gives.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_SENSITIVITY_NBYTES + 1)
    if len(raw) > MAX_SENSITIVITY_NBYTES:
        raise MalformedFile(
            f"more than {MAX_SENSITIVITY_NBYTES} bytes, which no sensitivity file has", path=path
        )
    found = parse_json(raw, path, "sensitivity")
    version = found.get(_MAGIC)
    if version is None:
        raise MalformedFile(
            f"no sensitivity file: {_MAGIC!r} is not in it; `diffquant calibrate --sensitivity "
            "FILE` makes one",
            path=path,
        )
    if type(version) is not int or version != SENSITIVITY_VERSION:
        raise MalformedFile(
            f"sensitivity version {version!r:.20}, only {SENSITIVITY_VERSION} is read here",
            path=path,
        )
    if strange := found.keys() - _FIELDS:
        raise MalformedFile(f"unknown field {min(strange)!r:.60}", path=path)
    texts = {name: found.get(name, "") for name in _TEXTS}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise MalformedFile(f"{name} is {value!r:.40}, expected text", path=path)
    if texts["method"] not in _METHODS:
        raise MalformedFile(
            f"method {texts['method']!r:.40}, expected one of {', '.join(_METHODS)}", path=path
        )
    if not _FINGERPRINT.fullmatch(texts["source"]):
        raise MalformedFile(
            f"source {texts['source']!r:.80}, expected a sha256 or nothing", path=path
        )
    context = found.get("context", {})
    if not isinstance(context, dict) or not all(isinstance(x, str) for x in context.values()):
        raise MalformedFile("context is not an object of texts", path=path)
    return Sensitivity(**texts, errors=_checked_errors(found.get("errors"), path), context=context)


def _checked_errors(found: object, path: Path) -> dict[str, dict[str, float]]:
    if not isinstance(found, dict) or not found:
        raise MalformedFile("errors is not an object with a tensor in it", path=path)
    errors: dict[str, dict[str, float]] = {}
    for key, formats in found.items():
        if not isinstance(formats, dict) or not formats:
            raise MalformedFile(f"errors of {key!r:.80} are no object of formats", path=path)
        for name, value in formats.items():
            if not _NAME.fullmatch(name):
                raise MalformedFile(f"{name!r:.40} of {key!r:.80} names no format", path=path)
            if not _is_error(value):
                raise MalformedFile(
                    f"error of {key!r:.80} as {name} is {value!r:.40}, expected a finite number "
                    "from 0",
                    path=path,
                )
        errors[key] = {name: float(value) for name, value in formats.items()}
    return errors


def _is_error(value: object) -> bool:
    if type(value) is int:
        return 0 <= value < 2**53
    return type(value) is float and 0 <= value <= _LARGEST_ERROR


def write_sensitivity(path: Path, sensitivity: Sensitivity) -> None:
    """Write a file that exists only when it is whole; the same data give the same bytes.

    Raises:
        ValueError: an error that is not finite, which JSON has no number for.
        OSError: it cannot be written.
    """
    data = {
        _MAGIC: SENSITIVITY_VERSION,
        **{name: getattr(sensitivity, name) for name in _TEXTS},
        "context": dict(sensitivity.context),
        "errors": {
            key: {name: float(value) for name, value in formats.items()}
            for key, formats in sensitivity.errors.items()
        },
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    beside = partial_path(path)
    try:
        beside.write_text(text + "\n", encoding="utf-8", newline="\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def cache_path(fingerprint: str) -> Path:
    """Where the sensitivity of a source is kept in the user's cache folder."""
    return cache_folder() / "sensitivity" / f"{fingerprint}.json"


def keep_sensitivity(sensitivity: Sensitivity) -> bool:
    """Keep what was measured in the cache, where `quantize` finds it by the source's fingerprint.

    A convenience, as sources.json is: a cache that cannot be written is said in the log.

    What is there stays where it knows formats that this does not.

    Returns:
        Whether it is there.
    """
    if not sensitivity.source:
        return False
    path = cache_path(sensitivity.source)
    try:
        known = read_sensitivity(path)
    except (DiffquantError, OSError):
        known = None
    if known is not None and _prices(known) - _prices(sensitivity):
        _log.info("%s knows more formats, and stays", path)
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_sensitivity(path, sensitivity)
    except OSError as error:
        _log.info("cannot keep what was measured: %s", error)
        return False
    return True


def _prices(sensitivity: Sensitivity) -> set[str]:
    return {name for formats in sensitivity.errors.values() for name in formats}


def find_sensitivity(source: Path, fingerprint: str) -> tuple[Path, Sensitivity] | str:
    """The file that was measured on a source, beside it or in the cache folder.

    Beside `model.safetensors` that is `model.sensitivity.json`, beside a folder `folder` it is
    `folder.sensitivity.json`, or `sensitivity.json` in it.

    Returns:
        Path and content; else why none is used, "" where there is none.
    """
    refused = ""
    source = Path(os.path.abspath(source))  # noqa: PTH100 - "." has no name; a link keeps its own
    for path in _places(source, fingerprint):
        if not path.is_file():
            continue
        try:
            found = read_sensitivity(path)
        except (DiffquantError, OSError) as error:
            refused = refused or f"{path.name} is not used: {error}"
            continue
        if found.source == fingerprint:
            return path, found
        refused = refused or f"{path.name} is not used: it was measured on another checkpoint"
    return refused


def _places(source: Path, fingerprint: str) -> Iterator[Path]:
    if source.is_dir():
        yield source / _ENDING.removeprefix(".")
        yield source.with_name(source.name + _ENDING)
    else:
        yield source.with_name(source.stem + _ENDING)
    yield cache_path(fingerprint)
