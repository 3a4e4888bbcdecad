"""Targets: what each program reads, and plans and files that keep to it."""

from __future__ import annotations

import functools
import json
import lzma
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from diffquant.convert import cutting
from diffquant.convert.binding import bind
from diffquant.convert.detect import detect
from diffquant.convert.gguf_metadata import check_arrays
from diffquant.convert.jobs import opened, run_job
from diffquant.convert.logical import ORIG_SHAPE
from diffquant.convert.plan import make_plan
from diffquant.convert.request import Request
from diffquant.convert.targets import DEFAULTS, TARGETS, Stored, candidates, target_named
from diffquant.core.dtypes import STORAGE
from diffquant.core.errors import MalformedFile, PolicyError, UnknownFormat, UsageError
from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink, open_source
from diffquant.io.gguf_values import GgufArray, GgufValue
from diffquant.quant.formats import FORMATS
from diffquant.quant.policy import Rule
from diffquant.quant.types import TYPES, type_named

FLUX, QWEN = "flux-dev.transformer.original", "qwen-image.transformer.diffusers"
MANIFESTS = Path(__file__).parents[1] / "data" / "manifests.json.xz"
K_TYPES = [name for name in TYPES if re.match(r"q\d_k", name)]
GGUF_TARGETS = [name for name, row in TARGETS.items() if "gguf" in row.reads]

# city96/ComfyUI-GGUF@795e451:dequant.py:287-301, and F32, F16 as they are
COMFYUI_GGUF = """f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0 q6_k q5_k q4_k q3_k q2_k iq4_nl iq4_xs"""
# lllyasviel/stable-diffusion-webui-forge@dfdcbab:backend/operations_gguf.py:6-16
FORGE = "f32 f16 q2_k q3_k q4_0 q4_k q4_1 q5_0 q5_1 q5_k q6_k q8_0 bf16"
# city96/ComfyUI-GGUF@795e451:loader.py:12
ARCHITECTURES = "flux sd1 sdxl sd3 aura hidream cosmos ltxv hyvid wan lumina2 qwen_image"


@functools.cache
def _manifests():
    return json.loads(lzma.decompress(MANIFESTS.read_bytes()))


def source_of(name, dtype="BF16", prefix="", more=()):
    """A source whose header is a real model's, and whose weights are not there."""
    specs = {
        prefix + key: TensorSpec(prefix + key, dtype, tuple(shape))
        for key, shape in _manifests()[name].items()
    }
    specs.update({spec.key: spec for spec in more})
    return SimpleNamespace(
        specs=specs, metadata={}, configs={}, container="safetensors", path=Path("model")
    )


def plan_of(source, **request):
    logical = bind(source)
    match = detect(logical.specs(), source.metadata, source.configs)
    return make_plan(logical, match, Request("gguf", **request))


def test_the_table_is_what_the_programs_read():
    assert TARGETS["comfyui-gguf"].reads == {"gguf": frozenset(COMFYUI_GGUF.split())}
    assert TARGETS["diffusers"].reads["gguf"] == frozenset(COMFYUI_GGUF.split())
    assert TARGETS["forge"].reads["gguf"] == frozenset(FORGE.split())
    blocks = {name.lower() for name, row in STORAGE.items() if row.is_block}
    assert TARGETS["sdcpp"].reads["gguf"] == blocks | {"f32", "f16", "bf16"}
    assert TARGETS["universal"].reads["gguf"] == frozenset(FORGE.split())
    assert [name for name, row in TARGETS.items() if row.reshapes] == ["comfyui-gguf"]


@pytest.mark.parametrize("name", TARGETS)
def test_fallbacks_end_in_what_the_target_reads(name):
    row = TARGETS[name]
    for container, reads in row.reads.items():
        assert reads
        for wanted, then in row.fallbacks.items():
            if container == "gguf" and wanted in reads:
                assert then in reads, (wanted, then)


def test_every_container_has_a_default_and_every_default_reads_it():
    for container, names in DEFAULTS.items():
        assert all(container in TARGETS[name].reads for name in names)
        assert [row.name for row in candidates("", container)] == list(names)
    for name, row in TYPES.items():
        for container in row.dialects:
            read = [t for t in candidates("", container) if row.formats <= t.reads[container]]
            assert read, f"no default target reads {name} from {container}"


def test_unknown_targets_and_wrong_containers_are_refused():
    with pytest.raises(UnknownFormat, match="unknown target 'comfyui-ggu', did you mean"):
        target_named("comfyui-ggu", "gguf")
    with pytest.raises(UsageError, match="target forge reads gguf and safetensors, not folder"):
        target_named("forge", "folder")


@pytest.mark.parametrize(
    ("target", "one", "problem"),
    [
        ("diffusers", Stored("a.weight", "iq3_s", (4, 256), True), "raises for the whole file"),
        ("comfyui-gguf", Stored("a.weight", "mxfp4", (4, 256), True), "no kernel"),
        ("universal", Stored("a.weight", "iq4_nl", (4, 256), True), "Forge"),
        ("sdcpp", Stored("a.weight", "iq3_s", (4, 256), True), ""),
        ("diffusers", Stored("a.weight", "bf16", (4, 4, 3, 3), True), "not linear layers"),
        ("comfyui-gguf", Stored("a.weight", "bf16", (4, 4, 3, 3), True), ""),
        ("comfyui-gguf", Stored("a.weight", "bf16", (4, 4, 2, 3, 3), True), "not linear layers"),
        ("comfyui-gguf", Stored("pad_token", "bf16", (1, 3840), False), "not linear layers"),
        ("comfyui-gguf", Stored("a.bias", "bf16", (4,), False), "not linear layers"),
        ("sdcpp", Stored("a.bias", "bf16", (4,), False), ""),
        ("universal", Stored("a.weight", "f32", (4, 4, 2, 3, 3), True), ""),
        ("universal", Stored("ids", "i64", (4,), False), ""),
        ("universal", Stored("x" * 128, "f32", (4,), False), "names over 127 bytes: xxx"),
    ],
)
def test_problems_name_the_tensor_and_the_reason(target, one, problem):
    found = TARGETS[target].problems("gguf", [one])
    assert bool(found) == bool(problem)
    assert problem in "".join(found)
    assert not found or one.key in found[0]


# Row lengths that are no whole blocks of 256; the refiner's attention is 768 and 1536 wide.
UNETS = {
    "sd15.unet.ldm": "rows of 320, 640 are",
    "sdxl-base.unet.ldm": "rows of 640 are",
    "sdxl-refiner.unet.ldm": "",
}


@pytest.mark.parametrize("model", UNETS)
@pytest.mark.parametrize("target", GGUF_TARGETS)
@pytest.mark.parametrize("name", K_TYPES)
def test_k_types_of_unets_per_target(model, target, name):
    source = source_of(model, "F16", "model.diffusion_model.")
    plan = plan_of(source, type=type_named(name), target=target)
    kind, row = TYPES[name], TARGETS[target]
    assert plan.target == target
    assert all(step.target.startswith("model.diffusion_model.") for step in plan.steps)
    for step in plan.steps:
        shape = step.assignment.shape
        assert step.stored in row.reads["gguf"]
        if len(shape) < 2:
            assert step.stored == "f32"
        elif len(shape) > 2 and not row.reshapes:
            assert (step.stored, step.flat) == ("f16", ())
        if step.flat:
            assert row.reshapes
            assert step.flat == (step.parameters // 256, 256)
            assert shape[-1] % 256
            assert step.packed[0].spec.shape == step.flat
        else:
            assert step.packed[0].spec.shape == shape
    packed = sum(step.parameters for step in plan.steps if step.stored in kind.formats)
    share = packed / sum(step.parameters for step in plan.steps)
    if row.reshapes:
        assert share > 0.98
        assert not any(step.decision.wanted for step in plan.steps)
        assert not plan.notes
    else:
        rows = [step for step in plan.steps if step.decision.wanted]
        assert bool(rows) == bool(UNETS[model])
        assert {step.assignment.shape[-1] for step in rows} <= {320, 640}
        assert all(step.stored in ("q5_0", "q5_1", "q8_0", "iq4_nl", "q4_0") for step in rows)
        (note,) = plan.notes
        assert UNETS[model] in note
        assert "convolutions stay f16; --target comfyui-gguf packs them" in note


def test_block_types_of_32_fit_a_unet_without_reshapes():
    source = source_of("sdxl-base.unet.ldm", "F16", "model.diffusion_model.")
    plan = plan_of(source, type=type_named("q8_0"), target="comfyui-gguf")
    linear = [step for step in plan.steps if len(step.assignment.shape) == 2]
    assert not any(step.flat for step in linear)
    convs = [step for step in plan.steps if len(step.assignment.shape) == 4]
    whole = [step.key for step in convs if not step.flat]
    assert whole == ["input_blocks.0.0.weight", "out.2.weight"]


@pytest.mark.parametrize("name", [n for n in TYPES if TYPES[n].edge])
def test_qwen_image_stores_its_first_and_last_block_as_the_peers_do(name):
    plan = plan_of(source_of(QWEN), type=type_named(name))
    kind = TYPES[name]
    last = max(int(key.split(".")[1]) for key in source_of(QWEN).specs
               if key.startswith("transformer_blocks."))  # fmt: skip
    assert last == 59
    for step in plan.steps:
        if len(step.assignment.shape) < 2 or not step.key.startswith("transformer_blocks."):
            continue
        edge = step.key.startswith(("transformer_blocks.0.", "transformer_blocks.59."))
        v = re.search(r"\.(to_v|add_v_proj)\.weight$", step.key)
        down = re.search(r"\.(img|txt)_mlp\.net\.2\.weight$", step.key)
        family = "v" if v else "ffn_down" if down else ""
        _, early, late = kind.mix.get(family, (0, kind.base, kind.base))
        assert step.stored in ((kind.edge,) if edge else (early, late)), step.key
    plain = plan_of(source_of(FLUX), type=type_named(name), target="universal")
    assert not any("first or last" in step.decision.reason for step in plain.steps)


def test_the_first_v_tensors_are_counted_in_file_order():
    plan = plan_of(source_of(QWEN), type=type_named("q4_k_s"))
    v = [s for s in plan.steps if re.search(r"\.(to_v|add_v_proj)\.weight$", s.key)]
    assert [step.stored for step in v] == ["q5_k"] * 4 + ["q4_k"] * 116
    flux = plan_of(source_of(FLUX), type=type_named("q4_k_s"))
    assert {s.stored for s in flux.steps if "_blocks" in s.key} == {"q4_k", "f32"}


@pytest.mark.parametrize("target", GGUF_TARGETS)
@pytest.mark.parametrize("model", [FLUX, QWEN])
@pytest.mark.parametrize("name", ["q4_k_s", "bf16", "f16"])
def test_bf16_sources_keep_bf16_in_linear_layers_alone(target, model, name):
    plan = plan_of(source_of(model), type=type_named(name), target=target)
    for step in plan.steps:
        if step.stored == "bf16":
            assert len(step.assignment.shape) == 2
            assert step.key.endswith(".weight")
    assert not any(step.target.startswith("model.") for step in plan.steps)
    assert not any(step.flat for step in plan.steps)


def test_conversion_to_gguf_moves_bf16_out_of_norms_and_convolutions():
    logical = bind(source_of("sd15.unet.ldm"))
    match = detect(logical.specs(), {}, {})
    for request in (Request("gguf"), Request("gguf", dtype="bf16")):
        plan = make_plan(logical, match, request)
        assert plan.target == "universal"
        for step in plan.steps:
            dims = len(step.assignment.shape)
            assert step.stored == ("f32" if dims < 2 else "bf16" if dims == 2 else "f16")


def test_embedding_tables_are_never_bf16():
    shapes = dict(_manifests()[QWEN])
    table = TensorSpec("time_text_embed.addition_t_embedding.weight", "BF16", (2, 3072))
    assert table.key not in shapes
    for name in ("q4_k_s", "bf16"):
        source = source_of(QWEN, more=[table])
        plan = plan_of(source, type=type_named(name))
        assert plan.variant == "layered"
        (step,) = [s for s in plan.steps if s.key == table.key]
        assert step.stored == "f32"


@pytest.mark.parametrize("shape", [(), (0,), (1,)])
def test_the_marker_of_edit_2511_reaches_gguf(shape):
    marker = TensorSpec("__index_timestep_zero__", "BF16", shape)
    source = source_of(QWEN, more=[marker])
    plan = plan_of(source, type=type_named("q8_0"))
    assert plan.variant == "edit_2511"
    (step,) = [s for s in plan.steps if s.key == marker.key]
    assert (step.target, step.stored, step.packed[0].spec.shape) == (
        marker.key, "f32", shape or (1,),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "qkv", "down"), [("q4_k_s", "q5_k", "q5_k"), ("q4_k_m", "q5_k", "q6_k")]
)
def test_tuned_flux_has_down_projections(name, qkv, down):
    plan = plan_of(source_of(FLUX), type=type_named(name), policy="tuned")
    assert plan.policy == "tuned"
    stored = {step.key: step for step in plan.steps}
    for key, step in stored.items():
        if re.search(r"(img|txt)_mlp\.2\.weight$|single_blocks\.\d+\.linear2\.weight$", key):
            assert (step.stored, step.decision.reason) == (down, "tuned mix (ours): ffn_down")
        elif key.endswith("attn.qkv.weight"):
            assert step.stored == qkv
        elif re.search(r"blocks\.\d+\..*weight$", key):
            assert step.stored == TYPES[name].base
    published = plan_of(source_of(FLUX), type=type_named(name))
    assert published.policy == "published"
    assert published.nbytes < plan.nbytes


def test_tuned_qwen_image_keeps_the_first_modulation_and_only_that():
    tuned = plan_of(source_of(QWEN), type=type_named("q8_0"), policy="tuned")
    plain = plan_of(source_of(QWEN), type=type_named("q8_0"))
    differ = [
        (one.key, one.stored)
        for one, other in zip(tuned.steps, plain.steps, strict=True)
        if one.stored != other.stored
    ]
    assert differ == [("transformer_blocks.0.img_mod.1.weight", "bf16")]


def test_tuned_without_rules_is_published_and_says_so():
    source = source_of("sd15.unet.ldm", "F16")
    tuned = plan_of(source, type=type_named("q4_k_s"), policy="tuned")
    assert tuned.policy == "published"
    assert tuned.notes[0] == "no tuned rules for sd15: the published policy is used"
    plain = plan_of(source, type=type_named("q4_k_s"))
    assert [step.stored for step in tuned.steps] == [step.stored for step in plain.steps]


def test_types_a_named_target_cannot_read_are_refused_with_who_can():
    source = source_of(FLUX)
    iq = next((n for n in TYPES if n.startswith("iq")), None)
    rule = (Rule("img_attn.qkv", iq, "asked"),) if iq else (Rule("img_in", "bf16", "asked"),)
    if iq:
        with pytest.raises(PolicyError, match=rf"universal cannot read .* as {iq}.*--target"):
            plan_of(source, type=type_named(iq), target="universal")
        assert plan_of(source, type=type_named(iq)).target in ("diffusers", "sdcpp")
        plan = plan_of(source, type=type_named("q8_0"), rules=rule)
        assert plan.target in ("diffusers", "sdcpp")
        assert plan.warnings[0].startswith(f"written for {plan.target}, since universal cannot")


def test_bf16_convolutions_by_rule_go_where_they_are_read():
    source = source_of("sd15.unet.ldm", "F16")
    rule = (Rule(r"input_blocks\.1\.0\.in_layers\.2\.weight", "bf16", "asked"),)
    for target in ("universal", "diffusers", "forge"):
        with pytest.raises(PolicyError, match=f"{target} cannot read 1 packed or BF16 tensors"):
            plan_of(source, type=type_named("q8_0"), rules=rule, target=target)
    plan = plan_of(source, type=type_named("q8_0"), rules=rule)
    assert plan.target == "sdcpp"


def test_long_names_are_refused_with_the_list():
    long = "transformer_blocks.0." + "x" * 120 + ".weight"
    tensors = [Stored(long, "f16", (4, 4), True), Stored("ok", "f32", (4,), False)]
    (found,) = TARGETS["sdcpp"].problems("gguf", tensors)
    assert found == f"names over 127 bytes: {long}"


@pytest.mark.parametrize("target", ["universal", "sdcpp"])
def test_array_keys_beside_a_5d_tensor_are_refused(target):
    deep = [TensorSpec("patch.weight", "F32", (2, 2, 1, 2, 2))]
    for value in (GgufValue("i32", (1, 2)), GgufArray("i32", 0, b""), [1, 2], ("a",)):
        with pytest.raises(PolicyError, match=r"5 dimensions.*array metadata.*tokens"):
            check_arrays(TARGETS[target], deep, {"tokens": value})
        check_arrays(TARGETS["comfyui-gguf"], deep, {"tokens": value})
    check_arrays(TARGETS[target], deep, {"name": "x", "n": 3})
    check_arrays(TARGETS[target], [TensorSpec("a", "F32", (2, 2))], {"tokens": [1]})


@pytest.fixture(scope="module")
def reshaped(examples, tmp_path_factory):
    """sd15-shapes as q4_k_s for ComfyUI-GGUF."""
    path = tmp_path_factory.mktemp("reshaped") / "sd.gguf"
    request = Request("gguf", type=type_named("q4_k_s"), target="comfyui-gguf")
    return path, run_job(examples / "sd15-shapes", path, request)


def header_keeps_the_rules_of_comfyui_gguf(path):
    """What city96/ComfyUI-GGUF@795e451:loader.py:12-24,57-91,122-124 asks of a file."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    field = reader.get_field("general.architecture")
    assert field.types == [gguf.GGUFValueType.STRING]
    assert field.contents() in ARCHITECTURES.split()
    names = [one.name for one in reader.tensors]
    prefixed = [name.startswith("model.diffusion_model.") for name in names]
    assert all(prefixed) or not any(prefixed)
    for one in reader.tensors:
        assert len(one.name.encode()) <= 127
        assert one.tensor_type.name.lower() in COMFYUI_GGUF.split()
        original = reader.get_field(f"comfy.gguf.orig_shape.{one.name}")
        shape = tuple(int(size) for size in reversed(one.shape))
        if original is not None:
            assert original.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
            shape = tuple(original.contents())
        if one.tensor_type.name not in ("F32", "F16"):
            assert one.name.endswith(".weight")
            assert len(shape) in (2, 4)
            assert one.tensor_type.name != "BF16" or len(shape) == 2
    return reader


@pytest.mark.oracle
def test_reshaped_files_keep_comfyuis_rules_and_decode_as_gguf_py_does(reshaped, examples):
    gguf = pytest.importorskip("gguf")
    path, report = reshaped
    reader = header_keeps_the_rules_of_comfyui_gguf(path)
    originals = {n: f.contents() for n, f in reader.fields.items() if n.startswith(ORIG_SHAPE)}
    assert len(originals) > 100
    with opened(path) as (_, logical, match):
        assert match.variant == report.variant
        for one in reader.tensors:
            shape = originals.get(ORIG_SHAPE + one.name)
            expected = gguf.dequantize(one.data, one.tensor_type).reshape(-1)
            tensor = logical.tensors[one.name]
            assert tensor.shape == tuple(shape or (int(n) for n in reversed(one.shape)))
            assert np.array_equal(logical.read(one.name).reshape(-1), expected)
            rows = tensor.shape[0]
            if len(tensor.shape) > 1:  # rows that begin and end inside blocks
                some = logical.read(one.name, (rows // 3, rows // 3 + 1))
                assert np.array_equal(
                    some.reshape(-1), expected.reshape(rows, -1)[rows // 3], equal_nan=True
                )
    assert report.mixed is False


@pytest.mark.oracle
@pytest.mark.parametrize(
    "model", ["flux1-shapes", "qwen-image-shapes", "sdxl-shapes", "sd15-shapes"]
)
@pytest.mark.parametrize("target", GGUF_TARGETS)
def test_files_of_every_target_keep_comfyuis_rules(examples, model, target, tmp_path):
    if target == "sdcpp" and model == "sdxl-shapes":
        pytest.skip("differs from universal in its fallbacks alone")
    path = tmp_path / "a.gguf"
    run_job(examples / model, path, Request("gguf", type=type_named("q4_k_m"), target=target))
    reader = header_keeps_the_rules_of_comfyui_gguf(path)
    arrays = [n for n in reader.fields if n.startswith(ORIG_SHAPE)]
    assert bool(arrays) == (target == "comfyui-gguf" and model.startswith("sd"))
    assert reader.get_field("diffquant.target").contents() == target
    assert reader.get_field("diffquant.policy").contents() == "published"


def test_chunks_of_reshaped_tensors_make_the_same_bytes(reshaped, examples, tmp_path, monkeypatch):
    path, _ = reshaped
    monkeypatch.setattr(cutting, "CHUNK", 3000)
    again = tmp_path / "again.gguf"
    request = Request("gguf", type=type_named("q4_k_s"), target="comfyui-gguf")
    with opened(examples / "sd15-shapes") as (_, logical, match):
        plan = make_plan(logical, match, request)
        flat = [step for step in plan.steps if step.flat]
        assert max(len(cutting.chunks_of(step)) for step in flat) > 10
        assert {step.row_multiple for step in flat} == {2, 4}
    run_job(examples / "sd15-shapes", again, request)
    assert again.read_bytes() == path.read_bytes()


def test_reshaped_files_convert_back_whole(reshaped, tmp_path):
    path, _ = reshaped
    out = tmp_path / "back.safetensors"
    run_job(path, out, Request("safetensors", dtype="f32"))
    with opened(path) as (_, mine, _), opened(out) as (_, back, _):
        assert {k: t.shape for k, t in mine.tensors.items()} == {
            k: t.shape for k, t in back.tensors.items()
        }
        for key in mine.tensors:
            assert np.array_equal(mine.read(key), back.read(key))


def test_reshaped_weights_are_copied_for_who_reads_them_and_decoded_for_others(reshaped, tmp_path):
    path, _ = reshaped
    same = tmp_path / "same.gguf"
    run_job(path, same, Request("gguf", target="comfyui-gguf"))
    with open_source(path) as one, open_source(same) as other:
        assert dict(one.specs) == dict(other.specs)
        assert all(np.array_equal(one.read(key), other.read(key)) for key in one.specs)
        for key in one.metadata:
            if key.startswith(ORIG_SHAPE):
                assert tuple(one.metadata[key]) == tuple(other.metadata[key])
    with opened(path) as (_, logical, match):
        plan = make_plan(logical, match, Request("gguf", target="universal"))
    moved = [
        s
        for s in plan.steps
        if "needs a reshape that only ComfyUI-GGUF undoes" in s.decision.reason
    ]
    assert moved
    assert {s.stored for s in moved} == {"f16", "bf16"}
    assert all((s.stored == "f16") == (len(s.assignment.shape) > 2) for s in moved)
    assert not any(step.flat for step in plan.steps)


def _gguf(path, tensors, metadata):
    specs = [TensorSpec(key, dtype, shape) for key, dtype, shape, _ in tensors]
    with open_sink(path, specs, metadata, force=True) as sink:
        for key, _, _, data in tensors:
            sink.write(key, 0, np.ascontiguousarray(data).reshape(-1).view(np.uint8))
        sink.commit()
    return path


def test_half_precision_tensors_that_others_reshaped_come_back(tmp_path):
    """ComfyUI-GGUF reshapes what stays F16 as well."""
    values = np.arange(32 * 16 * 9, dtype=np.float16) / np.float16(64)
    key = "model.diffusion_model.a.weight"
    metadata = {ORIG_SHAPE + key: GgufValue("i32", (32, 16, 3, 3))}
    path = _gguf(tmp_path / "a.gguf", [(key, "F16", (18, 256), values)], metadata)
    with open_source(path) as source:
        logical = bind(source)
        tensor = logical.tensors[key]
        assert (tensor.shape, tensor.reshaped) == ((32, 16, 3, 3), (18, 256))
        assert logical.specs()[key].shape == (32, 16, 3, 3)
        assert np.array_equal(logical.read(key), values.reshape(32, -1).astype(np.float32))
        assert np.array_equal(
            logical.read(key, (5, 9)), values.reshape(32, -1)[5:9].astype(np.float32)
        )


@pytest.mark.parametrize(
    "value",
    [
        GgufValue("i32", (16, 17)),
        GgufValue("i32", (-32, -16, 3, 3)),
        GgufValue("i32", (0, 16, 3, 3)),
        GgufValue("i32", (2**31 - 1, 2**31 - 1, 2, 2)),
        GgufValue("i64", (32, 16, 3, 3)),
        GgufValue("u32", 4608),
        GgufValue("str", ("32", "144")),
        GgufArray("i32", 0, b""),
        GgufValue("i32", (1,) * 8 + (4608,)),
    ],
)
def test_original_shapes_that_do_not_fit_are_malformed(tmp_path, value):
    data = np.zeros(4608, np.float16)
    metadata = {ORIG_SHAPE + "a.weight": value}
    path = _gguf(tmp_path / "a.gguf", [("a.weight", "F16", (18, 256), data)], metadata)
    with open_source(path) as source, pytest.raises(MalformedFile, match=r"a\.weight.*4608"):
        bind(source)


def test_original_shapes_of_other_tensors_and_containers_say_nothing(tmp_path):
    data = np.zeros(4608, np.float16)
    metadata = {ORIG_SHAPE + "gone.weight": GgufValue("i32", (7,))}
    path = _gguf(tmp_path / "a.gguf", [("a.weight", "F16", (18, 256), data)], metadata)
    with open_source(path) as source:
        assert bind(source).tensors["a.weight"].reshaped == ()


def test_gguf_holds_no_infinity_that_the_source_did_not_have(examples, tmp_path, write, load):
    """A kept BF16 convolution beyond F16's range is refused by name, not written as infinity."""
    from diffquant.core.errors import QuantError

    with open_source(
        examples / "sd15-shapes" / "unet" / "diffusion_pytorch_model.safetensors"
    ) as s:
        rows = {}
        for key, spec in s.specs.items():
            values = s.read(key).view(np.float16).astype(np.float32).reshape(spec.shape)
            if key == "conv_in.weight":
                values = values.copy()
                values[0, 0, 0, 0] = 70000
            rows[key] = values
    path = write(tmp_path / "big.safetensors", rows)
    with pytest.raises(
        QuantError, match=r"input_blocks\.0\.0\.weight: values up to 7e\+04 overflow"
    ):
        run_job(path, tmp_path / "a.gguf", Request("gguf", type=type_named("q8_0")))
    assert not (tmp_path / "a.gguf").exists()


def test_every_format_of_a_type_is_known_or_waited_for():
    for row in TYPES.values():
        assert row.formats <= set(FORMATS)
