"""What an SDNQ folder's config says of each weight: dtype, rotation, orientation.

`quantization_config.json` beside the weights, else `quantization_config` in `config.json`; fields
of the whole component, overridden by `modules_quant_config` and `modules_dtype_dict` for names that
match. Source: sdnq 0.2.8 utils.py check_param_name_in, get_minimum_dtype, get_quant_kwargs,
loader.py load_sdnq_model (rules as facts; this is another program).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.core.errors import MalformedFile

__all__ = ["SdnqConfig", "SdnqLayer", "names_match", "read_sdnq_config"]

_ALIASES = {"int1": "uint1", "bool": "uint1", "fp8": "float8_e4m3fn"}
_BITS = re.compile(r"(?:minimum[-_]?)?(u?)(?:int)?(\d{1,2})[-_]?(?:bits?)?")
_FLAGS = ("use_codebook", "use_hadamard", "use_quantized_matmul", "use_quantized_matmul_conv")
_TEXTS = ("weights_dtype", "scale_dtype", "zero_point_dtype", "quantized_matmul_dtype")
_UNREADABLE = re.compile(r"[\\\[\](){}+?|^$]")  # a regular expression beyond `*`
_MAX_GROUP = 1 << 16


@dataclass(frozen=True, slots=True)
class SdnqLayer:
    """What holds for one weight.

    Attributes:
        dtype: how its numbers are stored: uint1 ... uint8, int2 ... int8, float8_e4m3fn, or one
            that is not read.
        hadamard: largest group that was rotated, 0 for none.
        matmul: whether it is laid out for a quantized matrix product.
        conv_matmul: the same for convolutions.
        packs: what else was done to it that is not read, or "".
    """

    dtype: str
    hadamard: int
    matmul: bool
    conv_matmul: bool
    packs: str


@dataclass(frozen=True, slots=True)
class SdnqConfig:
    """A component's config, checked.

    Attributes:
        fields: of the whole component.
        dtypes: dtype or minimum -> names.
        layers: name -> fields that override.
        no_matmul: names that are not laid out for a quantized matrix product.
    """

    fields: Mapping[str, Any]
    dtypes: Mapping[str, tuple[str, ...]]
    layers: Mapping[str, Mapping[str, Any]]
    no_matmul: tuple[str, ...]

    def layer(self, name: str) -> SdnqLayer:
        """What holds for the weight of that name inside its component."""
        said = dict(self.fields)
        own = next((key for key in self.layers if names_match(name, (key,))), None)
        if own is not None:
            said |= self.layers[own]
        dtype = _least(said.get("weights_dtype", "int8"), name, self.dtypes)
        product = not names_match(name, self.no_matmul)
        packs = [
            f"{field} {said[field]}"
            for field in ("scale_dtype", "zero_point_dtype")
            if said.get(field) not in (None, "none")
        ]
        packs += ["use_codebook"] if said.get("use_codebook") else []
        return SdnqLayer(
            dtype=dtype,
            hadamard=said.get("hadamard_group_size", 256) if said.get("use_hadamard") else 0,
            matmul=bool(said.get("use_quantized_matmul")) and product,
            conv_matmul=bool(said.get("use_quantized_matmul_conv")) and product,
            packs=" and ".join(packs),
        )


def read_sdnq_config(configs: Mapping[str, Any], prefix: str, path: Path) -> SdnqConfig | None:
    """The config of the component `prefix` ("transformer/", or "" for a bare one), if it has one.

    Raises:
        MalformedFile: a field is not what it should be.
    """
    found = configs.get(f"{prefix}quantization_config.json")
    if found is None:
        config = configs.get(f"{prefix}config.json")
        found = config.get("quantization_config") if isinstance(config, Mapping) else None
    if not isinstance(found, Mapping) or found.get("quant_method") != "sdnq":
        return None
    where = f"{prefix}quantization_config"
    fields = _fields(found, where, path)
    layers = _objects(found.get("modules_quant_config"), where, path)
    dtypes = _object(found.get("modules_dtype_dict"), f"{where}: modules_dtype_dict", path)
    return SdnqConfig(
        fields,
        {key: _names(value, f"{where}: {key}", path) for key, value in dtypes.items()},
        layers,
        _names(found.get("modules_to_not_use_matmul"), f"{where}: no matmul", path),
    )


def names_match(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern means the weight: the whole name, one step of it, or `*` for any run.

    A leading dot asks for the beginning. `.*` is a dot and any run, any other dot any character.
    Linear in the length of the name, whatever the pattern: configs are hostile.
    """
    steps = name.split(".")
    return any(_matches(name, steps, pattern) for pattern in patterns)


def _matches(name: str, steps: list[str], pattern: str) -> bool:
    if pattern.startswith("."):
        return name.startswith(pattern[1:])
    if name == pattern or pattern in steps:
        return True
    return "*" in pattern and _begins(name, pattern)


def _begins(name: str, pattern: str) -> bool:
    """Match from the beginning; each piece between stars at its first place is enough."""
    pieces = pattern.split("*")
    at = 0
    for index, piece in enumerate(pieces):
        literal_dot = index < len(pieces) - 1 and piece.endswith(".")
        while not _fits(name, at, piece, literal_dot=literal_dot):
            at += 1
            if not index or at + len(piece) > len(name):
                return False
        at += len(piece)
    return True


def _fits(name: str, at: int, piece: str, *, literal_dot: bool) -> bool:
    part = name[at : at + len(piece)]
    if len(part) < len(piece) or (literal_dot and not part.endswith(".")):
        return False
    return all(wanted in (found, ".") for wanted, found in zip(piece, part, strict=True))


def _least(dtype: str, name: str, dtypes: Mapping[str, tuple[str, ...]]) -> str:
    """The dtype of a weight: the component's, one named for it, or a minimum of bits."""
    for key, names in dtypes.items():
        if not names_match(name, names):
            continue
        lower = key.lower()
        if not lower.startswith("minimum") and not lower.endswith(("bit", "bits")):
            return _ALIASES.get(lower, lower)
        bits = _BITS.fullmatch(lower)
        own = re.fullmatch(r"\D*([0-9]{1,4})(_.*)?", dtype)
        if bits is None or own is None:
            return key  # no dtype: refused by this name
        if int(own[1]) < int(bits[2]):
            return f"uint{bits[2]}" if bits[1] or int(bits[2]) <= 4 else f"int{bits[2]}"
    return _ALIASES.get(dtype, dtype)


def _fields(found: Mapping[str, Any], where: str, path: Path) -> dict[str, Any]:
    """The fields that are read, each of its type."""
    out: dict[str, Any] = {}
    for name in (*_FLAGS, *_TEXTS, "hadamard_group_size"):
        value = found.get(name)
        if value is None:
            continue
        kind = bool if name in _FLAGS else str if name in _TEXTS else int
        if type(value) is not kind:
            raise MalformedFile(
                f"{where}: expected {kind.__name__} for {name}, found {value!r:.40}", path=path
            )
        out[name] = value
    size = out.get("hadamard_group_size", 256)
    if not 0 < size <= _MAX_GROUP:
        raise MalformedFile(f"{where}: hadamard_group_size is {size}", path=path)
    return out


def _objects(value: Any, where: str, path: Path) -> dict[str, Mapping[str, Any]]:  # noqa: ANN401
    found = _object(value, f"{where}: modules_quant_config", path)
    _names(list(found), f"{where}: modules_quant_config", path)
    return {
        key: _fields(_object(one, f"{where}: {key}", path), f"{where}: {key}", path)
        for key, one in found.items()
    }


def _object(value: Any, where: str, path: Path) -> Mapping[str, Any]:  # noqa: ANN401
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise MalformedFile(f"{where}: expected an object, found {value!r:.40}", path=path)
    return value


def _names(value: Any, where: str, path: Path) -> tuple[str, ...]:  # noqa: ANN401
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise MalformedFile(f"{where}: expected a list of names, found {value!r:.40}", path=path)
    for one in names:
        if "*" in one and _UNREADABLE.search(one):
            raise MalformedFile(
                f"{where}: {one!r:.80} is a regular expression; names with * alone are read",
                path=path,
            )
    return tuple(names)
