"""ComfyUI's `prompt` chunk: its graph as JSON, of which the simple shape is read.

::

    CheckpointLoaderSimple -> LoraLoader* -> KSampler <- CLIPTextEncode (positive, negative)
                                                      <- EmptyLatentImage

`{"3": {"class_type": "KSampler", "inputs": {"seed": 1, "model": ["4", 0], ...}}, ...}`: an input is
a value, or [node, output]. Whatever else the sampler hangs on is named in the notes, never guessed.
Source: Comfy-Org/ComfyUI:nodes.py (KSampler, CLIPTextEncode, EmptyLatentImage, LoraLoader).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from diffquant.core.errors import MalformedFile, UsageError
from diffquant.runtime.recipe import Recipe, UsedLora

__all__ = ["from_comfy"]

_SAMPLERS = ("KSampler", "KSamplerAdvanced")
_LATENTS = ("EmptyLatentImage", "EmptySD3LatentImage")
_LORAS = ("LoraLoader", "LoraLoaderModelOnly")
_LOADERS = {"CheckpointLoaderSimple": "ckpt_name", "UNETLoader": "unet_name"}
_LARGEST = 1 << 14
_LONGEST = 64  # nodes in a row
Graph = Mapping[str, Mapping[str, Any]]


def from_comfy(text: str, where: object) -> Recipe:
    """Read a graph with one KSampler.

    Raises:
        MalformedFile: no graph.
        UsageError: a graph of another shape; the message says what it is made of.
    """
    graph = _graph(text, where)
    samplers = [node for node in graph.values() if node["class_type"] in _SAMPLERS]
    if len(samplers) != 1:
        kinds = sorted({node["class_type"] for node in graph.values()})
        raise UsageError(
            f"{where}: ComfyUI's graph has {len(samplers)} KSampler nodes, one is read (it has "
            f"{', '.join(kinds)[:300]}): give the options themselves"
        )
    inputs = samplers[0]["inputs"]
    fields: dict[str, Any] = {"rng": "cpu", "prompt_style": "comfy"}
    notes: list[str] = []
    seed = "seed" if "seed" in inputs else "noise_seed"
    for key, name, kind in (
        (seed, "seed", int),
        ("steps", "steps", int),
        ("cfg", "cfg", float),
        ("sampler_name", "sampler", str),
        ("scheduler", "schedule", str),
    ):
        value = inputs.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is kind:
            fields[name] = value
        else:
            notes.append(f"the sampler's {key} is wired or missing, and not read")
    for key, name in (("positive", "prompt"), ("negative", "negative")):
        said = _said(graph, inputs.get(key))
        if said is None:
            notes.append(f"the {name} does not come from one CLIPTextEncode, and is not read")
        else:
            fields[name] = said
    notes += _latents(graph, inputs, fields)
    loras, model, strange = _model(graph, inputs.get("model"))
    notes += [f"node {one} before the sampler is not understood" for one in strange]
    return Recipe("comfyui", fields, loras, model, "", tuple(notes))


def _graph(text: str, where: object) -> Graph:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedFile(f"prompt: not JSON: {error}", path=where) from None
    good = isinstance(found, dict) and all(
        isinstance(node, dict)
        and isinstance(node.get("class_type"), str)
        and isinstance(node.get("inputs"), dict)
        for node in found.values()
    )
    if not good:
        raise MalformedFile("prompt: not a graph of nodes with class_type and inputs", path=where)
    return found  # type: ignore[no-any-return]


def _node(graph: Graph, link: object) -> Mapping[str, Any] | None:
    """The node that an input is wired to."""
    if isinstance(link, list) and len(link) == 2 and isinstance(link[0], str):
        return graph.get(link[0])
    return None


def _said(graph: Graph, link: object) -> str | None:
    node = _node(graph, link)
    if node is None or node["class_type"] != "CLIPTextEncode":
        return None
    text = node["inputs"].get("text")
    return text if isinstance(text, str) else None


def _latents(graph: Graph, inputs: Mapping[str, Any], fields: dict[str, Any]) -> Iterator[str]:
    node = _node(graph, inputs.get("latent_image"))
    sizes = [node["inputs"].get(side) for side in ("width", "height")] if node else []
    if node is None or node["class_type"] not in _LATENTS:
        found = node["class_type"] if node else "nothing"
        yield f"its latents come from {found}, not from an empty picture: size and --image are open"
    elif all(type(one) is int and 0 < one <= _LARGEST for one in sizes):
        fields["size"] = (sizes[0], sizes[1])
    else:
        yield "the picture's size is wired, and not read"
    denoise = inputs.get("denoise", 1.0)
    if isinstance(denoise, int | float) and denoise != 1:
        fields["strength"] = float(denoise)


def _model(graph: Graph, link: object) -> tuple[tuple[UsedLora, ...], str, list[str]]:
    """Walk from the sampler back to the checkpoint: LoRAs in order, its name, strange nodes."""
    loras: list[UsedLora] = []
    strange: list[str] = []
    for _ in range(_LONGEST):
        node = _node(graph, link)
        if node is None:
            return tuple(reversed(loras)), "", strange
        kind, inputs = node["class_type"], node["inputs"]
        if kind in _LOADERS:
            name = inputs.get(_LOADERS[kind])
            return tuple(reversed(loras)), name if isinstance(name, str) else "", strange
        weight, name = inputs.get("strength_model"), inputs.get("lora_name")
        if kind in _LORAS and isinstance(name, str) and isinstance(weight, int | float):
            loras.append(UsedLora(name, float(weight)))
        else:
            strange.append(kind)
        link = inputs.get("model")
    return tuple(reversed(loras)), "", strange
