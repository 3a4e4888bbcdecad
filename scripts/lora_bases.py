"""Write src/diffquant/convert/lora/bases.json: the modules a LoRA can be trained on, per base.

    PYTHONPATH=src python scripts/lora_bases.py

Names and shapes come from the manifests in tests/data (published configs, or the makers' classes on
torch's meta device; rarer models hold blocks 0, 1 and the last, which is filled up here). The other
naming of a base follows from the rules of its architecture. A test runs `bases()` and compares.
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from diffquant.convert.architectures.parts import architecture_named
from diffquant.convert.detect import detect, detect_part, to_canonical
from diffquant.convert.lora.places import modules_of
from diffquant.convert.templates import template
from diffquant.core.errors import ArchitectureError, NotInvertible
from diffquant.core.tensors import TensorSpec

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "src/diffquant/convert/lora/bases.json"
Modules = dict[str, tuple[int, ...]]
# In the order they are preferred where a LoRA fits several: manifest, stacks of which it holds
# blocks 0, 1 and the last alone, and weights that another member of the family shapes otherwise.
BASES: tuple[tuple[str, tuple[str, ...], Modules], ...] = (
    ("sd15.unet.ldm", (), {}),
    ("sd15-inpainting.unet.ldm", (), {}),
    ("sd15.unet.ldm", (), {"input_blocks.0.0.weight": (320, 8, 3, 3)}),
    ("bk-sdm-base.unet.diffusers", (), {}),
    ("bk-sdm-small.unet.diffusers", (), {}),
    ("bk-sdm-tiny.unet.diffusers", (), {}),
    ("sdxs-512.unet.diffusers", (), {}),
    ("sd21.unet.ldm", (), {}),
    ("sd21.unet.ldm", (), {"input_blocks.0.0.weight": (320, 9, 3, 3)}),
    ("sd21.unet.ldm", (), {"input_blocks.0.0.weight": (320, 5, 3, 3)}),
    ("bk-sdm-v2-base.unet.diffusers", (), {}),
    ("bk-sdm-v2-small.unet.diffusers", (), {}),
    ("bk-sdm-v2-tiny.unet.diffusers", (), {}),
    ("sdxs-0.9.unet.diffusers", (), {}),
    ("sdxl-base.unet.ldm", (), {}),
    ("sdxl-inpainting.unet.ldm", (), {}),
    ("sdxl-base.unet.ldm", (), {"input_blocks.0.0.weight": (320, 8, 3, 3)}),
    ("ssd-1b.unet.diffusers", (), {}),
    ("vega.unet.diffusers", (), {}),
    ("koala-1b.unet.diffusers", (), {}),
    ("koala-700m.unet.diffusers", (), {}),
    ("sdxl-refiner.unet.ldm", (), {}),
    ("kolors.unet.diffusers", (), {}),
    ("sd3-medium.transformer.original", (), {}),
    ("sd3.5-medium.transformer.original", (), {}),
    ("sd3.5-large.transformer.original", (), {}),
    ("flux-dev.transformer.original", (), {}),
    ("flux-schnell.transformer.original", (), {}),
    ("flux-fill.transformer.original", (), {}),
    ("flux-dev.transformer.original", (), {"img_in.weight": (3072, 128)}),
    ("flux2-dev.transformer.original", (), {}),
    ("flux2-klein-4b.transformer.original", ("double_blocks", "single_blocks"), {}),
    ("flux2-klein-9b.transformer.original", ("double_blocks", "single_blocks"), {}),
    ("chroma.transformer.original", (), {}),
    ("chroma-radiance.transformer.original", ("double_blocks", "single_blocks"), {}),
    ("qwen-image.transformer.diffusers", (), {}),
    ("z-image.transformer.comfy", (), {}),
    ("z-image-omni.transformer.original", ("layers",), {}),
    ("lumina2.transformer.original", (), {}),
    ("omnigen2.transformer.original", (), {}),
    ("hidream-i1.transformer.original", (), {}),
    ("hidream-o1.transformer.original", ("layers",), {}),
    ("pixart-sigma.transformer.original", (), {}),
    ("pixart-alpha-1024.transformer.original", ("blocks",), {}),
    ("auraflow.transformer.original", (), {}),
    ("wan21-t2v-14b.transformer.original", (), {}),
    ("wan21-t2v-1.3b.transformer.original", (), {}),
    ("wan21-i2v-14b.transformer.original", ("blocks",), {}),
    ("wan22-i2v-a14b.transformer.original", ("blocks",), {}),
    ("wan22-ti2v-5b.transformer.original", ("blocks",), {}),
    ("wan21-vace-14b.transformer.original", ("blocks", "vace_blocks"), {}),
    ("wan21-vace-1.3b.transformer.original", ("blocks", "vace_blocks"), {}),
    ("hunyuan-video.transformer.original", ("double_blocks", "single_blocks"), {}),
    ("hunyuan-video-i2v.transformer.original", ("double_blocks", "single_blocks"), {}),
    (
        "hunyuan-image-2.1.transformer.diffusers",
        ("transformer_blocks", "single_transformer_blocks"),
        {},
    ),
    ("hunyuan-video-1.5.transformer.diffusers", ("transformer_blocks",), {}),
    ("hunyuan-dit-1.2.transformer.diffusers", ("blocks",), {}),
    ("hunyuan-dit-1.1.transformer.diffusers", ("blocks",), {}),
    ("ltx-2b.transformer.original", ("transformer_blocks",), {}),
    ("ltx-13b.transformer.original", ("transformer_blocks",), {}),
    ("ltx-2.transformer.original", ("transformer_blocks",), {}),
    ("krea2.transformer.original", ("blocks",), {}),
    ("krea2.transformer.diffusers", ("transformer_blocks",), {}),
    ("anima.transformer.original", ("blocks",), {}),
    ("ideogram4.transformer.original", ("layers",), {}),
    ("clip-l.hf", (), {}),
    ("openclip-bigg.hf", (), {}),
    ("openclip-h.hf", (), {}),
    ("t5-xxl-encoder.hf", (), {}),
    ("umt5-xxl.hf", ("block",), {}),
    ("qwen2.5-vl-7b.hf", (), {}),
    ("qwen3-4b.hf", (), {}),
    ("qwen3-8b.hf", ("layers",), {}),
    ("gemma2-2b.hf", (), {}),
    ("mistral-small-24b.hf", ("layers",), {}),
)


def manifests() -> dict[str, dict[str, list[int]]]:
    """Every committed manifest: name -> key -> shape."""
    found: dict[str, dict[str, list[int]]] = {}
    for name in ("manifests.json.xz", "more_manifests.json.xz"):
        found.update(json.loads(lzma.decompress((ROOT / "tests/data" / name).read_bytes())))
    return found


def bases() -> list[dict[str, Any]]:
    """The rows of the file."""
    known = manifests()
    found: list[dict[str, Any]] = []
    for name, cut, changes in BASES:
        shapes = {key: tuple(shape) for key, shape in known[name].items()}
        found.append(_row(filled({**shapes, **changes}, cut)))
    return [_shortened(row, found[:index]) for index, row in enumerate(found)]


def _shortened(row: dict[str, Any], before: list[dict[str, Any]]) -> dict[str, Any]:
    """Write a row as its differences from the earlier one it is most like, if that is shorter."""
    best = row
    for index, one in enumerate(before):
        changes = {
            kind: {
                text: row[kind].get(text, {})
                for text in (*one[kind], *(text for text in row[kind] if text not in one[kind]))
                if row[kind].get(text) != one[kind].get(text)
            }
            for kind in ("names", "other")
        }
        if 2 * sum(map(len, changes.values())) < len(best["names"]) + len(best["other"]):
            best = {**row, "like": index, **changes}
    return best


def _row(full: Modules) -> dict[str, Any]:
    specs = {key: TensorSpec(key, "BF16", shape) for key, shape in full.items()}
    try:
        match = detect(specs)
    except ArchitectureError:
        found = detect_part(specs)
        assert found is not None, next(iter(full))
        match = found
    part = match.parts[0]
    try:
        canonical = {one.target: one.shape for one in to_canonical(part)}
        component = architecture_named(match.architecture).component(part.name, part.kind)
        other = {
            key: one.shape
            for key, one in modules_of(component, canonical).items()
            if one.pieces and not one.transposed
        }
    except NotInvertible:
        canonical, other = dict(part.shapes), {}
    own = _weights(canonical)
    rest = {key: shape for key, shape in other.items() if key not in own and len(shape) > 1}
    return {
        "architecture": match.architecture,
        "variant": match.variant,
        "names": folded(own),
        "other": folded({**rest, **(_comfy(own) if part.kind == "hunyuan_video" else {})}),
    }


def _comfy(modules: Modules) -> Modules:
    """HunyuanVideo inside ComfyUI: Comfy-Org/ComfyUI@e3c3552:comfy/supported_models.py."""
    renames = (
        ("_attn_qkv", "_attn.qkv"),
        ("_attn_proj", "_attn.proj"),
        ("mlp.fc1", "mlp.0"),
        ("mlp.fc2", "mlp.2"),
        ("_mod.linear", "_mod.lin"),
        ("modulation.linear", "modulation.lin"),
    )
    found = {}
    for name, shape in modules.items():
        renamed = name
        for ours, theirs in renames:
            renamed = renamed.replace(ours, theirs)
        if renamed != name:
            found[renamed] = shape
    return found


def filled(shapes: Modules, cut: tuple[str, ...]) -> Modules:
    """Put the blocks back that a shortened manifest leaves out: they are as block 1 is."""
    found = dict(shapes)
    for stack in cut:
        pattern = re.compile(rf"(^|\.){stack}\.(\d+)(?=\.)")
        hits = {key: match for key in shapes if (match := pattern.search(key))}
        last = max(int(match[2]) for match in hits.values())
        for key, match in hits.items():
            if match[2] == "1":
                for index in range(2, last):
                    found[key[: match.start(2)] + str(index) + key[match.end(2) :]] = shapes[key]
    return found


def _weights(shapes: Mapping[str, tuple[int, ...]]) -> Modules:
    """Module name -> shape of weights that have rows and columns."""
    return {
        key.removesuffix(".weight"): shape
        for key, shape in shapes.items()
        if key.endswith(".weight") and len(shape) > 1
    }


def folded(modules: Modules) -> dict[str, dict[str, str]]:
    """Template -> numbers in it ("0-18", "1-2 1 0") -> shape ("9216x3072")."""
    found: dict[str, dict[tuple[int, ...], set[tuple[int, ...]]]] = {}
    for name, shape in modules.items():
        text, numbers = template(name)
        found.setdefault(text, {}).setdefault(shape, set()).add(numbers)
    return {
        text: {
            ", ".join(_products(numbers)): "x".join(map(str, shape))
            for shape, numbers in sorted(shapes.items())
        }
        for text, shapes in sorted(found.items())
    }


def _products(numbers: set[tuple[int, ...]]) -> list[str]:
    """Index tuples as few products of ranges: {(1, 0), (2, 0)} -> ["1-2 0"]."""
    rows = {tuple((index,) for index in one) for one in numbers}
    width = len(next(iter(numbers)))
    for place in reversed(range(width)):
        merged: dict[tuple[Any, ...], set[int]] = {}
        for row in rows:
            merged.setdefault((*row[:place], *row[place + 1 :]), set()).update(row[place])
        rows = {
            (*rest[:place], tuple(sorted(values)), *rest[place:]) for rest, values in merged.items()
        }
    assert {one for row in rows for one in product(*row)} == numbers
    return [" ".join(_range(values) for values in row) for row in sorted(rows)]


def _range(values: Iterable[int]) -> str:
    """(0, 1, 2, 5) -> "0-2+5"."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][1] == value - 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return "+".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def written() -> str:
    """The file's text, one template a line."""
    lines = []
    for row in bases():
        head = [key for key in ("architecture", "variant", "like") if key in row]
        parts = [", ".join(f'"{key}": {json.dumps(row[key])}' for key in head)]
        for key in ("names", "other"):
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in row[key].items())
            parts.append(f' "{key}": {{\n{inner}\n }}' if inner else f' "{key}": {{}}')
        lines.append("{" + ",\n".join(parts) + "}")
    return "[\n" + ",\n".join(lines) + "\n]\n"


if __name__ == "__main__":
    TARGET.write_text(written(), encoding="utf-8")
