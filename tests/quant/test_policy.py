"""Decisions: the order of rules, and a stated reason wherever the wanted format was not given."""

from __future__ import annotations

import pytest

from diffquant.core.errors import UnknownFormat
from diffquant.quant.formats import FORMATS, format_named
from diffquant.quant.policy import (
    FALLBACKS,
    FALLBACKS_WITHOUT_IQ,
    TINY,
    Candidate,
    Policy,
    Rule,
    flat_shape,
    resolve,
)
from diffquant.quant.types import TYPES

WEIGHT = (512, 512)
GGUF = {"conv": "f16", "bf16": "bf16", "*": "f16"}
FAMILIES = (("v", r"\.to_v\."), ("qkv", r"\.qkv\."), ("ffn_down", r"\.down\."))


def one(policy, key="a.weight", shape=WEIGHT, dtype="f16"):
    return resolve(policy, [Candidate(key, shape, dtype)])[0]


def policy(base="q4_k", **more):
    return Policy(base=base, mix=more.pop("mix", {}), families=FAMILIES, **more)


def test_the_first_user_rule_that_matches_wins():
    rules = (
        Rule("special", None, "excluded"),
        Rule("a", "q8_0", "first"),
        Rule("a.weight", "q6_k", "second"),
    )
    given = policy(user=rules, high=GGUF)
    assert (one(given).format, one(given).reason) == ("q8_0", "first")
    found = one(given, "a.special.weight")
    assert (found.format, found.reason) == ("f16", "excluded")


@pytest.mark.parametrize(
    ("key", "shape", "dtype"),
    [
        ("a.weight", (512,), "f16"),
        ("a.weight", (2, 8), "f16"),
        ("keep.weight", WEIGHT, "f16"),
        ("ids", WEIGHT, ""),
    ],
)
def test_user_rules_come_before_everything_else(key, shape, dtype):
    given = policy(
        user=(Rule("", "f32", "the user said so"),),
        keep=(Rule("keep", None, "keep"),),
        vector="f16",
    )
    assert one(given, key, shape, dtype).reason == "the user said so"


def test_rules_in_order_of_the_docstring():
    """Each line lacks what made the line before it match."""
    given = policy(
        keep=(Rule("keep", None, "keep: fragile"),),
        mix={"v": (9, "q8_0", "q8_0")},
        high=GGUF,
        vector="f32",
    )
    rows = [
        ("keep.to_v.weight", WEIGHT, "", "", "not floating point: copied"),
        ("keep.to_v.weight", (512,), "f16", "f32", "vector: high precision"),
        ("keep.to_v.weight", (2, 8), "f16", "f32", f"at most {TINY} elements: high precision"),
        ("keep.to_v.table", WEIGHT, "f16", "f32", "raw parameter: high precision"),
        ("keep.to_v.weight", (64, 64, 3, 3), "f16", "f16", "keep: fragile"),
        ("a.to_v.weight", (64, 64, 3, 3), "f16", "f16", "convolution: loaders of this type read"),
        ("a.to_v.weight", WEIGHT, "f16", "q8_0", "type's mix: v, first 9"),
        ("a.weight", WEIGHT, "f16", "q4_k", "type's base"),
    ]
    for key, shape, dtype, fmt, reason in rows:
        found = one(given, key, shape, dtype)
        assert (found.format, found.wanted) == (fmt, ""), key
        assert found.reason.startswith(reason)


def test_the_first_four_v_tensors_are_counted_in_file_order():
    given = policy(mix=TYPES["q4_k_s"].mix)
    keys = [f"blocks.{i}.{name}.weight" for i in range(6) for name in ("to_q", "to_v", "down")]
    found = resolve(given, [Candidate(key, WEIGHT, "f16") for key in keys])
    by = dict(zip(keys, found, strict=True))
    v = [by[f"blocks.{i}.to_v.weight"] for i in range(6)]
    assert [d.format for d in v] == ["q5_k"] * 4 + ["q4_k"] * 2
    assert [d.reason for d in v] == ["type's mix: v, first 4"] * 4 + ["type's base"] * 2
    assert {by[f"blocks.{i}.to_q.weight"].format for i in range(6)} == {"q4_k"}
    assert {by[f"blocks.{i}.down.weight"].format for i in range(6)} == {"q5_k"}
    assert {d.format for d in resolve(given, [Candidate(k, WEIGHT, "f16") for k in keys])} == {
        "q4_k",
        "q5_k",
    }  # counting starts anew


def test_kept_and_excluded_v_tensors_are_not_counted():
    given = policy(
        mix=TYPES["q4_k_s"].mix,
        user=(Rule(r"blocks\.0\.", None, "excluded"),),
        keep=(Rule(r"blocks\.1\.", None, "keep"),),
    )
    keys = [f"blocks.{i}.to_v.weight" for i in range(7)]
    found = resolve(given, [Candidate(key, WEIGHT, "f16") for key in keys])
    assert [d.format for d in found] == ["", "", *["q5_k"] * 4, "q4_k"]


def test_pure_ignores_the_mix():
    given = policy(mix=TYPES["q4_k_s"].mix, pure=True)
    found = one(given, "a.to_v.weight")
    assert (found.format, found.reason) == ("q4_k", "type's base")


def test_the_first_family_that_matches_is_the_family():
    given = policy(mix={"v": (0, "q8_0", "q8_0"), "ffn_down": (0, "q6_k", "q6_k")})
    assert one(given, "a.to_v.down.weight").format == "q8_0"


@pytest.mark.parametrize(
    ("base", "last", "fmt"),
    [
        ("q4_k", 512, "q4_k"),
        ("q4_k", 320, "q5_0"),
        ("q5_k", 320, "q5_1"),
        ("q6_k", 320, "q8_0"),
        ("q4_k", 300, "f16"),
        ("q6_k", 300, "f16"),
        ("q4_0", 300, "f16"),
        ("q8_0", 33, "f16"),
    ],
)
def test_rows_that_do_not_divide_fall_back_and_say_why(base, last, fmt):
    found = one(policy(base), shape=(512, last))
    assert found.format == fmt
    if fmt == base:
        assert found.wanted == ""
        return
    assert found.wanted == base
    size = format_named(base).block_size
    assert f"{base} needs last dimension divisible by {size}: {fmt}" in found.reason


def test_a_format_without_a_fallback_keeps_the_source_and_says_so():
    given = Policy(base="int8_rowwise", mix={}, user=(Rule("", "nf4", "asked"),))
    found = one(given, "a.weight", (512,))
    assert (found.format, found.wanted) == ("", "nf4")
    assert found.reason == "asked; a vector is not packed"


@pytest.mark.parametrize("chain", [FALLBACKS, FALLBACKS_WITHOUT_IQ])
def test_every_fallback_ends_where_any_shape_fits(chain):
    for name in chain:
        seen = [name]
        while seen[-1] in chain:
            seen.append(chain[seen[-1]])
            assert len(seen) < 10
        assert not FORMATS[seen[-1]].requires
    ggml = [row for row in FORMATS.values() if row.source.startswith("ggml")]
    blocks = {row.name for row in ggml if row.encodes}
    assert blocks <= set(chain)


@pytest.mark.parametrize(
    ("name", "with_iq", "without"),
    [
        ("q2_k", "iq4_nl", "q4_0"),
        ("q3_k", "iq4_nl", "q4_0"),
        ("iq4_xs", "iq4_nl", "q4_0"),
        ("iq3_s", "iq4_nl", "q4_0"),
        ("iq2_xxs", "iq4_nl", "q4_0"),
        ("q4_k", "q5_0", "q5_0"),
        ("q5_k", "q5_1", "q5_1"),
        ("q6_k", "q8_0", "q8_0"),
        ("iq4_nl", "f16", "f16"),
    ],
)
def test_fallbacks_are_those_of_the_house_plan(name, with_iq, without):
    assert (FALLBACKS[name], FALLBACKS_WITHOUT_IQ[name]) == (with_iq, without)
    if name not in FORMATS or with_iq not in FORMATS:
        return
    shape = (512, 320) if FORMATS[name].block_size == 256 else (512, 300)
    for chain, expected in ((FALLBACKS, with_iq), (FALLBACKS_WITHOUT_IQ, without)):
        assert one(policy(name, fallbacks=chain), shape=shape).format == expected


@pytest.mark.parametrize(
    ("shape", "flat"),
    [
        ((320, 320), (400, 256)),
        ((320, 4, 3, 3), (45, 256)),
        ((640, 640, 1, 1), (1600, 256)),
        ((320, 768), ()),  # its own rows divide
        ((512,), ()),  # one dimension
        ((8, 32), ()),  # under 512 elements
        ((16, 32), (2, 256)),
        ((10, 77), ()),  # no multiple of 256
    ],
)
def test_rows_of_256_follow_the_rule_of_the_reader(shape, flat):
    assert flat_shape(shape) == flat


def test_reshapes_come_before_fallbacks_and_only_where_needed():
    given = policy("q4_k", reshape=True, high=GGUF)
    found = one(given, shape=(320, 320))
    assert (found.format, found.shape, found.wanted) == ("q4_k", (400, 256), "")
    assert found.reason == "type's base; stored as rows of 256"
    conv = one(given, shape=(64, 64, 3, 3))
    assert (conv.format, conv.shape) == ("q4_k", (144, 256))
    assert one(given, shape=(512, 768)).shape == ()
    assert one(policy("q8_0", reshape=True), shape=(320, 320)).shape == ()
    odd = one(given, shape=(65, 65, 1, 1))  # no whole number of blocks at all
    assert (odd.format, odd.shape) == ("f16", ())
    assert odd.reason.startswith("convolution")
    assert one(given, shape=(10, 77)).format == "f16"


def test_edge_blocks_override_the_mix_downwards_too_and_are_counted():
    given = policy(
        "q3_k" if "q3_k" in FORMATS else "q4_0",
        mix={"v": (2, "q8_0", "q5_0"), "ffn_down": (0, "q8_0", "q8_0")},
        edges=(r"^blocks\.(0|3)\.", "q4_k"),
    )
    keys = [f"blocks.{i}.{name}.weight" for i in range(4) for name in ("to_v", "down")]
    found = dict(
        zip(keys, resolve(given, [Candidate(k, WEIGHT, "f16") for k in keys]), strict=True)
    )
    assert [found[f"blocks.{i}.to_v.weight"].format for i in range(4)] == [
        "q4_k", "q8_0", "q5_0", "q4_k",
    ]  # fmt: skip
    assert found["blocks.3.down.weight"].format == "q4_k"
    assert found["blocks.3.down.weight"].reason == "type's mix: first or last block"
    pure = policy("q4_0", edges=(r"^blocks\.0\.", "q4_k"), pure=True)
    assert one(pure, "blocks.0.to_v.weight").format == "q4_0"


@pytest.mark.parametrize("base", ["q8_0", "bf16", "f16"])
def test_tables_are_stored_as_vectors_are(base):
    table = Rule(r"emb\.", None, "an embedding table", table=True)
    given = Policy(base=base, mix={}, keep=(table,), vector="f32", high=GGUF)
    found = one(given, "emb.weight", WEIGHT, "bf16")
    assert (found.format, found.reason) == ("f32", "an embedding table")


@pytest.mark.parametrize(
    ("shape", "dtype", "fmt"),
    [
        ((512,), "f16", "f32"),
        ((512,), "bf16", "f32"),
        ((8, 8), "bf16", "f32"),
        ((512, 512), "bf16", "bf16"),
        ((512, 512), "f32", "f16"),
        ((512, 512), "fp8_e4m3", "f16"),
        ((64, 64, 3, 3), "bf16", "f16"),
        ((64, 64, 3, 3), "f32", "f16"),
    ],
)
def test_gguf_high_precision_is_what_its_loaders_take(shape, dtype, fmt):
    given = policy("q8_0", keep=(Rule("", None, "keep"),), vector="f32", high=GGUF)
    assert one(given, "a.weight", shape, dtype).format == fmt


@pytest.mark.parametrize("base", ["f32", "f16", "bf16"])
def test_a_cast_casts_everything_that_is_a_float(base):
    given = Policy(base=base, mix={}, keep=(Rule("", None, "keep"),))
    for shape in ((), (3,), (2, 2), WEIGHT, (8, 8, 3, 3)):
        found = one(given, "a.weight", shape)
        assert (found.format, found.reason) == (base, f"cast to {base}")
    assert one(given, "ids", (3,), "").format == ""


def test_convolutions_are_packed_only_where_the_type_covers_them():
    shape = (64, 64, 3, 3)
    assert one(policy("fp8_e4m3", convs=True), shape=shape).format == "fp8_e4m3"
    assert one(policy("fp8_e4m3"), shape=shape).format == ""


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("gguf", [False, True])
def test_whatever_is_not_the_named_format_says_why(name, gguf):
    """No silent fallback, for any type and awkward shape."""
    kind = TYPES[name]
    given = Policy(
        base=kind.base,
        mix=kind.mix,
        families=FAMILIES,
        keep=(Rule("keep", None, "keep: fragile"),),
        convs=kind.convs,
        vector="f32" if gguf else "",
        high=GGUF if gguf else {},
    )
    keys = ("a.weight", "a.to_v.weight", "keep.weight", "a.table", "a.bias", "a.down.weight")
    shapes = ((), (0,), (7,), (1, 1), (3, 5), WEIGHT, (512, 320), (512, 300), (64, 64, 3, 3))
    for dtype in ("f32", "bf16", "fp8_e4m3", "nf4", ""):
        for key in keys:
            for shape in shapes:
                found = one(given, key, shape, dtype)
                assert found.reason
                if found.format and not FORMATS[found.format].is_cast:
                    assert not FORMATS[found.format].check(shape), (key, shape)
                if found.format == kind.base:
                    continue
                words = ("vector", "elements", "raw parameter", "keep", "convolution", "mix",
                         "needs", "not floating point")  # fmt: skip
                assert any(word in found.reason for word in words), (key, shape, found)


def test_unknown_formats_name_the_known_and_the_closest():
    with pytest.raises(
        UnknownFormat, match=r"unknown format 'q4k', did you mean 'q4_k'\?"
    ) as error:
        one(policy(user=(Rule("", "q4k", "typo"),)))
    assert set(error.value.known) == set(FORMATS)
    assert all(name in str(error.value) for name in FORMATS)


def test_a_user_rule_that_hits_a_vector_keeps_it_in_high_precision():
    policy = Policy(base="q8_0", mix={}, user=(Rule("linear1", "q8_0", "asked"),), vector="f32")
    (decision,) = resolve(policy, [Candidate("linear1.bias", (64,), "bf16")])
    assert decision.format == "f32"
    assert "a vector is not packed" in decision.reason


def test_an_excluded_vector_still_follows_the_vector_rule():
    policy = Policy(base="q8_0", mix={}, user=(Rule("linear1", None, "--exclude"),), vector="f32")
    bias, weight = resolve(
        policy,
        [Candidate("linear1.bias", (64,), "bf16"), Candidate("linear1.weight", (64, 64), "bf16")],
    )
    assert (bias.format, weight.format) == ("f32", "")
