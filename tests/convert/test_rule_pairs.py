"""Every rule pair of every architecture: names A -> canonical -> names B -> canonical -> A.

On the key sets of real models at their real widths, and again at a small width with every single
element followed. What is tested is made of ARCHITECTURES and PARTS: a new component is tested by
the manifests that it recognises, and one without any fails here.
"""

import functools
import itertools
import json
import lzma
import re
from collections import defaultdict
from math import prod
from pathlib import Path

import numpy as np
import pytest

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.parts import PARTS
from diffquant.convert.architectures.qwen2_vl_vision import is_tower
from diffquant.convert.matching import Below, Found, find
from diffquant.convert.rules import Drop, apply_rules
from diffquant.core.errors import NotInvertible, UnmappedKeys

DATA = Path(__file__).parents[1] / "data"
FACTORS = (64, 120, 40, 8)  # of a small width: the one that leaves the fewest elements
_LATER_BLOCKS = re.compile(
    r"(?:^|\.)(?:\w*layers|blocks|block|blk|resblocks|(?:\w+_)?transformer_blocks|single_blocks|"
    r"double_blocks|joint_blocks)\.(?:[3-9]|\d\d+)\."
)
ROWS = {**PARTS, **ARCHITECTURES}
COMPONENTS = [(slug, one.name, one.kind) for slug, row in ROWS.items() for one in row.components]


def named(slug, name, kind):
    return ROWS[slug].component(name, kind)


REWRITTEN = [one for one in COMPONENTS if named(*one).links is not None]

# Keys that the other naming has no place for; the plan of a conversion lists them.
LOST = {
    "openclip_text": {"logit_scale", "text_projection"},  # SD 2 reads no projection
    "lumina2": {"norm_final.weight"},
    "pixart": {"y_embedder.y_embedding"},
}
# Read, never written, as alternate namings are: Diffusers' VAE before version 0.17.
OLD_NAMES = ("encoder.mid_block.attentions.0.query.weight",)
# Recognised, with tensors that no naming but their own is known for: converting them is refused.
UNRELATED = {"AnyFlowTransformer3DModel": "condition_embedder.delta_embedder."}
# Two namings that nobody has related, or one alone: see docs/architectures.md.
KEPT_NAMES = {
    "anima",
    "krea2",
    "chroma_radiance",
    "hidream_o1",
    "hunyuan_later",
    "hunyuan_dit",
    "vae_wan22",
    "vae_hunyuan_video",
    "vae_hunyuan_15",
    "vae_ltx",
}


def _bare(shapes, prefix):
    return {key.removeprefix(prefix): shape for key, shape in shapes.items()}


def _below(shapes, prefix):
    return {prefix + key: shape for key, shape in shapes.items()}


def _only(shapes, *, tower):
    return {key: shape for key, shape in shapes.items() if is_tower(key) == tower}


def _repeated(shapes):
    return {k.replace("shared.", "encoder.embed_tokens."): shape for k, shape in shapes.items()}


# Key sets that no manifest has, restated from one that has them under other names.
RESTATED = {
    "openclip-h.bare": ("openclip-h.hf", lambda s: _bare(s, "text_model.")),
    "openclip-bigg.bare": ("openclip-bigg.hf", lambda s: _bare(s, "text_model.")),
    "t5-xxl.embed_tokens": ("t5-xxl-encoder.hf", _repeated),
    "mistral.multimodal": ("mistral-small-24b.hf", lambda s: _below(s, "language_model.")),
    "qwen3-4b.bare": ("qwen3-4b.hf", lambda s: _bare(s, "model.")),
    "gemma2-2b.causal": ("gemma2-2b.hf", lambda s: _below(s, "model.")),
    "qwen2.5-vl.text": ("qwen2.5-vl-7b.hf", lambda s: _only(s, tower=False)),
    "qwen2.5-vl.text5": ("qwen2.5-vl-7b.hf-transformers5", lambda s: _only(s, tower=False)),
    "qwen2.5-vl.tower": ("qwen2.5-vl-7b.hf", lambda s: _only(s, tower=True)),
    "qwen2.5-vl.tower5": ("qwen2.5-vl-7b.hf-transformers5", lambda s: _only(s, tower=True)),
}


@functools.cache
def manifests():
    """Key sets of models: name -> shapes."""
    found = {}
    for name in ("manifests", "more_manifests", "further_manifests"):
        found |= json.loads(lzma.decompress((DATA / f"{name}.json.xz").read_bytes()))
    models = {
        name: {key: tuple(shape) for key, shape in shapes.items()}
        for name, shapes in found.items()
        if not name.startswith("lora.")
    }
    return models | {new: how(models[old]) for new, (old, how) in RESTATED.items()}


@functools.cache
def key_sets():
    """(architecture, part, kind) -> layout -> manifest -> shapes, as recognition finds them."""
    belows = {name: Below(shapes) for name, shapes in manifests().items()}
    out = defaultdict(lambda: defaultdict(dict))
    for one in COMPONENTS:
        component = named(*one)
        for manifest, below in belows.items():
            inside = "checkpoint" in manifest or component.name != "denoiser"
            for prefix in (*component.prefixes, "") if inside else ("",):
                hit = find(component, below, prefix)
                if isinstance(hit, Found) and not _of_another(one, hit):
                    out[one][hit.layout][manifest] = dict(hit.shapes)
                    break
    return out


def _of_another(one, hit):
    """SD 2's encoder, of which the last layer is not read, is told by the checkpoint around it."""
    return one[0] == "sd2" and hit.facts.get("hidden_size") in (768, 1280)


def moved_shapes(rules, shapes):
    return {one.target: one.shape for one in apply_rules(rules, shapes)}


def moved_values(rules, tensors):
    """What rules.Assignment promises, in numpy."""
    out = {}
    for one in apply_rules(rules, {key: value.shape for key, value in tensors.items()}):
        first, *more = one.pieces
        if one.axis and more:
            made = np.stack([tensors[piece.key] for piece in one.pieces], axis=one.axis)
        elif one.axis:
            made = np.take(tensors[first.key], first.start, axis=one.axis)
        else:
            made = np.concatenate(
                [np.atleast_1d(tensors[p.key])[p.start : p.stop] for p in one.pieces]
            )
        out[one.target] = (made.T if one.transpose else made).reshape(one.shape)
    return out


def small(shapes):
    """The same model, narrower and with three blocks; sizes that no factor divides stay."""

    def narrow(factor):
        return {
            key: tuple(n // factor if n % factor == 0 else n for n in shape)
            for key, shape in shapes.items()
            if key.startswith("distilled_guidance_layer.") or not _LATER_BLOCKS.search(key)
        }

    return min(map(narrow, FACTORS), key=lambda found: sum(map(prod, found.values())))


def numbered(shapes):
    """Tensors of which no two elements, in the whole key set, are equal."""
    out, start = {}, 0
    for key, shape in shapes.items():
        out[key] = np.arange(start, start + prod(shape), dtype=np.int32).reshape(shape)
        start += prod(shape)
    return out


class Ways:
    """Leads key sets of one component from layout to layout, and keeps book of what is dropped."""

    def __init__(self, component, move):
        self.component, self.move, self.dropped = component, move, set()

    def __call__(self, things, *layouts):
        for source, target in itertools.pairwise(layouts):
            shapes = {key: getattr(one, "shape", one) for key, one in things.items()}
            rules = self.component.rules(shapes, source, target)
            self.dropped |= {rule.source for rule in rules if isinstance(rule, Drop)}
            things = self.move(rules, things)
        return things

    def kept(self, things):
        return {key: one for key, one in things.items() if key not in self.dropped}


def targets_of(component, shapes):
    """Layouts that can be written; GGUF cuts Qwen2.5-VL in two, and has each half's names."""
    whole = component.kind == "qwen2_vl_text" and any(map(is_tower, shapes))
    return ["diffusers", *(["gguf"] if component.gguf is not None and not whole else [])]


def judge(component, start, layout, move, same):
    """Go all ways from one key set in one layout; returns the keys that were dropped."""
    ways = Ways(component, move)
    canonical = ways(start, layout, "canonical")
    for other in targets_of(component, start):
        out = ways(canonical, "canonical", other)
        if layout != other:  # else nothing is renamed
            same(ways(start, layout, other), out)  # there directly, as a plan goes
        back = ways(out, other, "canonical")
        same(back, ways.kept(canonical))
        if layout != "alternate" and not any(one in start for one in OLD_NAMES):
            again = ways(back, "canonical", layout)
            same(again, ways(ways.kept(canonical), "canonical", layout))
            same(again, ways.kept(start))
    return ways.dropped


def equal_shapes(one, two):
    assert one == two


def equal_values(one, two):
    assert one.keys() == two.keys()
    for key, value in two.items():
        np.testing.assert_array_equal(one[key], value, err_msg=key)


_JUDGED = {}


def judge_once(component, manifest, layout, shapes):
    """Relatives share their rules: what they do to a key set is judged once."""
    key = (component.links, component.published, component.gguf, component.same_names)
    if (key, manifest, layout) not in _JUDGED:
        dropped = judge(component, shapes, layout, moved_shapes, equal_shapes)
        judge(component, numbered(small(shapes)), layout, moved_values, equal_values)
        _JUDGED[key, manifest, layout] = dropped
    return _JUDGED[key, manifest, layout]


@pytest.mark.parametrize(("slug", "name", "kind"), REWRITTEN)
def test_key_sets_shapes_and_every_element_survive_every_rule_pair(slug, name, kind):
    component, found = named(slug, name, kind), key_sets()[slug, name, kind]
    derived = {}
    for layout, sets in found.items():
        for manifest, shapes in sets.items():
            if manifest in UNRELATED:
                with pytest.raises(UnmappedKeys, match=UNRELATED[manifest]):
                    judge_once(component, manifest, layout, shapes)
                continue
            dropped = judge_once(component, manifest, layout, shapes)
            unread = {key for key in dropped if key.startswith("transformer.resblocks.")}
            assert not unread or (slug, kind) == ("sd2", "openclip_text")
            assert dropped - unread <= LOST.get(kind, set()), manifest
            for other in ("canonical", *targets_of(component, shapes)):
                rules = component.rules(shapes, layout, other)
                derived.setdefault(other, {})[manifest] = moved_shapes(rules, shapes)
    # Layouts whose names follow from others: Kolors has no single files, GGUF's are judged by
    # llama.cpp's tables in test_encoders.py.
    for layout, sets in derived.items():
        for manifest, shapes in sets.items():
            if layout not in found and layout in component.signatures:
                judge_once(component, manifest, layout, shapes)
    assert set(component.signatures) <= {*found, *derived}, "a layout that no key set is in"


def test_no_architecture_with_rewriting_is_left_out():
    without = {kind for _, _, kind in COMPONENTS} - {kind for _, _, kind in REWRITTEN}
    assert {one for one in without if one in KEPT_NAMES} == KEPT_NAMES
    recognised_only = without - KEPT_NAMES
    assert not recognised_only & {c.kind for row in ARCHITECTURES.values() for c in row.components}
    for slug, row in ARCHITECTURES.items():
        rewritten = [one for one in row.denoisers if one.links is not None]
        assert rewritten or {one.kind for one in row.denoisers} <= KEPT_NAMES
        for one in rewritten:
            assert key_sets()[slug, one.name, one.kind], f"{slug}: no key set"


@pytest.mark.parametrize(
    ("slug", "name", "kind"),
    [one for one in COMPONENTS if one[0] in ARCHITECTURES and one not in REWRITTEN],
)
def test_names_that_nobody_has_related_are_not_rewritten(slug, name, kind):
    component = named(slug, name, kind)
    for layout, sets in key_sets()[slug, name, kind].items():
        for shapes in sets.values():
            kept = component.rules(shapes, layout, "canonical")
            assert moved_shapes(kept, shapes) == shapes
            if not component.same_names and layout != "diffusers":
                with pytest.raises(NotInvertible, match="is not known here"):
                    component.rules(shapes, layout, "diffusers")
