"""`convert` on families and files that other tests do not have: pickles, casts, parts, shards."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import tiny_pipelines

from diffquant.io import open_source

LORA = Path(__file__).parents[3] / "shared" / "data" / "real" / "lora"

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Name -> a tiny pipeline of the family."""
    pytest.importorskip("diffusers")
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tiny_pipelines.build(name, tmp_path_factory.mktemp(name) / name)
        return made[name]

    return make


def tensors(path):
    with open_source(path) as source:
        return {k: (s.dtype, s.shape, bytes(source.read(k))) for k, s in source.specs.items()}


def test_a_whole_pickled_checkpoint_becomes_safetensors_and_a_folder(command, examples, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    single, ckpt, out = (tmp_path / name for name in ("a.safetensors", "a.ckpt", "b.safetensors"))
    assert command("convert", examples / "sd15-shapes", single).code == 0
    torch.save({"state_dict": load_file(single), "global_step": 7, "epoch": 1}, ckpt)
    ran = command("convert", ckpt, "-o", out)
    assert (ran.code, ran.err) == (0, "")
    assert tensors(out) == tensors(single)
    back = tmp_path / "back"
    assert command("convert", ckpt, back, "--base", examples / "sd15-shapes").code == 0
    assert tensors(back) == tensors(examples / "sd15-shapes")


def test_a_pickle_that_runs_code_is_refused_and_not_run(command, examples, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    path = tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": {"x": Evil()}}, protocol=2))
    ran = command("convert", path, "-o", tmp_path / "out.safetensors")
    assert (ran.code, ran.out) == (5, "")
    assert [one.name for one in tmp_path.iterdir() if not one.name.startswith(".")] == ["evil.ckpt"]


def test_dtype_on_z_image(command, folder, tmp_path):
    out = tmp_path / "z.safetensors"
    assert command("convert", folder("z_image"), out, "--dtype", "f32").code == 0
    assert {dtype for dtype, _, _ in tensors(out).values()} == {"F32"}


def test_part_and_metadata_on_flux2(command, folder, tmp_path):
    out = tmp_path / "encoder.safetensors"
    args = ("--part", "text_encoder", "--metadata", "author=someone")
    assert command("convert", folder("flux2_klein"), out, *args).code == 0
    assert set(tensors(out)) >= {"model.embed_tokens.weight", "model.norm.weight"}
    with open_source(out) as source:
        assert source.metadata["author"] == "someone"


def test_shards_on_wan(command, folder, tmp_path):
    whole, out = tmp_path / "one.safetensors", tmp_path / "cut.safetensors"
    assert command("convert", folder("wan"), whole).code == 0
    ran = command("convert", folder("wan"), out, "--max-shard-size", "64KB", "--json")
    assert ran.code == 0
    index = Path(ran.result["output"])
    shards = set(json.loads(index.read_text())["weight_map"].values())
    assert len(shards) > 1
    assert tensors(index) == tensors(whole)


@pytest.mark.skipif(not LORA.is_dir(), reason="needs ../shared/data/real/lora")
def test_a_pickled_lora_keeps_every_factor(command, tmp_path):
    torch = pytest.importorskip("torch")
    source, out = LORA / "catundchat_sd15.bin", tmp_path / "lora.safetensors"
    ran = command("lora", "convert", source, out, "--to", "peft")
    assert ran.code == 0, ran.err
    pickled = torch.load(source, weights_only=True, map_location="cpu").values()
    expected = sorted((tuple(x.shape), x.contiguous().numpy().tobytes()) for x in pickled)
    assert sorted(found[1:] for found in tensors(out).values()) == expected
