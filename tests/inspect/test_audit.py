"""audit(): clean files are clean, and every rule is broken once, by files written with struct."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.core.dtypes import STORAGE
from diffquant.core.errors import CheckpointError, UnsupportedContainer
from diffquant.inspect.audit import audit
from diffquant.inspect.audit_gguf import GGUF_RULES
from diffquant.inspect.audit_safetensors import SAFETENSORS_RULES
from diffquant.inspect.audit_values import CODES, not_finite, unused_codes
from diffquant.quant.types import type_named


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def u32(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


def i32_array(key: str, *values: int, kind: int = 5) -> bytes:
    code = {5: "i", 11: "q"}[kind]
    return text(key) + struct.pack(f"<IIQ{len(values)}{code}", 9, kind, len(values), *values)


ARCH = text("general.architecture") + struct.pack("<I", 8) + text("flux")
VERSION = u32("general.quantization_version", 2)
FILE_TYPE = u32("general.file_type", 7)
PAIRS = (ARCH, VERSION, FILE_TYPE)
Q8 = np.zeros(34, np.uint8)
# name, dims (innermost first), type id, data
TENSORS = (
    ("a.weight", (32, 8), 8, np.tile(Q8, 8).tobytes()),
    ("a.bias", (3,), 0, bytes(12)),
    ("b.weight", (4, 2), 30, bytes(16)),
)


def gguf(path, tensors=TENSORS, pairs=PAIRS, *, version=3, offsets=None, tail=b"", pad=b"\0"):
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs)
    data = b""
    for index, (name, dims, kind, raw) in enumerate(tensors):
        at = len(data) if offsets is None else offsets[index]
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, at)
        data += raw + pad * (-len(raw) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data + tail)
    return path


def one(name="x.weight", dims=(32, 1), kind=8, raw=bytes(34)):
    return ((name, dims, kind, raw),)


NAN = np.float16("nan").tobytes()
GGUF_BROKEN = {
    "version": {"version": 2},
    "keys": {"pairs": (*PAIRS, u32("größe", 1))},
    "alignment": {"pairs": (*PAIRS, u32("general.alignment", 4))},
    "names_unique": {"tensors": TENSORS + TENSORS[1:2]},
    "names": {"tensors": one("x" * 128)},
    "types": {"tensors": one(kind=31)},
    "dimensions": {"tensors": one(dims=(32, 0), raw=b"")},
    "rank": {"tensors": one(dims=(32, 1, 1, 1, 1))},
    "rows": {"tensors": one(dims=(31, 1))},
    "aligned": {"offsets": (0, 272 + 8, 320)},
    "tiles": {"offsets": (0, 320, 352)},
    "inside": {"tensors": one(dims=(32, 99))},
    "trailing": {"tail": b"x"},
    "padding": {"pad": b"x"},
    "architecture": {"pairs": (VERSION, u32("general.architecture", 1))},
    "quantization_version": {"pairs": (ARCH,)},
    "file_type": {"pairs": (ARCH, VERSION, u32("general.file_type", 14))},
    "orig_shape": {"pairs": (*PAIRS, i32_array("comfy.gguf.orig_shape.a.weight", 2, 3))},
    "arrays_beside_5d": {
        "tensors": one(dims=(32, 1, 1, 1, 1)),
        "pairs": (*PAIRS, i32_array("some.array", 1)),
    },
    "bf16": {"tensors": one("x.bias", (4,), 30, bytes(8))},
    "finite": {"tensors": one(raw=NAN + bytes(32))},
    "codes": {"tensors": one(raw=bytes(2) + b"\x80" * 32)},
}
ALSO = {  # the same rule in another way
    "alignment, odd type": ("alignment", {"pairs": (*PAIRS, i32_array("general.alignment", 32))}),
    "quantization_version 1": (
        "quantization_version",
        {"pairs": (ARCH, u32("general.quantization_version", 1))},
    ),
    "architecture absent": ("architecture", {"pairs": (VERSION,)}),
    "file_type unknown": ("file_type", {"pairs": (ARCH, VERSION, u32("general.file_type", 99))}),
    "orig_shape of nothing": (
        "orig_shape",
        {"pairs": (*PAIRS, i32_array("comfy.gguf.orig_shape.none", 2, 3))},
    ),
    "orig_shape in 64 bits": (
        "orig_shape",
        {"pairs": (*PAIRS, i32_array("comfy.gguf.orig_shape.a.weight", 8, 32, kind=11))},
    ),
    "names empty": ("names", {"tensors": one("")}),
    "types unknown": ("types", {"tensors": one(kind=4000)}),
    "dimensions overflow": ("dimensions", {"tensors": one(dims=(2**40, 2**40), raw=b"")}),
    "tiles overlap": ("tiles", {"offsets": (0, 0, 32)}),
    "bf16 convolution": ("bf16", {"tensors": one(dims=(1, 1, 2, 2), kind=30, raw=bytes(8))}),
    "infinite float": (
        "finite",
        {"tensors": one(dims=(4,), kind=0, raw=np.array([1, np.inf, 0, 0], "<f4").tobytes())},
    ),
}


def rules(reports):
    return {rule for report in reports for rule in report.counts}


def test_clean_files_are_clean(tmp_path, examples):
    (report,) = audit(gguf(tmp_path / "a.gguf"), full=True)
    assert (report.violations, report.warnings, report.findings) == (0, 0, ())
    assert report.rules == len(GGUF_RULES)
    good = i32_array("comfy.gguf.orig_shape.a.weight", 8, 32)
    assert not rules(audit(gguf(tmp_path / "a.gguf", pairs=(*PAIRS, good))))
    assert not rules(audit(examples, full=True))


@pytest.mark.parametrize("kind", ["q4_k_s", "q4_0", "bf16", "fp8_scaled", "int8_rowwise", "nf4"])
def test_what_we_write_keeps_the_rules(tmp_path, examples, kind):
    made = type_named(kind)
    container = next(iter(made.dialects))
    out = tmp_path / f"a.{container}"
    run_job(examples / "flux1-shapes", out, Request(container, type=made))
    (report,) = audit(out, full=True)
    assert report.findings == ()


def test_every_rule_of_gguf_is_broken_here():
    assert set(GGUF_BROKEN) == {rule.name for rule in GGUF_RULES}


@pytest.mark.parametrize("name", [*GGUF_BROKEN, *ALSO])
def test_gguf_rule(tmp_path, name):
    rule, options = ALSO[name] if name in ALSO else (name, GGUF_BROKEN[name])
    (report,) = audit(gguf(tmp_path / "a.gguf", **options))
    assert rule in report.counts
    severity = next(row.severity for row in GGUF_RULES if row.name == rule)
    found = next(one for one in report.findings if one.rule == rule)
    assert found.severity == severity
    assert found.expected
    assert found.found
    assert found.source
    assert bool(report.violations) >= (severity == "violation")


@pytest.mark.parametrize("name", ["magic", "version", "cut", "counts"])
def test_a_header_that_cannot_be_read_is_a_finding(tmp_path, name):
    path = gguf(tmp_path / "a.gguf")
    raw = bytearray(path.read_bytes())
    if name == "cut":
        raw = raw[:50]
    else:
        at = {"magic": 0, "version": 4, "counts": 8}[name]
        raw[at : at + 4] = b"\xfe" * 4
    path.write_bytes(raw)
    (report,) = audit(path)
    assert (report.rules, report.violations, set(report.counts)) == (0, 1, {"header"})


def test_samples_miss_what_every_block_shows(tmp_path):
    raw = np.zeros((8 * 4096, 34), np.uint8)
    raw[8192, :2] = np.frombuffer(NAN, np.uint8)
    path = gguf(tmp_path / "a.gguf", one(dims=(32 * 8, 4096), raw=raw.tobytes()))
    assert "finite" not in audit(path)[0].counts
    assert audit(path, full=True)[0].counts["finite"] == 1
    raw[-1, :2] = np.frombuffer(NAN, np.uint8)
    path = gguf(tmp_path / "a.gguf", one(dims=(32 * 8, 4096), raw=raw.tobytes()))
    assert audit(path)[0].counts["finite"] == 1


BLOCK_TYPES = [
    name
    for name, row in STORAGE.items()
    if row.is_block and name not in ("Q8_1", "Q8_K", "Q1_0", "MXFP4", "NVFP4")
]


@pytest.mark.oracle
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_block_is_not_finite_where_gguf_py_decodes_it_so(name):
    reference = pytest.importorskip("gguf")
    row = STORAGE[name]
    raw = np.random.default_rng(3).integers(0, 256, (4096, row.block_nbytes), np.uint8)
    kind = reference.GGMLQuantizationType(row.ggml_id)
    with np.errstate(all="ignore"):
        values = reference.dequantize(raw, kind).reshape(len(raw), -1)
    bad = ~np.isfinite(values).all(axis=1)
    assert 0 < bad.sum() < len(raw) // 2
    assert not_finite(name, raw.reshape(-1)) == bad.sum()
    assert not_finite(name, raw[bad].reshape(-1)) == bad.sum()


def test_scales_that_are_powers_of_two_have_one_nan():
    raw = np.zeros((256, 17), np.uint8)
    raw[:, 0] = np.arange(256)
    assert not_finite("MXFP4", raw.reshape(-1)) == 1
    assert not_finite("NVFP4", np.full(36, 255, np.uint8)) == 0


@pytest.mark.oracle
@pytest.mark.parametrize("name", CODES)
def test_no_encoder_writes_the_codes_without_use(name):
    reference = pytest.importorskip("gguf")
    x = np.random.default_rng(3).standard_normal((64, 1024)).astype("f4")
    raw = reference.quantize(x, reference.GGMLQuantizationType[name])
    assert unused_codes(name, raw.reshape(-1)) == 0
    damaged = raw.copy()
    damaged[:, 2 if name == "Q8_0" else 0] = {"Q8_0": 0x80, "TQ2_0": 0xC0, "TQ1_0": 1}[name]
    expected = len(raw) if name != "TQ1_0" else 0
    values = {(n * 256 + 242) // 243 for n in range(243)}
    if name == "TQ1_0":
        damaged[:, 0] = next(code for code in range(256) if code not in values)
        expected = len(raw)
    assert unused_codes(name, damaged.reshape(-1)) == expected


def st(path, header, data=b"", *, raw=None, space=True):
    head = json.dumps(header).encode() if raw is None else raw
    head += b" " * (-len(head) % 8 if space else 0)
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def layer(**parts):
    """Header and data of a layer: part -> (dtype, shape, bytes)."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in parts.items():
        header[name.replace("__", ".")] = entry(dtype, shape, len(data), len(data) + len(raw))
        data += raw
    return header, data


def blob(value):
    raw = json.dumps(value).encode()
    return "U8", [len(raw)], raw


F8 = ("F8_E4M3", [4, 8], bytes(32))
ONE = ("F32", [], np.array(1, "<f4").tobytes())
FP8 = {"l__weight": F8, "l__weight_scale": ONE, "l__comfy_quant": blob({"format": "float8_e4m3fn"})}
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 32]}
NF4 = {
    "l__weight": ("U8", [64, 1], bytes(64)),
    "l__weight__absmax": ("F32", [2], bytes(8)),
    "l__weight__quant_map": ("F32", [16], bytes(64)),
    "l__weight__quant_state__bitsandbytes__nf4": blob(STATE),
}
NESTED = {
    **NF4,
    "l__weight__absmax": ("U8", [2], bytes(2)),
    "l__weight__nested_absmax": ("F32", [1], bytes(4)),
    "l__weight__nested_quant_map": ("F32", [256], bytes(1024)),
    "l__weight__quant_state__bitsandbytes__nf4": blob(
        {**STATE, "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    ),
}


def names(parts):
    """bitsandbytes__nf4 keeps its two underscores."""
    header, data = layer(**parts)
    return {k.replace("bitsandbytes.", "bitsandbytes__"): v for k, v in header.items()}, data


INF = ("F32", [], np.array(np.inf, "<f4").tobytes())
META = {"_quantization_metadata": json.dumps({"layers": {"l": {"format": "float8_e4m3fn"}}})}
BARE = {key: value for key, value in FP8.items() if key != "l__comfy_quant"}
ST_BROKEN = {
    "metadata": [({"__metadata__": {"a": 1}}, b""), ({"__metadata__": []}, b"")],
    "entries": [
        ({"a": entry("F32", [2], 0, 4)}, bytes(4)),
        ({"a": entry("Q9", [2], 0, 4)}, bytes(4)),
        ({"a": {"dtype": "F32"}}, b""),
        ({"a": entry("F32", [-2], 0, 8)}, bytes(8)),
    ],
    "tiles": [
        ({"a": entry("F32", [1], 4, 8)}, bytes(8)),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, bytes(4)),
        ({"a": entry("F32", [1], 0, 4)}, bytes(5)),
        ({"a": entry("F32", [1], 0, 4)}, bytes(3)),
    ],
    "aligned": [({"a": entry("U8", [1], 0, 1), "b": entry("F32", [1], 1, 5)}, bytes(5))],
    "layers": [
        ({"__metadata__": {"_quantization_metadata": "["}}, b""),
        ({"__metadata__": {"_quantization_metadata": "{}"}}, b""),
        ({"__metadata__": {"_quantization_metadata": '{"layers": {"a": 1}}'}}, b""),
    ],
    "comfy_marker": [
        names({**FP8, "l__comfy_quant": blob({"convrot": True})}),
        names({**FP8, "l__comfy_quant": blob([])}),
        names({**FP8, "l__comfy_quant": ("U8", [1], b"{")}),
        names({**FP8, "l__comfy_quant": ("F32", [1], bytes(4))}),
        names({**FP8, "l__comfy_quant": ("U8", [5000], bytes(5000))}),
    ],
    "comfy_format": [names({**FP8, "l__comfy_quant": blob({"format": "int8_blockwise"})})],
    "comfy_parts": [
        names({**FP8, "l__weight": ("I8", [4, 8], bytes(32))}),
        names({**FP8, "l__weight_scale": ("BF16", [], bytes(2))}),
        names({k: v for k, v in FP8.items() if k != "l__weight_scale"}),
        ({"__metadata__": META}, b""),
    ],
    "comfy_scale": [
        names({**FP8, "l__weight_scale": ("F32", [3], bytes(12))}),
        names(
            {
                "l__weight": ("I8", [4, 8], bytes(32)),
                "l__weight_scale": ONE,
                "l__comfy_quant": blob({"format": "int8_tensorwise", "convrot": True}),
            }
        ),
    ],
    "unmarked": [
        names(BARE),
        names({"l__weight": F8, "scaled_fp8": ("F8_E4M3", [0], b"")}),
    ],
    "comfy_params": [
        names(
            {
                **FP8,
                "l__comfy_quant": blob(
                    {"format": "float8_e4m3fn", "group_size": 1, "params": {"group_size": 2}}
                ),
            }
        )
    ],
    "scaled_fp8": [
        names({"l__weight": F8, "l__scale_weight": ONE, "scaled_fp8": ("F8_E5M2", [0], b"")}),
        names(
            {
                "l__weight": ("F8_E5M2", *F8[1:]),
                "l__scale_weight": ONE,
                "scaled_fp8": ("F8_E5M2", [0], b""),
            }
        ),
        names({"l__weight": F8, "l__weight_scale": ONE, "scaled_fp8": ("F32", [0], b"")}),
        names(
            {
                "l__weight": F8,
                "l__scale_weight": ("BF16", [1], b"\x80\x3f"),
                "scaled_fp8": ("F8_E4M3", [2], bytes(2)),
            }
        ),
    ],
    "bare_fp8": [names({"l__weight": F8})],
    "nvfp4_order": [
        names(
            {
                "l__weight": ("U8", [4, 8], bytes(32)),
                "l__weight_scale": ("F8_E4M3", [4, 1], bytes(4)),
                "l__weight_scale_2": ONE,
            }
        )
    ],
    "bnb": [
        names({**NF4, "l__weight__absmax": ("F32", [3], bytes(12))}),
        names({**NF4, "l__weight__quant_map": ("F32", [15], bytes(60))}),
        names({**NF4, "l__weight": ("U8", [63, 1], bytes(63))}),
        names({**NF4, "l__weight__extra": ONE}),
        names({**NESTED, "l__weight__nested_absmax": ("F32", [2], bytes(8))}),
        *(
            names({**NF4, "l__weight__quant_state__bitsandbytes__nf4": blob(value)})
            for value in (
                {},
                [],
                {**STATE, "quant_type": "fp4"},
                {**STATE, "blocksize": 63},
                {**STATE, "shape": "x"},
                {**STATE, "nested_blocksize": 0},
            )
        ),
        names({**NF4, "l__weight__quant_state__bitsandbytes__fp4": blob(STATE)}),
    ],
    "finite_scales": [names({**FP8, "l__weight_scale": INF})],
    "finite": [
        names({"a": ("BF16", [1], b"\x80\x7f")}),
        names({"a": ("F8_E4M3", [2], b"\x00\xff")}),
    ],
}


def test_every_rule_of_safetensors_is_broken_here():
    assert set(ST_BROKEN) == {rule.name for rule in SAFETENSORS_RULES}


@pytest.mark.parametrize(
    ("rule", "index"), [(rule, i) for rule, rows in ST_BROKEN.items() for i in range(len(rows))]
)
def test_safetensors_rule(tmp_path, rule, index):
    (report,) = audit(st(tmp_path / "a.safetensors", *ST_BROKEN[rule][index]))
    assert rule in report.counts, report.findings
    severity = next(row.severity for row in SAFETENSORS_RULES if row.name == rule)
    assert {one.severity for one in report.findings if one.rule == rule} == {severity}


LEGACY = {"l__weight": F8, "l__scale_weight": ONE, "scaled_fp8": ("F8_E4M3", [2], bytes(2))}


@pytest.mark.parametrize("parts", [FP8, NF4, NESTED, LEGACY])
def test_packed_layers_as_their_programs_write_them_are_clean(tmp_path, parts):
    (report,) = audit(st(tmp_path / "a.safetensors", *names(parts)))
    # json text of odd length moves what follows it; that alone is a warning
    assert set(report.counts) <= {"aligned"}
    header, data = names(BARE)
    (report,) = audit(st(tmp_path / "a.safetensors", {"__metadata__": META, **header}, data))
    assert report.violations == report.warnings == 0


@pytest.mark.parametrize(
    "raw", [b'{"a": 1, "a": 2}', b"[]", b"{", b'{"\xff": 1}', b"x"], ids=range(5)
)
def test_headers_that_are_no_json_object(tmp_path, raw):
    (report,) = audit(st(tmp_path / "a.safetensors", {}, raw=raw, space=False))
    assert set(report.counts) == {"header"}
    assert report.rules == 0


def test_a_header_of_odd_length_is_a_warning(tmp_path):
    (report,) = audit(st(tmp_path / "a.safetensors", {}, raw=b"{}", space=False))
    assert report.counts == {"aligned": 1}
    assert report.violations == 0


def test_findings_are_counted_and_not_all_kept(tmp_path):
    (report,) = audit(gguf(tmp_path / "a.gguf", [("x", (1,), 0, bytes(4))] * 100))
    assert report.counts["names_unique"] == 99
    assert len([one for one in report.findings if one.rule == "names_unique"]) == 20
    assert report.violations == 99


def test_folders_and_shards_are_audited_file_by_file(tmp_path):
    header = {"a": entry("F32", [1], 0, 4)}
    for name in ("m-1.safetensors", "m-2.safetensors"):
        st(tmp_path / name, header, bytes(4))
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    assert len(audit(index)) == len(audit(tmp_path)) == 2
    for bad in (
        "{}",
        "[",
        '{"weight_map": {"a": "../m-1.safetensors"}}',
        '{"weight_map": {"a": 1}}',
    ):
        index.write_text(bad)
        with pytest.raises(CheckpointError):
            audit(index)


def test_what_has_no_rules_is_refused(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"PK\x03\x04" + bytes(64))
    with pytest.raises(UnsupportedContainer, match="no specification that is audited here"):
        audit(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="no such file"):
        audit(tmp_path / "none.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no \.safetensors or \.gguf"):
        audit(tmp_path / "empty")


@pytest.mark.parametrize("seed", range(60))
def test_damage_anywhere_is_reported_and_never_a_crash(tmp_path, seed):
    """Whatever a few bytes become, the audit ends with findings or without, not with an error."""
    rng = np.random.default_rng(seed)
    path = gguf(tmp_path / "a.gguf") if seed % 2 else st(tmp_path / "a.safetensors", *names(NESTED))
    raw = bytearray(path.read_bytes())
    for at in rng.integers(0, min(len(raw), 400), 3):
        raw[at] = rng.integers(0, 256)
    path.write_bytes(raw[: len(raw) - int(rng.integers(0, 40))])
    for full in (False, True):
        assert len(audit(path, full=full)) == 1
