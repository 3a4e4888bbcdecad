"""Hyperparameters: what shapes say, what a config.json says, what an architecture defaults to.

Each names where it was found. Shapes are right about what they say; a config that contradicts them
is a warning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from diffquant.convert.architectures.base import Facts
from diffquant.convert.architectures.names import USUAL

__all__ = ["Configs", "Hyper", "Origin", "configs_of", "flat_config", "merge"]

Origin = Literal["config.json", "diffquant.config", "default", "shape"]

# Config fields whose way of writing varies more than what they mean; the config's own is kept.
_CONFIG_WINS = ("transformer_layers_per_block",)


@dataclass(frozen=True, slots=True)
class Hyper:
    """One hyperparameter, named as in config.json, and where it was found."""

    value: Any
    origin: Origin


class Configs(NamedTuple):
    """JSON files by relative path, and where they were found."""

    files: Mapping[str, Any]
    origin: Origin


def merge(
    facts: Facts,
    config: object,
    origin: Origin,
    defaults: Mapping[str, object],
    what: str,
    warnings: list[str],
) -> dict[str, Hyper]:
    """Merge: shapes are right about what they say, then the config, then the default."""
    usual = facts.get(USUAL)
    guessed = usual if isinstance(usual, Mapping) else {}
    out = {name: Hyper(value, "default") for name, value in {**defaults, **guessed}.items()}
    known = {k: v for k, v in facts.items() if not k.startswith("_") and v is not None}
    out.update((name, Hyper(value, "shape")) for name, value in known.items())
    for name, raw in flat_config(config).items():
        value = tuple(raw) if isinstance(raw, list) else raw
        shape = known.get(name)
        if shape is None or _agree(value, shape) or name in _CONFIG_WINS:
            out[str(name)] = Hyper(value, origin)
        elif value is not None:
            warnings.append(
                f"{what}: {origin} says {name} is {value}, the tensors say {shape}: the tensors "
                "are followed"
            )
    return out


def flat_config(config: object) -> dict[str, Any]:
    """A config with its nested text_config and rope_parameters (newer transformers) spread out."""
    if not isinstance(config, Mapping):
        return {}
    flat = dict(config)
    text = flat.get("text_config")
    if isinstance(text, Mapping):
        flat.update((k, v) for k, v in text.items() if k not in {"architectures", "model_type"})
    rope = flat.get("rope_parameters")
    if isinstance(rope, Mapping):
        flat["rope_theta"] = rope.get("rope_theta")
        flat["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return flat


def _agree(value: object, shape: object) -> bool:
    """Whether a config's value says what the shapes say; one number may stand for a level each."""
    if isinstance(value, tuple) and not isinstance(shape, tuple):
        return all(one == shape for one in value)
    if isinstance(shape, tuple) and not isinstance(value, tuple):
        return all(one == value for one in shape)
    return value == shape or isinstance(value, str)


def configs_of(metadata: Mapping[str, object], configs: Mapping[str, object]) -> Configs:
    """Configs beside the tensors, else those in the header."""
    if configs:
        return Configs(configs, "config.json")
    text = metadata.get("diffquant.config")
    try:
        found = json.loads(text).get("configs", {}) if isinstance(text, str) else {}
    except (ValueError, AttributeError, RecursionError):
        found = {}
    return Configs(found if isinstance(found, dict) else {}, "diffquant.config")
