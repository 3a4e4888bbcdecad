"""Every dialect through the command line: the demo denoiser, packed by others, to bf16 and on.

The packed files are made here, by the programs that define them or from their definitions, not by
our writers; what they decode to is known before our readers see them.
"""

from __future__ import annotations

import importlib
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from diffquant.convert.binding import bind
from diffquant.convert.detect import detect, to_canonical
from diffquant.core.floats import float32_of
from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink, open_source
from diffquant.quant.codecs.fp8_e4m3 import e4m3_table


def packed(key, shape):
    """What a publisher packs: matrices of the blocks, one of which is split or fused on the way."""
    return key.endswith(".weight") and len(shape) == 2 and "blocks" in key


@pytest.fixture(scope="module")
def canonical(examples):
    """The demo denoiser under the names of single files: key -> float32."""
    with open_source(examples / "flux1-shapes") as source:
        logical = bind(source)
        match = detect(logical.specs(), source.metadata, source.configs)
        rows = to_canonical(match.parts[0])
        found = {}
        for one in rows:
            pieces = [logical.read(p.key).reshape(-1, *one.shape[1:]) for p in one.pieces]
            whole = [x[p.start : p.stop] for x, p in zip(pieces, one.pieces, strict=True)]
            found[one.target] = np.concatenate(whole).reshape(one.shape)
    return found


def save(path, tensors, metadata=None):
    specs = [TensorSpec(key, dtype, data.shape) for key, (dtype, data) in tensors.items()]
    with open_sink(path, specs, metadata or {}) as sink:
        for key, (_, data) in tensors.items():
            sink.write(key, 0, np.ascontiguousarray(data).reshape(-1).view(np.uint8))
        sink.commit()
    return path


def legacy(folder, weights, *, e5m2):
    """scaled_fp8 with torch's own rounding."""
    torch = pytest.importorskip("torch")
    kind = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    name, top = ("F8_E5M2", 57344) if e5m2 else ("F8_E4M3", 448)
    tensors, expected = {"scaled_fp8": (name, np.zeros(2, np.uint8))}, {}
    for key, value in weights.items():
        expected[key], tensors[key] = value, ("F32", value)
        if not packed(key, value.shape):
            continue
        scale = np.float32(np.abs(value).max() / top)
        q = torch.from_numpy(value / scale).to(kind)
        tensors[key] = (name, q.view(torch.uint8).numpy())
        tensors[key.replace(".weight", ".scale_weight")] = ("F32", np.array(scale))
        expected[key] = q.float().numpy() * scale
    return save(folder / "in.safetensors", tensors), expected


def bfl(folder, weights, *, four):
    """BFL's files by diffusers' functions."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = pytest.importorskip("diffusers.quantizers.bfl.utils")
        # anew: a model loaded before may have imported it while torch's default device was meta
        peer = importlib.reload(peer)
    tensors, expected = {}, {}
    for key, value in weights.items():
        expected[key], tensors[key] = value, ("F32", value)
        if not packed(key, value.shape):
            continue
        layer, weight = key.removesuffix(".weight"), torch.from_numpy(value.copy())
        if four:
            q, scale, whole = peer.quantize_nvfp4(weight)
            expected[key] = peer.dequantize_nvfp4(q, scale, whole).numpy()
            tensors[key] = ("U8", q.numpy())
            tensors[f"{layer}.weight_scale"] = ("F8_E4M3", scale.view(torch.uint8).numpy())
            tensors[f"{layer}.weight_scale_2"] = ("F32", whole.numpy().reshape(()))
            tensors[f"{layer}.input_scale"] = ("F32", np.ones((), np.float32))
        else:
            q, scale = peer.quantize_fp8r(weight)
            expected[key] = peer.dequantize_fp8r(q, scale).numpy()
            tensors[key] = ("F8_E4M3", q.view(torch.uint8).numpy())
            tensors[f"{layer}.weight_scale"] = ("F32", scale.numpy())
    return save(folder / "in.safetensors", tensors), expected


def sdnq(folder, weights, examples):
    """An SDNQ folder with uint4 in groups of 16, packed by its definition: low nibble first."""
    out = folder / "in"
    shutil.copytree(examples / "flux1-shapes", out)
    file = out / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {}
    with open_source(file) as source:
        for key, spec in source.specs.items():
            value = float32_of(source.read(key), spec.dtype).reshape(spec.shape)
            tensors[key] = ("F32", value.copy())
    for key in list(tensors):
        value = tensors[key][1]
        if not packed(key, value.shape):
            continue
        groups = value.reshape(len(value), -1, 16)
        low = groups.min(2, keepdims=True)
        scale = (groups.max(2, keepdims=True) - low) / np.float32(15)
        code = np.clip(np.rint((groups - low) / scale), 0, 15).astype(np.uint8).reshape(-1)
        tensors[key] = ("U8", code[::2] | code[1::2] << 4)
        tensors[key.replace(".weight", ".scale")] = ("F32", scale)
        tensors[key.replace(".weight", ".zero_point")] = ("F32", low)
    file.unlink()
    save(file, tensors)
    config = out / "transformer" / "config.json"
    fields = json.loads(config.read_text())
    fields["quantization_config"] = {"quant_method": "sdnq", "weights_dtype": "uint4"}
    config.write_text(json.dumps(fields))
    return out, None


def header(folder, weights):
    """fp8 named in the header alone, without the prefix that the tensors have, scales in bf16."""
    path, expected = legacy(folder, weights, e5m2=False)
    prefix, layers, tensors = "model.diffusion_model.", {}, {}
    with open_source(path) as source:
        for key, spec in source.specs.items():
            data = np.array(source.read(key))
            if key == "scaled_fp8":
                continue
            if key.endswith(".scale_weight"):
                layers[key.removesuffix(".scale_weight")] = {"format": "float8_e4m3fn"}
                short = (data.view(np.uint32) >> 16).astype(np.uint16)
                tensors[prefix + key.replace("scale_weight", "weight_scale")] = (
                    "BF16", short.reshape(()),
                )  # fmt: skip
                weight = key.replace("scale_weight", "weight")
                bits = np.array(source.read(weight)).reshape(expected[weight].shape)
                expected[weight] = e4m3_table()[bits] * (short.astype(np.uint32) << 16).view("<f4")
            else:
                width = {"F32": "<f4"}.get(spec.dtype, "u1")
                tensors[prefix + key] = (spec.dtype, data.view(width).reshape(spec.shape))
    text = json.dumps({"format_version": "1.0", "layers": layers})
    path.unlink()
    return save(path, tensors, {"_quantization_metadata": text}), expected


MAKERS = {
    "scaled_fp8": lambda folder, weights, _: legacy(folder, weights, e5m2=False),
    "scaled_fp8 of e5m2": lambda folder, weights, _: legacy(folder, weights, e5m2=True),
    "header": lambda folder, weights, _: header(folder, weights),
    "fp8r": lambda folder, weights, _: bfl(folder, weights, four=False),
    "nvfp4": lambda folder, weights, _: bfl(folder, weights, four=True),
    "sdnq": sdnq,
}
SAYS = {
    "scaled_fp8": ("fp8_e4m3_scaled", "scaled_fp8", ""),
    "scaled_fp8 of e5m2": ("fp8_e5m2_scaled", "scaled_fp8", "labels every weight float8_e4m3fn"),
    "header": ("fp8_e4m3_scaled", "comfy", "without the prefix"),
    "fp8r": ("fp8_e4m3_rowwise", "bfl", ""),
    "nvfp4": ("nvfp4 (low nibble first)", "bfl", "low nibble first"),
    "sdnq": ("sdnq uint4", "sdnq", ""),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, canonical, examples):
    """A dialect's file, and what its weights are; made once."""
    found: dict[str, tuple[Path, dict | None]] = {}

    def of(name):
        if name not in found:
            found[name] = MAKERS[name](tmp_path_factory.mktemp("in"), canonical, examples)
        return found[name]

    return of


def rounded(values):
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


@pytest.mark.oracle
@pytest.mark.parametrize("name", MAKERS)
def test_every_dialect_becomes_bf16_and_is_described(command, made, canonical, tmp_path, name):
    path, expected = made(name)
    fmt, dialect, warning = SAYS[name]
    (file,) = command("inspect", "--json", path).result["files"]
    assert file["architecture"] == "flux1"
    row = next(row for row in file["encodings"] if row["part"] == "denoiser")
    assert (row["format"], row["dialect"]) == (fmt, dialect)
    assert any(warning in line for line in file["warnings"]) or not warning
    out = tmp_path / "out.safetensors"
    ran = command("convert", path, "-o", out, "--dtype", "bf16", "--part", "denoiser", "--json")
    assert ran.code == 0
    assert any("keep that rounding: " in line and fmt in line for line in ran.json["warnings"])
    with open_source(out) as source:
        logical = bind(source)
        assert {spec.dtype for spec in source.specs.values()} == {"BF16"}
        bare = {key.removeprefix("model.diffusion_model."): key for key in logical.tensors}
        assert bare.keys() == canonical.keys()
        for key, value in canonical.items():
            found = logical.read(bare[key]).reshape(value.shape)
            if expected is not None:
                assert np.array_equal(found, rounded(expected[key])), key
            else:  # groups of 16 of 15 steps: within half a step
                limit = (np.abs(value).max() * 2 / 15 / 2) * 1.02
                assert np.abs(found - value).max() <= limit, key


@pytest.mark.oracle
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("kind", "file"), [("q8_0", "a.gguf"), ("int8_rowwise", "a.safetensors"), ("nf4", "a")]
)
def test_rounding_again_is_asked_for_and_said(command, made, examples, tmp_path, name, kind, file):
    path, _ = made(name)
    args = ("quantize", path, "-o", tmp_path / file, "-t", kind, "--json")
    args += ("--base", examples / "flux1-shapes") if file == "a" else ()
    refused = command(*args)
    assert refused.code == 1
    assert "--allow-requantize" in refused.json["error"]["message"]
    assert SAYS[name][0] in refused.json["error"]["message"]
    ran = command(*args, "--allow-requantize")
    assert ran.code == 0
    assert any("keep that rounding" in line for line in ran.json["warnings"])
    again = [row for row in ran.result["tensors"] if "requantized from" in row["reason"]]
    assert again
    assert all(f"requantized from {SAYS[name][0]}" in row["reason"] for row in again)
    assert ran.result["verdict"] in ("pass", "warn")
