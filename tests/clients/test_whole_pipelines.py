"""Whole pipelines through every container, and diffusers as the judge of what comes out.

folder -> single file -> folder, and folder -> parts -> composed (`--add PART=FILE`): tensors equal
bit for bit, and what diffusers loads computes what the original does, with no difference at all.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import tiny_pipelines

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.composed import AddedPart
from diffquant.convert.jobs import container_for, opened, run_job
from diffquant.convert.made_configs import INDEX
from diffquant.convert.request import Request
from diffquant.io import open_sink, open_source

# Clients warn on import and on use; that is not what is judged here.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PIPELINES = tiny_pipelines.PIPELINES
# Folders in which the installed transformers saves other names than the published ones; ours are
# the published, so that keys differ, once, and values never.
RENAMED = {"sd2", "z_image", "lumina2"}

# What diffusers' single-file loader takes at any width, of the part in a file of its own: (name,
# class, folder). Wan's VAE is not among it: its single files have Diffusers' names here, and
# diffusers' loader wants the makers'.
FROM_FILE = [
    ("sd2", "UNet2DConditionModel", "unet"),
    ("sd2", "AutoencoderKL", "vae"),
    ("sdxl_refiner", "UNet2DConditionModel", "unet"),
    ("sdxl_refiner", "AutoencoderKL", "vae"),
    ("sd3", "SD3Transformer2DModel", "transformer"),
    ("sd3", "AutoencoderKL", "vae"),
    ("flux2_klein", "Flux2Transformer2DModel", "transformer"),
    ("flux2_dev", "Flux2Transformer2DModel", "transformer"),
    ("qwen_image", "QwenImageTransformer2DModel", "transformer"),
    ("z_image", "ZImageTransformer2DModel", "transformer"),
    ("wan", "WanTransformer3DModel", "transformer"),
]
# huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py
HARDCODED = {
    "chroma": "convert_chroma_transformer_checkpoint_to_diffusers splits at 3072 and 12288 rows",
    "lumina2": "convert_lumina2_to_diffusers splits at 2304, 768 and 768 rows",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> (the original folder, a single file of it, a folder made of that)."""
    for peer in ("diffusers", "transformers"):
        pytest.importorskip(peer)
        logging.getLogger(peer).setLevel(logging.CRITICAL)
    made: dict[str, tuple[Path, Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path, Path]:
        if name not in made:
            work = tmp_path_factory.mktemp(name)
            source, single, back = work / "source", work / "one.safetensors", work / "back"
            tiny_pipelines.build(name, source)
            assert job(source, single).warnings == ()
            report = job(single, back, base=source)
            assert (report.warnings, report.missing, report.notes) == ((), (), ())
            made[name] = source, single, back
        return made[name]

    return make


def job(source, out, *, base=None, **asked):
    return run_job(source, out, Request(container=container_for(out), **asked), base=base)


def tensors(path):
    with open_source(path) as source:
        return {k: (s.dtype, s.shape, bytes(source.read(k))) for k, s in source.specs.items()}


def part_file(folders, tmp_path, name, folder):
    """The original folder, and one part of it in a file of its own."""
    source, out = folders(name)[0], tmp_path / f"{folder}.safetensors"
    job(source, out, parts=("vae" if folder == "vae" else "denoiser",))
    return source, out


def files(folder):
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def alike(name, one, two):
    """Whether diffusers computes the same from two folders."""
    import torch

    before = tiny_pipelines.outputs(name, tiny_pipelines.loaded(name, one))
    after = tiny_pipelines.outputs(name, tiny_pipelines.loaded(name, two))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.float().std() > 0.05, key
        assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("name", PIPELINES)
def test_a_folder_comes_back_from_a_single_file(folders, name):
    source, single, back = folders(name)
    before, after = tensors(source), tensors(back)
    assert sorted(before.values()) == sorted(after.values())
    assert (before == after) == (name not in RENAMED)
    with opened(single) as (_, _, match):
        assert match.architecture == PIPELINES[name].architecture
        assert {part.layout for part in match.parts} == {"canonical"}
    alike(name, source, back)


@pytest.mark.parametrize("name", PIPELINES)
def test_configs_tokenizers_and_scheduler_survive(folders, name):
    source, _, back = (files(folder) for folder in folders(name))
    assert source.keys() == back.keys()
    for path, file in source.items():
        if path.endswith(".json"):
            assert json.loads(back[path].read_text()) == json.loads(file.read_text()), path
        elif not path.endswith(".safetensors"):
            assert back[path].read_bytes() == file.read_bytes(), path


@pytest.mark.parametrize("name", PIPELINES)
def test_written_names_are_a_fixed_point(folders, tmp_path, name):
    source, single, back = folders(name)
    job(back, tmp_path / "two.safetensors")
    job(tmp_path / "two.safetensors", tmp_path / "again", base=back)
    job(source, tmp_path / "straight")
    assert tensors(tmp_path / "two.safetensors") == tensors(single)
    assert tensors(tmp_path / "again") == tensors(back)
    assert tensors(tmp_path / "straight") == tensors(back)


@pytest.mark.parametrize("name", PIPELINES)
def test_parts_make_the_checkpoint_again(folders, tmp_path, name):
    source, single, back = folders(name)
    with opened(single) as (_, _, match):
        parts = {part.name: tmp_path / f"{part.name}.safetensors" for part in match.parts}
    for part, path in parts.items():
        job(source, path, parts=(part,))
    bare = parts.pop("denoiser")
    added = tuple(AddedPart(part, path) for part, path in parts.items())
    report = job(bare, tmp_path / "all.safetensors", added=added)
    assert report.notes == tuple(f"{part} is that of {path.name}" for part, path in parts.items())
    assert tensors(tmp_path / "all.safetensors") == tensors(single)
    for start, more in ((tmp_path / "all.safetensors", ()), (bare, added)):
        out = tmp_path / f"from-{start.stem}"
        job(start, out, base=source, added=more)
        assert tensors(out) == tensors(back)
        assert files(out).keys() == files(back).keys()
    alike(name, source, out)


@pytest.mark.parametrize(("name", "kind", "part"), FROM_FILE)
def test_diffusers_reads_the_single_file_itself(folders, tmp_path, name, kind, part):
    import diffusers
    import torch

    source, single = part_file(folders, tmp_path, name, part)
    found = getattr(diffusers, kind).from_single_file(
        single, config=str(source), subfolder=part, local_files_only=True, torch_dtype=torch.float32
    )
    expected = getattr(tiny_pipelines.loaded(name, source), part).state_dict()
    state = found.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", HARDCODED)
def test_what_diffusers_splits_at_fixed_rows_it_cannot_read_narrow(folders, tmp_path, name):
    """When this fails, diffusers reads other widths, and the row above can have the model."""
    import diffusers

    source, single = part_file(folders, tmp_path, name, "transformer")
    kind = PIPELINES[name].parts["transformer"][0]
    with pytest.raises(RuntimeError, match=r"split"):
        getattr(diffusers, kind).from_single_file(
            single, config=str(source), subfolder="transformer", local_files_only=True
        )


@pytest.mark.parametrize("name", ["sd2", "sdxl_refiner"])
def test_diffusers_reads_whole_checkpoints_of_the_older_families(folders, name):
    import diffusers
    import torch

    source, single, _ = folders(name)
    pipe = getattr(diffusers, PIPELINES[name].pipeline).from_single_file(
        single, config=str(source), local_files_only=True, torch_dtype=torch.float32
    )
    expected = tiny_pipelines.outputs(name, tiny_pipelines.loaded(name, source))
    found = tiny_pipelines.outputs(name, pipe)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", PIPELINES)
def test_a_strangers_file_becomes_a_folder_of_the_same_classes(folders, tmp_path, name):
    """Without our header nothing says which pipeline it was but names and shapes."""
    source, single, _ = folders(name)
    bare = tmp_path / "bare.safetensors"
    with open_source(single) as ours, open_sink(bare, ours.specs.values(), {}) as sink:
        for key in ours.specs:
            sink.write(key, 0, ours.read(key))
        sink.commit()
    report = job(bare, tmp_path / "out")
    if report.missing and INDEX in report.missing:  # of two encoders, told by width
        assert PIPELINES[name].architecture == "flux2"
        assert "text_encoder/config.json" in report.missing
        return
    made, real = (json.loads((p / INDEX).read_text()) for p in (tmp_path / "out", source))
    for folder in PIPELINES[name].parts:
        if (name, folder) != ("z_image", "text_encoder"):  # the published one is a CausalLM
            assert made[folder] == real[folder], folder


def test_pipelines_are_of_architectures_that_there_are():
    assert {row.architecture for row in PIPELINES.values()} <= set(ARCHITECTURES)


def test_the_table_of_the_docs_names_what_is_tested_here():
    text = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    section = text.split("### Converted, and shown by whom")[1].split("\nRecognised in")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    shown = {slug for names, _ in rows for slug in ARCHITECTURES if f"`{slug}`" in names}
    equal = {
        slug
        for names, how in rows
        for slug in ARCHITECTURES
        if f"`{slug}`" in names and how.strip() == "equal outputs"
    }
    assert shown == set(ARCHITECTURES)
    assert equal == {row.architecture for row in PIPELINES.values()}
