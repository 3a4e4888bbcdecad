"""What configs beside a model's parts state and tensors cannot: sizes, schedules, yes or no."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.detect import PartMatch
from diffquant.convert.hyper import flat_config
from diffquant.convert.output import configs_of
from diffquant.runtime.models.autoencoder import Autoencoder
from diffquant.runtime.providers import Provider

__all__ = ["hyper_of", "index_says", "native_size", "scheduler_of"]

_LARGEST = 4096  # pixels; a config that says more is not followed


def hyper_of(
    providers: list[Provider], architecture: str, name: str, part: PartMatch
) -> dict[str, Any]:
    """Facts that shapes cannot say: the part's own, else a provider's config of the same part."""
    row = ARCHITECTURES[architecture]
    known = {
        **row.hyper_defaults.get(name, {}),  # a part alone in its file knows no family
        **{key: hyper.value for key, hyper in part.hyper.items()},
    }
    if any(hyper.origin in ("config.json", "diffquant.config") for hyper in part.hyper.values()):
        return known
    folder = row.component(name).folder
    for provider in providers:
        config = configs_of(provider.source).get(f"{folder}/config.json")
        if isinstance(config, dict):
            return {**known, **flat_config(config)}
    return known


def scheduler_of(providers: list[Provider]) -> Mapping[str, Any]:
    """The scheduler's config: the first provider's that has one, else what the match knows."""
    for provider in providers:
        config = configs_of(provider.source).get("scheduler/scheduler_config.json")
        if isinstance(config, dict):
            return config
    match = providers[0].match
    assert match is not None
    return {name: hyper.value for name, hyper in match.scheduler.items()}


def index_says(providers: list[Provider], field: str, *, default: bool) -> bool:
    """A yes or no of a folder's model_index.json."""
    for provider in providers:
        index = configs_of(provider.source).get("model_index.json")
        if isinstance(index, dict) and isinstance(index.get(field), bool):
            return bool(index[field])
    return default


def native_size(providers: list[Provider], architecture: str, vae: Autoencoder) -> tuple[int, int]:
    """Picture size by the configs: the denoiser's in latents, else the VAE's, else the default.

    Flux transformers state no size; their VAE's config does (1024 in the published ones). Classes
    without such a field may have it with an underscore, which diffusers passes over.
    """
    for part, factor in (("denoiser", vae.config.factor), ("vae", 1)):
        folder = ARCHITECTURES[architecture].component(part).folder
        for provider in providers:
            config = configs_of(provider.source).get(f"{folder}/config.json")
            known = config if isinstance(config, dict) else {}
            size = known.get("sample_size", known.get("_sample_size"))
            if isinstance(size, int) and 0 < size * factor <= _LARGEST:
                return size * factor, size * factor
    match = providers[0].match
    assert match is not None
    sampling = ARCHITECTURES[architecture].sampling_for(match.variant)
    return sampling.width, sampling.height
