"""Text encoders as GGUF: names, headers, tokenizers, both directions, other programs as readers."""

from __future__ import annotations

import base64
import functools
import json
import lzma
import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from diffquant.convert.architectures.parts import PARTS
from diffquant.convert.encoders.spiece import read_spiece
from diffquant.convert.encoders.tokenizer import tokenizer_pairs
from diffquant.convert.jobs import opened, run_job
from diffquant.convert.plan import Request
from diffquant.convert.rules import apply_rules
from diffquant.core.errors import MalformedFile, PolicyError, UnknownArchitecture, UsageError
from diffquant.inspect.describe import describe
from diffquant.quant.types import type_named

DATA = Path(__file__).parents[1] / "data" / "manifests.json.xz"

# What ComfyUI-GGUF does to names of language models, in this order
# (city96/ComfyUI-GGUF@795e451:loader.py, T5_SD_MAP and LLAMA_SD_MAP).
COMFY_T5 = {
    "enc.": "encoder.", ".blk.": ".block.", "token_embd": "shared",
    "output_norm": "final_layer_norm", "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k", "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o", "attn_norm": "layer.0.layer_norm",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_up": "layer.1.DenseReluDense.wi_1", "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_gate": "layer.1.DenseReluDense.wi_0", "ffn_norm": "layer.1.layer_norm",
}  # fmt: skip
COMFY_LLAMA = {
    "blk.": "model.layers.", "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_norm": "post_attention_layernorm", "token_embd": "model.embed_tokens",
    "output_norm": "model.norm", "output.weight": "lm_head.weight",
}  # fmt: skip
COMFY_VISION = {
    "mm.": "visual.merger.mlp.", "v.post_ln.": "visual.merger.ln_q.",
    "v.patch_embd": "visual.patch_embed.proj", "v.blk.": "visual.blocks.",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate": "mlp.gate_proj",
    "attn_out.": "attn.proj.", "ln1.": "norm1.", "ln2.": "norm2.",
}  # fmt: skip


@functools.cache
def _manifests():
    return json.loads(lzma.decompress(DATA.read_bytes()))


def shapes_of(name):
    return {key: tuple(shape) for key, shape in _manifests()[name].items()}


def comfy_names(keys, table):
    found = set()
    for key in keys:
        for theirs, ours in table.items():
            key = key.replace(theirs, ours)
        found.add(key)
    return found


def _real(name):
    """A real header's shapes, the image tower left out."""
    return {key: shape for key, shape in shapes_of(name).items() if "visual." not in key}


def qwen_shapes(*, layers=2, norms=False, base="model.", head=True):
    """Names and small shapes of a Qwen language model, as transformers saves them."""
    shapes = {f"{base}embed_tokens.weight": (300, 64), f"{base}norm.weight": (64,)}
    for i in range(layers):
        at = f"{base}layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", 64, 64), ("self_attn.k_proj", 32, 64),
            ("self_attn.v_proj", 32, 64), ("self_attn.o_proj", 64, 64),
            ("mlp.gate_proj", 96, 64), ("mlp.up_proj", 96, 64), ("mlp.down_proj", 64, 96),
        ):  # fmt: skip
            shapes[f"{at}{name}.weight"] = (rows, columns)
            if not norms and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                shapes[f"{at}{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}{name}.weight"] = (64,)
        if norms:
            shapes |= {f"{at}self_attn.{one}_norm.weight": (16,) for one in "qk"}
    if head:
        shapes["lm_head.weight"] = (300, 64)
    return shapes


def tensors_of(shapes, seed=0):
    random = np.random.default_rng(seed)
    return {key: random.standard_normal(shape).astype("<f4") for key, shape in shapes.items()}


def targets(component, shapes, layout, target):
    return {one.target: one.shape for one in apply_rules(
        component.rules(shapes, layout, target), shapes)}  # fmt: skip


def header(path):
    """Fields of a GGUF file as gguf-py reads them: name -> (type names, value)."""
    fields = gguf.GGUFReader(path).fields
    return {
        name: (tuple(one.name for one in field.types), field.contents())
        for name, field in fields.items()
    }


NAMED = [  # kind, shapes, layout, llama.cpp's architecture, number of blocks
    ("t5_encoder", shapes_of("t5-xxl-encoder.hf"), "canonical", gguf.MODEL_ARCH.T5ENCODER, 24),
    ("qwen2_vl_text", qwen_shapes(), "canonical", gguf.MODEL_ARCH.QWEN2VL, 2),
    ("qwen3_text", qwen_shapes(norms=True), "canonical", gguf.MODEL_ARCH.QWEN3, 2),
    ("qwen2_vl_text", _real("qwen2.5-vl-7b.hf"), "canonical", gguf.MODEL_ARCH.QWEN2VL, 28),
    ("qwen3_text", _real("qwen3-4b.hf"), "canonical", gguf.MODEL_ARCH.QWEN3, 36),
]


@pytest.mark.parametrize(("kind", "shapes", "layout", "arch", "blocks"), NAMED)
def test_names_are_those_of_gguf_py(kind, shapes, layout, arch, blocks):
    component = PARTS[kind].components[0]
    theirs = gguf.get_tensor_name_map(arch, blocks)
    expected = {theirs.get_name(key, try_suffixes=(".weight", ".bias")) for key in shapes}
    found = targets(component, shapes, layout, "gguf")
    assert found.keys() == expected
    assert targets(component, found, "gguf", "canonical") == shapes


@pytest.mark.parametrize(
    ("kind", "table", "shapes"),
    [("t5_encoder", COMFY_T5, NAMED[0][1]), ("qwen2_vl_text", COMFY_LLAMA, NAMED[3][1])],
)
def test_comfyui_gguf_renames_them_to_transformers_names(kind, table, shapes):
    found = targets(PARTS[kind].components[0], shapes, "canonical", "gguf")
    assert comfy_names(found, table) == shapes.keys()


def test_comfyui_gguf_finds_the_image_tower_s_names():
    every = shapes_of("qwen2.5-vl-7b.hf")
    tower = {key: shape for key, shape in every.items() if key.startswith("visual.")}
    component = PARTS["qwen2_vl_vision"].components[0]
    found = targets(component, tower, "canonical", "gguf")
    assert targets(component, found, "gguf", "canonical") == tower
    # It then joins q, k and v, and stacks the two frames.
    joined = {re.sub(r"attn_[qkv]\.", "attn.qkv.", key).removesuffix(".1") for key in found}
    assert comfy_names(joined, COMFY_VISION) == tower.keys()


def test_newer_transformers_names_of_qwen_lead_to_the_same_file():
    component = PARTS["qwen2_vl_text"].components[0]
    newer = qwen_shapes(base="model.language_model.")
    found = targets(component, newer, "alternate", "gguf")
    assert found == targets(component, qwen_shapes(), "canonical", "gguf")


def test_qwen3_saved_without_its_head_leads_to_llama_names():
    component = PARTS["qwen3_text"].components[0]
    bare = qwen_shapes(norms=True, base="", head=False)
    found = targets(component, bare, "alternate", "gguf")
    whole = targets(component, qwen_shapes(norms=True), "canonical", "gguf")
    assert found.keys() == whole.keys() - {"output.weight"}


def test_t5_without_gate_has_one_up_projection():
    shapes = {
        key.replace("wi_1", "wi"): shape
        for key, shape in shapes_of("t5-xxl-encoder.hf").items()
        if "wi_0" not in key
    }
    component = PARTS["t5_encoder"].components[0]
    found = targets(component, shapes, "canonical", "gguf")
    assert "enc.blk.3.ffn_up.weight" in found
    assert targets(component, found, "gguf", "canonical") == shapes


ENCODERS = [  # demo, part, type, general.architecture
    ("flux1-shapes", "text_encoder_2", "f32", "t5encoder"),
    ("flux1-shapes", "text_encoder", "f32", "clip"),
    ("sdxl-shapes", "text_encoder_2", "f32", "clip"),
    ("qwen-image-shapes", "text_encoder", "f32", "qwen2vl"),
    ("qwen-image-shapes", "mmproj", "f32", "clip"),
]


@pytest.fixture(scope="module")
def written(examples, tmp_path_factory):
    """(demo, part) -> GGUF file in float32."""
    folder = tmp_path_factory.mktemp("encoders")
    found = {}
    for demo, part, kind, _ in ENCODERS:
        out = folder / f"{demo}-{part}.gguf"
        run_job(examples / demo, out, Request("gguf", type_named(kind), parts=(part,)))
        found[demo, part] = out
    return found


def source_tensors(examples, demo, part):
    import torch
    from safetensors.torch import load_file

    folder = "text_encoder" if part == "mmproj" else part
    found = load_file(examples / demo / folder / "model.safetensors")
    tower = [key for key in found if key.startswith("visual.")]
    keep = tower if part == "mmproj" else [key for key in found if key not in tower]
    return {key: found[key].to(torch.float32).numpy() for key in keep}


@pytest.mark.parametrize(("demo", "part", "kind", "architecture"), ENCODERS)
def test_gguf_and_back_gives_the_source_s_names_and_numbers(
    examples, written, tmp_path, load, demo, part, kind, architecture
):
    back = tmp_path / "back.safetensors"
    run_job(written[demo, part], back, Request("safetensors"))
    expected, (found, _) = source_tensors(examples, demo, part), load(back)
    if (demo, part) == ("sdxl-shapes", "text_encoder_2"):  # single files have OpenCLIP's names
        projection = found["text_projection"][2].view("<f4").reshape(128, 128)
        assert np.array_equal(projection.T, expected["text_projection.weight"])
        with opened(back) as (_, _, match):
            assert match.architecture == "openclip_text"
        return
    assert found.keys() == expected.keys()
    for key, (dtype, shape, raw) in found.items():
        assert (dtype, shape) == ("F32", expected[key].shape)
        assert np.array_equal(raw.view("<f4").reshape(shape), expected[key]), key


@pytest.mark.parametrize(("demo", "part", "kind", "architecture"), ENCODERS)
def test_header_says_what_it_is_and_inspect_reads_it(written, demo, part, kind, architecture):
    fields = header(written[demo, part])
    assert fields["general.architecture"] == (("STRING",), architecture)
    assert fields["general.type"][1] == ("mmproj" if part == "mmproj" else "model")
    report = describe(written[demo, part])
    assert report.kind == "text_encoder"
    assert report.architecture in PARTS
    assert [one.tensors for one in report.parts] == [report.tensors]


def test_vectors_and_tables_are_f32_whatever_the_source(examples, tmp_path):
    out = tmp_path / "t5.gguf"
    report = run_job(examples / "flux1-shapes", out, Request("gguf", parts=("text_encoder_2",)))
    stored = {row.key: row.stored for row in report.tensors}
    assert stored["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == "f32"
    assert stored["encoder.final_layer_norm.weight"] == "f32"
    assert stored["shared.weight"] == "bf16"  # copied
    request = Request("gguf", type_named("q8_0"), parts=("text_encoder",))
    report = run_job(examples / "flux1-shapes", tmp_path / "clip.gguf", request)
    stored = {row.key: row.stored for row in report.tensors}
    assert stored["text_model.embeddings.position_embedding.weight"] == "f32"
    assert stored["text_model.embeddings.token_embedding.weight"] == "q8_0"


@pytest.mark.parametrize(
    ("name", "expected"), [("q4_k_s", "q6_k"), ("q8_0", "q8_0"), ("q4_0", "q6_k"), ("f16", "f16")]
)
def test_token_embedding_is_q6_k_or_better(examples, tmp_path, name, expected):
    request = Request("gguf", type_named(name), parts=("text_encoder_2",))
    report = run_job(examples / "flux1-shapes", tmp_path / "t5.gguf", request, dry_run=True)
    assert {row.stored for row in report.tensors if row.key == "shared.weight"} == {expected}


def test_t5_header_has_llama_cpp_s_keys_and_types(written, examples):
    fields = header(written["flux1-shapes", "text_encoder_2"])
    config = json.loads((examples / "flux1-shapes/text_encoder_2/config.json").read_text())
    keys = gguf.Keys
    at = "t5encoder"
    for key, name in (
        (keys.LLM.EMBEDDING_LENGTH, "d_model"),
        (keys.LLM.FEED_FORWARD_LENGTH, "d_ff"),
        (keys.LLM.BLOCK_COUNT, "num_layers"),
        (keys.Attention.HEAD_COUNT, "num_heads"),
        (keys.Attention.KEY_LENGTH, "d_kv"),
        (keys.Attention.VALUE_LENGTH, "d_kv"),
        (keys.Attention.REL_BUCKETS_COUNT, "relative_attention_num_buckets"),
        (keys.LLM.DECODER_START_TOKEN_ID, "decoder_start_token_id"),
    ):
        assert fields[key.format(arch=at)] == (("UINT32",), config[name]), key
    for key in (keys.Attention.LAYERNORM_EPS, keys.Attention.LAYERNORM_RMS_EPS):
        types, value = fields[key.format(arch=at)]
        assert types == ("FLOAT32",)
        assert value == pytest.approx(config["layer_norm_epsilon"])
    table = json.loads((examples / "flux1-shapes/tokenizer_2/tokenizer.json").read_text())
    texts = [text for text, _ in table["model"]["vocab"]]
    assert fields[keys.Tokenizer.LIST] == (("ARRAY", "STRING"), texts)
    assert fields[keys.Tokenizer.SCORES][1] == [score for _, score in table["model"]["vocab"]]
    types = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.UNKNOWN]
    types += [gguf.TokenType.NORMAL] * (len(texts) - 3)
    assert fields[keys.Tokenizer.TOKEN_TYPE] == (("ARRAY", "INT32"), types)
    assert fields[keys.Tokenizer.ADD_EOS] == (("BOOL",), True)
    assert [fields[key][1] for key in (keys.Tokenizer.PAD_ID, keys.Tokenizer.EOS_ID)] == [0, 1]


def test_qwen_header_has_rotary_sections_and_a_padded_vocabulary(written, examples):
    fields = header(written["qwen-image-shapes", "text_encoder"])
    assert fields["qwen2vl.rope.dimension_sections"] == (("ARRAY", "INT32"), [16, 24, 24, 0])
    assert fields["qwen2vl.rope.freq_base"] == (("FLOAT32",), 1e6)
    assert fields["qwen2vl.attention.head_count_kv"] == (("UINT32",), 1)
    assert fields["tokenizer.ggml.model"][1] == "gpt2"
    assert fields["tokenizer.ggml.pre"][1] == "qwen2"
    vocab = gguf.SpecialVocab(
        examples / "qwen-image-shapes/tokenizer", load_merges=True, n_vocab=450
    )
    assert fields["tokenizer.ggml.merges"] == (("ARRAY", "STRING"), vocab.merges)
    for word, number in vocab.special_token_ids.items():
        key = {"pad": "padding", "eos": "eos"}[word]
        assert fields[f"tokenizer.ggml.{key}_token_id"] == (("UINT32",), number)
    assert len(fields["tokenizer.ggml.tokens"][1]) == 450
    assert fields["tokenizer.ggml.token_type"][1][442:444] == [gguf.TokenType.CONTROL] * 2


def test_image_tower_is_split_as_llama_cpp_splits_it(written, examples):
    reader = gguf.GGUFReader(written["qwen-image-shapes", "mmproj"])
    found = {one.name: np.asarray(one.data) for one in reader.tensors}
    source = source_tensors(examples, "qwen-image-shapes", "mmproj")
    patch = source["visual.patch_embed.proj.weight"]
    assert np.array_equal(found["v.patch_embd.weight"], patch[:, :, 0])
    assert np.array_equal(found["v.patch_embd.weight.1"], patch[:, :, 1])
    fused = source["visual.blocks.0.attn.qkv.weight"]
    for index, one in enumerate("qkv"):
        rows = fused[index * 16 : (index + 1) * 16]
        assert np.array_equal(found[f"v.blk.0.attn_{one}.weight"], rows)
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 3)
    others = [key for key in source if "patch_embed" not in key and ".qkv." not in key]
    for key in others:
        name = theirs.get_name(key, try_suffixes=(".weight", ".bias"))
        assert np.array_equal(found[name], source[key]), key
    fields = header(written["qwen-image-shapes", "mmproj"])
    assert fields["clip.projector_type"][1] == gguf.VisionProjectorType.QWEN25VL
    assert fields["clip.vision.n_wa_pattern"] == (("UINT32",), 1)
    assert fields["clip.vision.image_mean"][0] == ("ARRAY", "FLOAT32")
    assert fields["clip.vision.projection_dim"] == (("UINT32",), 256)


def test_clip_g_of_a_single_file_gets_transformers_names(examples, tmp_path):
    single, out = tmp_path / "sdxl.safetensors", tmp_path / "clip_g.gguf"
    run_job(examples / "sdxl-shapes", single, Request("safetensors"))
    run_job(single, out, Request("gguf", type_named("f32"), parts=("text_encoder_2",)))
    expected = source_tensors(examples, "sdxl-shapes", "text_encoder_2")
    found = {one.name: np.asarray(one.data) for one in gguf.GGUFReader(out).tensors}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert np.array_equal(found[key], value), key


def test_bare_files_need_no_part_and_name_what_they_guess(write, tmp_path):
    shapes = qwen_shapes(norms=True)
    path = write(tmp_path / "qwen3.safetensors", tensors_of(shapes))
    out = tmp_path / "qwen3.gguf"
    report = run_job(path, out, Request("gguf", type_named("f16")))
    fields = header(out)
    assert report.architecture == "qwen3_text"
    assert fields["general.architecture"][1] == "qwen3"
    assert fields["qwen3.attention.head_count"] == (("UINT32",), 4)
    assert fields["qwen3.attention.key_length"] == (("UINT32",), 16)
    said = " ".join(report.warnings)
    assert "rope_theta 1000000.0" in said
    assert "no tokenizer in the source" in said
    assert "tokenizer.ggml.model" not in fields


@pytest.mark.parametrize(("rows", "heads"), [(256, 2), (512, 4)])
def test_heads_of_a_bare_qwen_follow_its_size(write, tmp_path, rows, heads):
    shapes = qwen_shapes()
    for key in list(shapes):
        if "q_proj.weight" in key or "k_proj.weight" in key:
            shapes[key] = (rows, 64)
    path = write(tmp_path / "q.safetensors", tensors_of(shapes))
    run_job(path, tmp_path / "q.gguf", Request("gguf", type_named("f16")))
    fields = header(tmp_path / "q.gguf")
    assert fields["qwen2vl.attention.head_count"][1] == heads
    assert fields["qwen2vl.attention.head_count_kv"][1] == heads


def test_a_bare_qwen_of_unknown_heads_is_refused(write, tmp_path):
    path = write(tmp_path / "q.safetensors", tensors_of(qwen_shapes()))
    with pytest.raises(PolicyError, match=r"neither .* say qwen2vl\.attention\.head_count"):
        run_job(path, tmp_path / "q.gguf", Request("gguf", type_named("f16")))


def test_gguf_to_gguf_keeps_header_and_tokenizer(written, tmp_path):
    first, out = written["flux1-shapes", "text_encoder_2"], tmp_path / "again.gguf"
    report = run_job(first, out, Request("gguf", type_named("q8_0")))
    before, after = header(first), header(out)
    kept = [key for key in before if key.startswith(("t5encoder.", "tokenizer."))]
    assert len(kept) > 20
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert report.warnings == ()


def test_base_brings_config_and_tokenizer_of_a_bare_file(examples, tmp_path):
    source = examples / "flux1-shapes/text_encoder_2/model.safetensors"
    out = tmp_path / "t5.gguf"
    request = Request("gguf", type_named("q8_0"))
    report = run_job(source, out, request, base=examples / "flux1-shapes")
    assert not [text for text in report.warnings if "published model" in text]
    assert len(header(out)["tokenizer.ggml.tokens"][1]) == 125


def test_embedded_spiece_model_becomes_the_tokenizer(write, tmp_path):
    component = PARTS["t5_encoder"].components[0]
    shapes = {
        "shared.weight": (8, 64),
        "encoder.final_layer_norm.weight": (64,),
        "encoder.block.0.layer.0.SelfAttention.q.weight": (64, 64),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (96, 64),
        "encoder.block.0.layer.1.DenseReluDense.wi_1.weight": (96, 64),
        "encoder.block.0.layer.1.DenseReluDense.wo.weight": (64, 96),
    }
    assert not component.signatures["canonical"].missing(shapes)
    raw = np.frombuffer(spiece_model(), np.uint8).copy()
    path = write(tmp_path / "t5.safetensors", {**tensors_of(shapes), "spiece_model": raw})
    out = tmp_path / "t5.gguf"
    run_job(path, out, Request("gguf", type_named("f16")))
    types = {one.name: one.tensor_type.name for one in gguf.GGUFReader(out).tensors}
    assert types["enc.blk.0.attn_rel_b.weight"] == "F32"  # 2048 elements: a table, not a matrix
    assert types["enc.blk.0.attn_q.weight"] == "F16"
    fields = header(out)
    assert fields["tokenizer.ggml.tokens"][1] == [*PIECES, *(f"[PAD{i}]" for i in range(4, 8))]
    assert fields["tokenizer.ggml.token_type"][1] == [3, 2, 1, 1, 5, 5, 5, 5]
    assert fields["tokenizer.ggml.precompiled_charsmap"][1] == list(b"map")
    assert fields["tokenizer.ggml.remove_extra_whitespaces"][1] is False


PIECES = ("<pad>", "<unk>", "\u2581a", "b")


def spiece_model():
    """A SentencePiece model with four pieces, written field by field."""

    def field(number, raw):
        return bytes([number << 3 | 2, len(raw)]) + raw

    rows = zip(PIECES, (0.0, 0.0, -1.5, -2.0), (3, 2, 1, 1), strict=True)
    pieces = b"".join(
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind]))
        for text, score, kind in rows
    )
    return pieces + field(2, b"\x18\x01") + field(3, field(2, b"map") + b"\x18\x01\x20\x00")


@pytest.mark.parametrize(
    "raw",
    [b"", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\x0a", b"not a model", b"\x80" * 20,
     spiece_model()[:-3] + b"\x0a\x7f"],
)  # fmt: skip
def test_malformed_spiece_models_are_refused(raw):
    with pytest.raises(MalformedFile, match=r"spiece\.model"):
        read_spiece(raw, "spiece.model")


def unigram(**change):
    model = {"type": "Unigram", "unk_id": 1, "vocab": [[text, -1.0] for text in PIECES]}
    return {"tokenizer.json": json.dumps({"model": {**model, **change}}).encode()}


@pytest.mark.parametrize(
    ("files", "rows", "message"),
    [
        (unigram(), 3, "4 tokens, the token embedding 3 rows"),
        (unigram(vocab=[["a"]]), 8, "rows"),
        (unigram(vocab=[["a", 1e400]]), 8, "score"),
        (unigram(vocab=[["\ud800", 0.0]]), 8, "no text"),
        ({"tokenizer.json": b"{"}, 8, "not JSON"),
        ({"tokenizer.json": b"[]"}, 8, "JSON object"),
    ],
)
def test_malformed_tokenizers_are_refused(files, rows, message):
    with pytest.raises(MalformedFile, match=message):
        tokenizer_pairs("unigram", files, rows, {})


def test_a_tokenizer_of_another_kind_is_passed_over():
    assert tokenizer_pairs("bpe", unigram(), 8, {}) == ({}, ())


def test_merges_with_spaces_are_written_byte_level():
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"], "b a", [" ", "a"]]}
    files = {"tokenizer.json": json.dumps({"model": model}).encode()}
    pairs, _ = tokenizer_pairs("bpe", files, 2, {})
    assert pairs["tokenizer.ggml.merges"] == ["a b", "b a", "\u0120 a"]


def test_character_map_and_prefix_come_from_the_normalizer():
    step = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"xyz").decode()}
    table = json.loads(unigram()["tokenizer.json"])
    table |= {
        "normalizer": {"type": "Sequence", "normalizers": [step]},
        "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"},
    }
    pairs, _ = tokenizer_pairs("unigram", {"tokenizer.json": json.dumps(table).encode()}, 8, {})
    assert pairs["tokenizer.ggml.precompiled_charsmap"] == list(b"xyz")
    assert pairs["tokenizer.ggml.add_space_prefix"] is False


def test_several_parts_or_parts_without_a_form_are_usage_errors(examples, tmp_path):
    flux, out = examples / "flux1-shapes", tmp_path / "x.gguf"
    kind = type_named("q8_0")
    with pytest.raises(UsageError, match="one by one"):
        run_job(flux, out, Request("gguf", kind, parts=("text_encoder", "text_encoder_2")))
    with pytest.raises(UsageError, match="no form for vae"):
        run_job(flux, out, Request("gguf", kind, parts=("vae",)))
    with pytest.raises(UsageError, match="no image tower"):
        run_job(flux, out, Request("gguf", kind, parts=("mmproj",)))
    with pytest.raises(UsageError, match="no part text_encoder_3"):
        run_job(flux, out, Request("gguf", kind, parts=("text_encoder_3",)))


@pytest.mark.parametrize(
    ("part", "target"),
    [("text_encoder", "comfyui-gguf"), ("text_encoder_2", "diffusers"), ("text_encoder", "forge")],
)
def test_targets_that_do_not_read_an_encoder_refuse_it(examples, tmp_path, part, target):
    request = Request("gguf", type_named("q8_0"), parts=(part,), target=target)
    with pytest.raises(PolicyError, match=f"target {target}"):
        run_job(examples / "flux1-shapes", tmp_path / "x.gguf", request)


_QWEN_CONFIG = {"model_type": "qwen2_5_vl", "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm_eps": "small"}, "layer_norm_rms_epsilon: expected f32"),
        ({"num_attention_heads": -1}, "head_count: expected u32"),
        ({"rope_scaling": {"mrope_section": ["a"]}}, r"neither .* say qwen2vl\.rope"),
        ({"rope_scaling": {"mrope_section": [1] * 5}}, r"neither .* say qwen2vl\.rope"),
    ],
)
def test_config_values_that_no_key_holds_are_refused(write, tmp_path, change, message):
    folder = tmp_path / "text"
    folder.mkdir()
    write(folder / "model.safetensors", tensors_of(qwen_shapes()))
    (folder / "config.json").write_text(json.dumps({**_QWEN_CONFIG, **change}))
    with pytest.raises(PolicyError, match=message):
        run_job(folder, tmp_path / "q.gguf", Request("gguf", type_named("f16")))
    assert not (tmp_path / "q.gguf").exists()


def test_a_file_that_is_no_encoder_stays_unknown(write, tmp_path):
    path = write(tmp_path / "x.safetensors", {"something.weight": np.zeros((4, 4), "<f4")})
    with pytest.raises(UnknownArchitecture):
        run_job(path, tmp_path / "x.gguf", Request("gguf", type_named("f16")))


# transformers' own reader of GGUF: another program that must find every weight under its name.


def _random_model(name, tmp_path):
    import torch
    import transformers as hf

    torch.manual_seed(0)
    small = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if name == "t5":
        config = hf.T5Config(
            d_model=64, d_ff=96, d_kv=16, num_heads=4, num_layers=2, vocab_size=300,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )  # fmt: skip
        model = hf.T5EncoderModel(config)
    else:
        # Its reader of qwen3 knows no attention.key_length: heads must be its default of 128.
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(head_dim=128, **small))
    model.save_pretrained(tmp_path / name)
    return model, type(model)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["t5", "qwen3"])
@pytest.mark.filterwarnings("default")
def test_transformers_reads_the_same_weights_from_gguf(tmp_path, name):
    import torch

    model, kind = _random_model(name, tmp_path)
    run_job(tmp_path / name, tmp_path / "m.gguf", Request("gguf", type_named("f32")))
    loaded = kind.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    if name == "t5":  # GGUF has no word for the activation: its reader takes relu
        loaded = kind.from_pretrained(
            tmp_path, gguf_file="m.gguf", dtype=torch.float32, config=model.config
        )
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids)[0], loaded.eval()(ids)[0])
