"""encoder_header(): the key-value pairs of a text encoder's GGUF file.

Values come from config.json, from shapes, from `--base`, else from the kind's published model, and
then the plan says so. The tokenizer is looked for in the source, in `--base`, and inside the
tensors (`spiece_model`, as ComfyUI's own T5 files carry it).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffquant.convert.detect import PartMatch, flat_config
from diffquant.convert.encoders.files import ENCODER_FILES, EncoderFile, Field
from diffquant.convert.encoders.tokenizer import tokenizer_pairs
from diffquant.convert.output import configs_of
from diffquant.core.errors import PolicyError, shorten
from diffquant.core.tensors import TensorSource
from diffquant.io.gguf_values import GgufValue

__all__ = ["EncoderHeader", "encoder_header"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_EMBEDDED = "spiece_model"
_MAX_EMBEDDED_NBYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class EncoderHeader:
    """Pairs in file order, and what the user should know about them."""

    pairs: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def encoder_header(
    part: PartMatch, source: TensorSource, base: TensorSource | None = None
) -> EncoderHeader:
    """Pairs of one encoder's file, `general.*` aside.

    Raises:
        PolicyError: a value that readers need and that nothing states.
        MalformedFile: a tokenizer that is none, or that does not fit the embedding.
    """
    row = ENCODER_FILES[part.kind]
    known = _known(part, row, source, base)
    pairs = _from_gguf(row, source)
    has_tokenizer = any(key.startswith("tokenizer.") for key in pairs)
    lacking: list[str] = []
    for field in row.fields:
        key = row.architecture + field.key if field.key.startswith(".") else field.key
        value = pairs.get(key) or _value(field, known)
        if value is None:
            lacking += [key] if field.needed else []
        else:
            pairs[key] = value
    if lacking:
        raise PolicyError(
            f"{part.name}: neither tensors nor a config.json say {shorten(lacking)}, which readers "
            "need: give a folder that has its config.json with --base"
        )
    warnings = []
    if known.guessed:
        listed = ", ".join(f"{name} {value}" for name, value in sorted(known.guessed.items()))
        warnings.append(
            f"{part.name}: not stated by the source, taken from the published model: {listed}; a "
            "folder with another config.json can be given with --base"
        )
    if row.tokenizer and not has_tokenizer:
        found, lost = _tokenizer(part, row, source, base, known.values)
        pairs |= found
        warnings += lost
    return EncoderHeader(pairs, tuple(warnings))


def _from_gguf(row: EncoderFile, source: TensorSource) -> dict[str, Any]:
    """Header and tokenizer of a source that is such a file already: every pair as it stands."""
    if source.metadata.get("general.architecture") != row.architecture:
        return {}
    typed: Mapping[str, Any] = getattr(source, "typed_metadata", {})
    return {
        key: value
        for key, value in typed.items()
        if key.startswith((f"{row.architecture}.", "tokenizer."))
    }


class _Known:
    """Looks config.json fields up, and remembers which were only a default."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.values = values
        self._defaults = defaults
        self.guessed: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:  # noqa: ANN401 - config.json fields
        if self.values.get(name) is not None:
            return self.values[name]
        if name in self._defaults:
            self.guessed[name] = self._defaults[name]
        return self._defaults.get(name)


def _known(
    part: PartMatch, row: EncoderFile, source: TensorSource, base: TensorSource | None
) -> _Known:
    """What is known of a part; of `base`, only what the source leaves to a default."""
    own = {name: one for name, one in part.hyper.items() if one.origin != "default"}
    values = {name: one.value for name, one in own.items()}
    told = any(one.origin != "shape" for one in own.values())
    if base is not None and not told:
        values = {**_base_config(row, base), **values}
    if row.type == "mmproj":
        values |= _picture(source)
    defaults = {**row.defaults, **row.implied(part.shapes)}
    defaults.update((k, v.value) for k, v in part.hyper.items() if v.origin == "default")
    return _Known(values, defaults)


def _base_config(row: EncoderFile, base: TensorSource) -> dict[str, Any]:
    """The config of the same kind of model in another folder."""
    wanted = row.defaults["model_type"]
    for path, config in configs_of(base).items():
        if not path.endswith("config.json") or not isinstance(config, Mapping):
            continue
        if config.get("model_type") == wanted:
            found = config.get("vision_config") if row.type == "mmproj" else flat_config(config)
            return dict(found) if isinstance(found, Mapping) else {}
    return {}


def _picture(source: TensorSource) -> dict[str, Any]:
    """Mean and deviation of pixels, where the folder has its preprocessor."""
    for path, config in configs_of(source).items():
        if path.endswith("preprocessor_config.json") and isinstance(config, Mapping):
            return {name: config.get(name) for name in ("image_mean", "image_std")}
    return {}


def _value(field: Field, known: _Known) -> Any:  # noqa: ANN401 - typed by the row
    value = known(field.value) if isinstance(field.value, str) else field.value(known)
    if value is None:
        return None
    items = value if isinstance(value, list | tuple) else (value,)
    if not all(_fits(field.type, one) for one in items):
        raise PolicyError(f"{field.key}: expected {field.type}, the config says {value!r:.80}")
    return GgufValue(field.type, list(items) if isinstance(value, list | tuple) else value)


def _fits(name: str, value: object) -> bool:
    if name == "bool":
        return isinstance(value, bool)
    if name == "str":
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if name == "f32":
        return math.isfinite(value)
    low, high = (0, 2**32) if name == "u32" else (-(2**31), 2**31)
    return isinstance(value, int) and low <= value < high


def _tokenizer(
    part: PartMatch,
    row: EncoderFile,
    source: TensorSource,
    base: TensorSource | None,
    config: Mapping[str, Any],
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Pairs of the first tokenizer of the right kind, the part's own folder first."""
    rows = config.get("vocab_size")
    if not isinstance(rows, int):
        return {}, (f"{part.name}: no token embedding, and no tokenizer without one",)
    own = part.name.replace("text_encoder", "tokenizer")
    for one in (source, base):
        if one is None:
            continue
        for files in _folders(one, own):
            pairs, lost = tokenizer_pairs(row.tokenizer, files, rows, config)
            if pairs:
                return pairs, lost
    embedded = source.specs.get(part.prefix + _EMBEDDED)
    if embedded is not None and embedded.dtype == "U8":
        if embedded.nbytes > _MAX_EMBEDDED_NBYTES:
            return {}, (f"{embedded.key}: {embedded.nbytes} bytes are no tokenizer: not read",)
        files = {"spiece.model": source.read(embedded.key).tobytes()}
        pairs, lost = tokenizer_pairs(row.tokenizer, files, rows, config)
        if pairs:
            return pairs, lost
    return {}, (
        f"{part.name}: no tokenizer in the source: the file has no tokenizer.ggml keys (loaders of "
        "diffusion models bring their own, llama.cpp needs them); give a folder with --base",
    )


def _folders(source: TensorSource, own: str) -> list[dict[str, bytes]]:
    """Tokenizer files by folder: the part's own, other tokenizers, then beside the tensors."""
    names = tuple(getattr(source, "files", ()))
    read = getattr(source, "read_file", None)
    if read is None:
        return []
    every = [name for name in names if name.rpartition("/")[2] in _TOKENIZER_FILES]
    folders = {name.rpartition("/")[0] for name in every}
    ordered = sorted(folders, key=lambda folder: (folder != own, folder == "", folder))
    found = []
    for folder in ordered:
        prefix = f"{folder}/" if folder else ""
        files = {
            name.rpartition("/")[2]: read(name)
            for name in every
            if name.rpartition("/")[0] == folder
        }
        config = source.configs.get(f"{prefix}tokenizer_config.json")
        if config is not None:  # a folder's source keeps it among its configs
            files["tokenizer_config.json"] = json.dumps(config).encode()
        found.append(files)
    return found
