"""Rules: assignments, inverses, and the checks of apply_rules."""

import numpy as np
import pytest

from diffquant.convert.rules import (
    Assignment,
    Drop,
    Fuse,
    Piece,
    Rename,
    Reorder,
    Reshape,
    Split,
    Tie,
    Transpose,
    apply_rules,
    invert,
)
from diffquant.core.errors import (
    DuplicateTarget,
    MappingError,
    MissingKeys,
    NotInvertible,
    UnmappedKeys,
)

SHAPES = {
    "q.weight": (4, 6),
    "k.weight": (2, 6),
    "q.bias": (4,),
    "k.bias": (2,),
    "mod.weight": (8, 3),
    "mod.bias": (8,),
    "proj.weight": (5, 5),
    "head": (3, 7),
    "scale": (),
    "same": (2, 2),
}
RULES = (
    Fuse(("q.weight", "k.weight"), "qk.weight"),
    Fuse(("q.bias", "k.bias"), "qk.bias"),
    Reorder("mod.weight", "lin.weight", (1, 0)),
    Reorder("mod.bias", "lin.bias", (1, 0)),
    Reshape("proj.weight", "conv.weight", (5, 5, 1, 1)),
    Transpose("head", "projection"),
    Rename("scale", "logit_scale"),
    Rename("same", "other"),
)


def run(assignments, arrays):
    """The reference engine: concatenate, transpose, view."""
    out = {}
    for one in assignments:
        if not one.pieces:
            out[one.target] = np.full(one.shape, one.fill)
            continue
        rows = [np.atleast_1d(arrays[piece.key])[piece.start : piece.stop] for piece in one.pieces]
        whole = np.concatenate(rows)
        out[one.target] = (whole.T if one.transpose else whole).reshape(one.shape)
    return out


def arrays_of(shapes):
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape) for key, shape in shapes.items()}


def test_values_follow_every_rule():
    arrays = arrays_of(SHAPES)
    out = run(apply_rules(RULES, SHAPES), arrays)
    np.testing.assert_array_equal(
        out["qk.weight"], np.concatenate([arrays["q.weight"], arrays["k.weight"]])
    )
    np.testing.assert_array_equal(
        out["lin.bias"], np.concatenate([arrays["mod.bias"][4:], arrays["mod.bias"][:4]])
    )
    np.testing.assert_array_equal(out["conv.weight"][:, :, 0, 0], arrays["proj.weight"])
    np.testing.assert_array_equal(out["projection"], arrays["head"].T)
    assert out["logit_scale"].shape == ()


def test_inverse_restores_every_value_and_shape():
    arrays = arrays_of(SHAPES)
    forward = apply_rules(RULES, SHAPES)
    shapes = {one.target: one.shape for one in forward}
    back = run(apply_rules(invert(RULES, SHAPES), shapes), run(forward, arrays))
    assert back.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(back[key], array)
        assert back[key].shape == array.shape


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_inverse_of_inverse_is_the_rule(rule):
    shapes = {key: SHAPES[key] for key in rule.sources}
    targets = {one.target: one.shape for one in rule.assignments(shapes)}
    assert rule.inverse(shapes).inverse(targets) == rule


def test_reorder_of_three_segments_inverts():
    rule = Reorder("a", "b", (2, 0, 1))
    arrays = {"a": np.arange(6.0)}
    out = run(rule.assignments({"a": (6,)}), arrays)
    assert out["b"].tolist() == [4, 5, 0, 1, 2, 3]
    back = run(rule.inverse({"a": (6,)}).assignments({"b": (6,)}), out)
    assert back["a"].tolist() == arrays["a"].tolist()


def test_split_ranges_are_exact():
    rule = Split("qkv", ("q", "k", "v"), (4, 2, 2))
    assert rule.assignments({"qkv": (8, 3)}) == (
        Assignment("q", (4, 3), (Piece("qkv", 0, 4),)),
        Assignment("k", (2, 3), (Piece("qkv", 4, 6),)),
        Assignment("v", (2, 3), (Piece("qkv", 6, 8),)),
    )


def test_tie_copies_and_its_inverse_drops_the_copy():
    rules = (Rename("shared", "shared"), Tie("shared", "embed"))
    found = apply_rules(rules, {"shared": (3, 2)})
    assert [one.target for one in found] == ["shared", "embed"]
    assert found[0].pieces == found[1].pieces
    back = apply_rules(invert(rules, {"shared": (3, 2)}), {"shared": (3, 2), "embed": (3, 2)})
    assert [one.target for one in back] == ["shared"]


def test_drop_consumes_its_key_and_does_not_invert():
    rule = Drop("ema", "EMA copy")
    assert apply_rules((rule,), {"ema": (3,)}) == ()
    with pytest.raises(NotInvertible, match="EMA copy"):
        invert((rule,), {"ema": (3,)})


@pytest.mark.parametrize(
    ("rules", "shapes", "error", "keys"),
    [
        ((Rename("a", "x"),), {"a": (1,), "b": (1,)}, UnmappedKeys, ("b",)),
        ((Rename("a", "x"), Rename("b", "y")), {"a": (1,)}, MissingKeys, ("b",)),
        ((Rename("a", "x"), Rename("b", "x")), {"a": (1,), "b": (1,)}, DuplicateTarget, ("x",)),
        ((Rename("a", "x"), Rename("a", "y")), {"a": (1,)}, MappingError, ("a",)),
        ((Tie("a", "x"),), {"a": (1,)}, UnmappedKeys, ("a",)),
    ],
)
def test_key_sets_that_do_not_fit_are_refused_by_name(rules, shapes, error, keys):
    with pytest.raises(error) as caught:
        apply_rules(rules, shapes)
    assert type(caught.value) is error
    assert caught.value.keys == keys


@pytest.mark.parametrize(
    ("rule", "shapes"),
    [
        (Fuse(("a", "b"), "x"), {"a": (2, 3), "b": (2, 4)}),
        (Fuse(("a", "b"), "x"), {"a": (), "b": ()}),
        (Split("a", ("x", "y"), (2, 2)), {"a": (5, 1)}),
        (Split("a", ("x", "y"), (5,)), {"a": (5, 1)}),
        (Reorder("a", "x", (1, 0)), {"a": (5,)}),
        (Transpose("a", "x"), {"a": (5,)}),
        (Reshape("a", "x", (5, 5)), {"a": (5, 6)}),
        (Reshape("a", "x", (3, 2)), {"a": (2, 3)}),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(rule, shapes):
    with pytest.raises(MappingError, match=r"\ba\b") as caught:
        apply_rules((rule,), shapes)
    assert set(caught.value.keys) == set(shapes)
