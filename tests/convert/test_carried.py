"""Header pairs go with the weights, from every container to every other; what cannot, is named."""

from __future__ import annotations

import json

import pytest

from diffquant.convert.carried import carried
from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.io import open_source
from diffquant.quant.types import type_named

PAIRS = {
    "modelspec.title": "Füchse im Schnee 狐",
    "modelspec.author": "somebody",
    "ss_network_dim": "32",
    "ss_tag_frequency": json.dumps({"a": {"fox": 3}}),
    "their_own.key": "kept as it is",
}
FALSE = {
    "modelspec.hash_sha256": "0x00",
    "sshs_model_hash": "00",
    "_quantization_metadata": '{"layers": {}}',
    "quantization_config": '{"quant_algo": "NVFP4"}',
    "diffquant.type": "nf4",
    "diffquant.mixed": "yes",
}
OUTPUTS = {"safetensors": "a.safetensors", "gguf": "a.gguf", "folder": "a"}


def sample(kind, folder, examples, write, load):
    """The demo denoiser in a container, with the pairs in its header."""
    source = examples / "flux1-shapes"
    if kind == "gguf":
        first = sample("safetensors", folder, examples, write, load)
        path = folder / "in.gguf"
        run_job(first, path, Request("gguf", type=type_named("q8_0")))
        return path
    if kind == "folder":
        first = sample("safetensors", folder, examples, write, load)
        run_job(first, folder / "in", Request("folder"), base=source)
        return folder / "in"
    plain = folder / "plain.safetensors"
    run_job(source, plain, Request("safetensors", parts=("denoiser",)))
    tensors, _ = load(plain)
    rows = {key: (dtype, data, shape) for key, (dtype, shape, data) in tensors.items()}
    return write(folder / "in.safetensors", rows, PAIRS | FALSE | {"format": "pt"})


def headers(path):
    """Every header of an output."""
    if path.is_dir():
        return [headers(file)[0] for file in path.rglob("*.safetensors")]
    with open_source(path) as source:
        return [dict(source.metadata)]


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("kind", ["safetensors", "gguf", "folder"])
def test_pairs_come_through_every_pair_of_containers(tmp_path, examples, write, load, kind, out):
    source = sample(kind, tmp_path, examples, write, load)
    target = tmp_path / OUTPUTS[out]
    made = Request(out, dtype="f32" if out != "gguf" else None)
    report = run_job(
        source, target, made, base=examples / "flux1-shapes" if out == "folder" else None
    )
    found = headers(target)
    assert found
    for one in found:
        assert {key: one.get(key) for key in PAIRS} == PAIRS
        assert not FALSE.keys() & one.keys()
    if out == "safetensors" and kind != "gguf":
        assert found[0]["format"] == "pt"
    lost = [line for line in report.warnings if "have no place" in line]
    assert lost == []
    said = [line for line in report.warnings if "other bytes make false" in line]
    assert bool(said) == (kind == "safetensors")
    if said:
        assert said[0].endswith("modelspec.hash_sha256, sshs_model_hash")


def test_a_quantized_output_carries_them_too(tmp_path, examples, write, load):
    source = sample("safetensors", tmp_path, examples, write, load)
    for name, path in (("fp8_scaled", "a.safetensors"), ("q4_k_s", "a.gguf")):
        container = path.rpartition(".")[2]
        run_job(source, tmp_path / path, Request(container, type=type_named(name)))
        (found,) = headers(tmp_path / path)
        assert {key: found.get(key) for key in PAIRS} == PAIRS
        assert found["diffquant.type"] == name


class Source:
    """A header, and which container it is of."""

    def __init__(self, container, metadata, components=()):
        self.container, self.metadata, self.components = container, metadata, components


@pytest.mark.parametrize("key", ["tokenizer.ggml.model", "", "k" * 70000, "two words", "Größe"])
def test_what_gguf_has_no_place_for_is_named(key):
    found = carried(Source("safetensors", {key: "x", "ss_a": "y"}), "gguf")
    assert (found.pairs, found.lost) == ({"ss_a": "y"}, [key])
    assert carried(Source("safetensors", {key: "x"}), "safetensors").pairs == {key: "x"}


def test_numbers_of_gguf_have_no_place_in_text():
    header = {"general.name": "x", "flux.block_count": 3, "list": [1], "general.file_type": 2}
    found = carried(Source("gguf", header), "safetensors")
    assert (found.pairs, found.lost) == ({"general.name": "x"}, ["flux.block_count", "list"])
    assert carried(Source("gguf", header), "gguf").pairs == {}  # with its types, elsewhere


def test_components_that_disagree_are_named():
    header = {"unet/a": "1", "vae/a": "1", "vae/b": "2", "unet/b": "3", "x/c": "4"}
    found = carried(Source("diffusers_folder", header, ("unet", "vae")), "safetensors")
    assert found.pairs == {"a": "1", "b": "2", "x/c": "4"}
    assert found.lost == ["unet/b"]
