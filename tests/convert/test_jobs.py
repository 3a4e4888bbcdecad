"""Whole jobs on the demo checkpoints: round trips, other programs as readers, crashes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest

from diffquant.convert.jobs import opened, run_job
from diffquant.convert.plan import Request
from diffquant.core.errors import ResourceError, UsageError, VerificationError
from diffquant.io import open_source
from diffquant.quant.types import type_named

MODELS = ("sd15-shapes", "flux1-shapes")


@pytest.fixture(scope="module")
def round_trips(examples, tmp_path_factory):
    """Model -> (single file, folder made from it with --base)."""
    folder, found = tmp_path_factory.mktemp("jobs"), {}
    for model in MODELS:
        single, back = folder / f"{model}.safetensors", folder / model
        run_job(examples / model, single, Request("safetensors"))
        report = run_job(single, back, Request("folder"), base=examples / model)
        assert report.missing == ()
        found[model] = single, back
    return found


@pytest.mark.parametrize("model", MODELS)
def test_folder_to_file_to_folder_is_lossless(examples, round_trips, load, model):
    source = examples / model
    back = round_trips[model][1]
    before, after = load(source)[0], load(back)[0]
    assert before.keys() == after.keys()
    for key, (dtype, shape, data) in before.items():
        assert (dtype, shape) == after[key][:2], key
        assert np.array_equal(data, after[key][2]), key
    names = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    names -= {"README.md", "training.json"}
    assert {p.relative_to(back).as_posix() for p in back.rglob("*") if p.is_file()} == names
    for name in names:
        if name.endswith(".json"):
            assert json.loads((back / name).read_text()) == json.loads((source / name).read_text())
        elif not name.endswith(".safetensors"):
            assert (back / name).read_bytes() == (source / name).read_bytes()


def test_without_a_base_the_missing_tokenizers_are_named(round_trips, tmp_path):
    report = run_job(round_trips["flux1-shapes"][0], tmp_path / "out", Request("folder"))
    assert report.missing == ("tokenizer/", "tokenizer_2/")
    assert "missing from the folder: tokenizer/" in report.warnings
    assert not (tmp_path / "out" / "tokenizer" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "scheduler" / "scheduler_config.json").exists()


def test_a_file_by_a_stranger_gets_a_config_and_names_what_is_missing(examples, tmp_path):
    lone = examples / "sd15-shapes" / "unet" / "diffusion_pytorch_model.safetensors"
    report = run_job(lone, tmp_path / "out", Request("folder"))
    assert report.missing == ("model_index.json",)
    assert any("unet/config.json: made from shapes" in note for note in report.notes)


def test_nf4_configs_come_and_go_with_the_packed_weights(examples, tmp_path):
    source = examples / "sd15-shapes"
    nf4 = Request("folder", type=type_named("nf4"))
    run_job(source, tmp_path / "nf4", nf4)
    run_job(tmp_path / "nf4", tmp_path / "nf4.safetensors", Request("safetensors"))
    run_job(tmp_path / "nf4.safetensors", tmp_path / "again", Request("folder"), base=source)
    run_job(tmp_path / "again", tmp_path / "f16", Request("folder", dtype="f16"))
    configs = [
        json.loads((tmp_path / name / "unet" / "config.json").read_text())
        for name in ("nf4", "again", "f16")
    ]
    assert configs[0]["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert configs[0] == configs[1]
    assert configs[2] == json.loads((source / "unet" / "config.json").read_text())


def test_an_nf4_folder_packs_what_diffusers_could_not_skip(examples, tmp_path):
    """Flux's final layer is `proj_out` there, and so is a layer of every single block."""
    wanted = Request("folder", type=type_named("nf4"))
    report = run_job(examples / "flux1-shapes", tmp_path / "nf4", wanted)
    config = json.loads((tmp_path / "nf4" / "transformer" / "config.json").read_text())
    skipped = config["quantization_config"]["llm_int8_skip_modules"]
    rows = {row.target.removeprefix("transformer/"): row for row in report.tensors}
    assert "proj_out" not in skipped
    assert rows["proj_out.weight"].stored == "nf4"
    assert "single_transformer_blocks.0.proj_out" in rows["proj_out.weight"].reason
    assert all(rows[f"{name}.weight"].stored != "nf4" for name in skipped)


def quiet(function, *args, **kwargs):
    """Peers warn on import and on use; that is not what is judged here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def imported(name):
    return quiet(pytest.importorskip, name)


@pytest.mark.oracle
@pytest.mark.parametrize("model", MODELS)
def test_diffusers_draws_the_same_picture_from_the_round_trip(examples, round_trips, model):
    """Two steps, text encoders and VAE included: equal, since every tensor is."""
    diffusers, torch = imported("diffusers"), imported("torch")

    def picture(path):
        pipe = diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        return pipe(
            "a red circle",
            num_inference_steps=2,
            height=64,
            width=64,
            output_type="np",
            generator=noise,
        ).images

    before = quiet(picture, examples / model)
    after = quiet(picture, round_trips[model][1])
    assert before.std() > 0.01
    assert np.array_equal(before, after)


@pytest.mark.oracle
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["q4_k_s", "q8_0", "f16"])
def test_gguf_files_read_equal_through_gguf_py(examples, tmp_path, load, model, name):
    gguf = imported("gguf")
    path = tmp_path / "out.gguf"
    run_job(examples / model, path, Request("gguf", type=type_named(name)))
    ours, metadata = load(path)
    reader = gguf.GGUFReader(path)
    field = reader.get_field("general.architecture")
    assert field.contents() == metadata["general.architecture"]
    assert [one.name for one in reader.tensors] == list(ours)
    with opened(path) as (_, logical, match):
        assert match.architecture == model.partition("-")[0]
        for one in reader.tensors:
            dtype, shape, data = ours[one.name]
            assert one.tensor_type.name == dtype
            assert tuple(reversed(one.shape.tolist())) == shape
            assert np.array_equal(one.data.reshape(-1).view(np.uint8), data)
            expected = gguf.dequantize(one.data, one.tensor_type).reshape(-1)
            assert np.array_equal(logical.read(one.name).reshape(-1), expected), one.name


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["q4_k_s", "q8_0", "q6_k", "q4_0"])
def test_diffusers_decodes_our_gguf_to_the_same_numbers(examples, tmp_path, name):
    """Its reader and dequantizer. Not `FluxTransformer2DModel.from_single_file`: that splits fused
    projections at 3072, 3072, 3072, 12288 whatever the file's width
    (huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
    convert_flux_transformer_checkpoint_to_diffusers), so no small model passes it.
    """
    utils = imported("diffusers.quantizers.gguf.utils")
    loading = imported("diffusers.models.model_loading_utils")
    path = tmp_path / "out.gguf"
    run_job(examples / "flux1-shapes", path, Request("gguf", type=type_named(name)))
    state = quiet(loading.load_gguf_checkpoint, str(path))
    with opened(path) as (_, logical, _):
        assert state.keys() == logical.tensors.keys()
        for key, tensor in state.items():
            shape = logical.tensors[key].shape
            if hasattr(tensor, "quant_type"):
                tensor = utils.dequantize_gguf_tensor(tensor)
            assert np.allclose(
                tensor.float().numpy().reshape(shape),
                logical.read(key).reshape(shape),
                rtol=2e-3,  # it multiplies in float16
                atol=2e-3 * np.abs(logical.read(key)).max(),
            ), key


SLOW = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    import diffquant.io.atomic as atomic
    from diffquant.cli import main
    plain = atomic.FlatSink.write
    def slow(self, key, offset, data):
        plain(self, key, offset, data)
        print("wrote", key, flush=True)
        time.sleep(0.1)
    atomic.FlatSink.write = slow
    sys.argv = ["diffquant", "convert", *sys.argv[1:]]
    main()
"""


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("target", ["out.safetensors", "out.gguf", "out"])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("threads", ["1", "3"])
def test_a_killed_write_leaves_the_old_output_and_nothing_by_its_name(
    examples, tmp_path, target, sent, threads
):
    out = tmp_path / target
    first = sent == signal.SIGINT and threads == "1"  # once with nothing there before
    if not first:
        run_job(examples / "flux1-shapes", out, Request(_container(target), parts=("denoiser",)))
    old = snapshot(tmp_path)
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(examples / "sd15-shapes")]
    options = ["-o", str(out), "--force", "--threads", threads]
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline().startswith("wrote")
        child.send_signal(sent)
        errors = child.communicate()[1]
    left = snapshot(tmp_path)
    if sent == signal.SIGINT:
        assert child.returncode == 130
        hint = "" if target == "out" else " (with --resume, a run can be continued)"
        assert errors == f"diffquant convert: interrupted; nothing was left behind{hint}\n"
        assert left == old
        return
    assert child.returncode == -signal.SIGKILL
    partial = {path for path in left if path.parts[0].startswith(f".{target}.partial-")}
    assert partial
    assert {path: data for path, data in left.items() if path not in partial} == old
    run_job(examples / "sd15-shapes", out, Request(_container(target)), force=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def _container(name):
    return {"out.safetensors": "safetensors", "out.gguf": "gguf", "out": "folder"}[name]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate")
@pytest.mark.parametrize("target", ["out.safetensors", "out.gguf", "out"])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_leaves_nothing(examples, tmp_path, monkeypatch, target, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ResourceError, match="disk full") as error:
        run_job(examples / "sd15-shapes", tmp_path / target, Request(_container(target)))
    assert error.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_told_before_anything_is_written(examples, tmp_path, monkeypatch):
    import psutil

    class Little:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    with pytest.raises(ResourceError, match=r"working memory.*--threads"):
        run_job(examples / "sd15-shapes", tmp_path / "a.gguf", Request("gguf"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("pipe", "pipe"),
        ("pipe", "link"),
        ("pipe/unet", "pipe/unet"),
        ("pipe/unet/diffusion_pytorch_model.safetensors", "pipe"),
        ("pipe/unet/diffusion_pytorch_model.safetensors", "pipe/unet"),
        ("pipe", "pipe/unet/diffusion_pytorch_model.safetensors"),
        ("pipe", "pipe/unet"),
    ],
)
def test_a_source_is_never_replaced_by_its_own_output(examples, tmp_path, source, target):
    shutil.copytree(examples / "sd15-shapes", tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    old = snapshot(tmp_path)
    out = tmp_path / target
    container = "safetensors" if out.suffix else "folder"
    with pytest.raises(UsageError, match="source"):
        run_job(tmp_path / source, out, Request(container), force=True)
    assert snapshot(tmp_path) == old


def test_the_base_is_never_replaced(examples, round_trips, tmp_path):
    shutil.copytree(examples / "sd15-shapes", tmp_path / "pipe")
    old = snapshot(tmp_path)
    single, out = round_trips["sd15-shapes"][0], tmp_path / "pipe"
    with pytest.raises(UsageError, match="--base"):
        run_job(single, out, Request("folder", parts=("vae",)), base=out, force=True)
    assert snapshot(tmp_path) == old


@pytest.mark.parametrize("target", ["out.safetensors", "out.gguf", "out"])
def test_existing_outputs_need_force_and_come_out_the_same(examples, tmp_path, target):
    out, request = tmp_path / target, Request(_container(target))
    run_job(examples / "sd15-shapes", out, request)
    old = snapshot(tmp_path)
    with pytest.raises(UsageError, match="exists; use --force"):
        run_job(examples / "sd15-shapes", out, request)
    assert run_job(examples / "sd15-shapes", out, request, dry_run=True).dry_run
    assert snapshot(tmp_path) == old
    run_job(examples / "sd15-shapes", out, request, force=True)
    assert snapshot(tmp_path) == old


def test_a_dry_run_says_what_a_run_does(examples, tmp_path):
    request = Request("gguf", type=type_named("q4_k_s"))
    planned = run_job(examples / "sd15-shapes", tmp_path / "a.gguf", request, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    done = run_job(examples / "sd15-shapes", tmp_path / "a.gguf", request)
    assert planned.nbytes == done.nbytes
    assert planned.parts == done.parts
    assert [(r.key, r.stored, r.reason, r.nbytes) for r in planned.tensors] == [
        (r.key, r.stored, r.reason, r.nbytes) for r in done.tensors
    ]
    assert planned.verdict is None
    assert planned.error is None
    assert done.error > 0


def test_bytes_damaged_on_the_way_to_the_disk_are_found(examples, tmp_path, monkeypatch):
    from diffquant.io.atomic import FlatSink

    plain = FlatSink.write

    def damaged(self, key, offset, data):
        if key.endswith("out.2.bias"):
            data = data.copy()
            data[0] ^= 1
        plain(self, key, offset, data)

    monkeypatch.setattr(FlatSink, "write", damaged)
    with pytest.raises(VerificationError, match=r"out\.2\.bias reads back other bytes") as error:
        run_job(examples / "sd15-shapes", tmp_path / "a.gguf", Request("gguf"))
    assert error.value.exit_code == 3


def test_outputs_say_what_they_are_and_never_where_the_source_was(examples, tmp_path):
    out = tmp_path / "a.gguf"
    run_job(examples / "sd15-shapes", out, Request("gguf", type=type_named("q8_0")))
    with open_source(out) as source:
        metadata = source.metadata
    assert metadata["diffquant.type"] == "q8_0"
    assert metadata["diffquant.architecture"] == "sd15"
    assert metadata["diffquant.source.name"] == "sd15-shapes"
    assert "diffquant.mixed" in metadata
    assert str(examples) not in repr(dict(metadata))
