"""Commands take remote names; what is printed is for people, exit codes are those of the manual."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def repo(hub):
    root = EXAMPLES / "flux1-shapes"
    hub.add("me/flux", {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()})
    part = root / "transformer" / "diffusion_pytorch_model.safetensors"
    hub.add("me/many", {"a_fp8_scaled.safetensors": part, "b_bf16.safetensors": part})
    return hub


def test_inspect_describes_a_remote_folder_and_file(repo, command):
    names = ("hf://me/flux", "hf://me/flux/vae", "hf://me/many/b_bf16.safetensors")
    reports = command("inspect", *names, "--json").result["files"]
    assert [one["path"] for one in reports] == list(names)
    kinds = [(one["architecture"], one["kind"]) for one in reports]
    assert kinds == [("flux1", "checkpoint"), ("vae_kl", "vae"), ("flux1", "diffusion_model")]


def test_several_names_are_a_line_each(repo, command):
    link = f"{repo.url}/me/many/blob/main/b_bf16.safetensors"
    ran = command("inspect", link, "hf://me/flux/vae", "hf://me/many", "hf://me/none/x.gguf")
    assert ran.code == 1
    assert "2 checkpoints, name one of them" in ran.err
    assert "no repository me/none" in ran.err
    assert ran.out.count("\n") >= 4


def test_inspect_lists_a_repository_of_several(repo, command):
    ran = command("inspect", "hf://me/many")
    assert ran.code == 0
    assert "FP8_SCALED" in ran.out
    assert "next: diffquant inspect hf://me/many/a_fp8_scaled.safetensors" in ran.out
    (listed,) = command("inspect", "hf://me/many", "--json").result["repositories"]
    assert [one["path"] for one in listed["files"]] == [
        "a_fp8_scaled.safetensors",
        "b_bf16.safetensors",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("inspect", "hf://me/none/x.gguf"), 1, "no repository"),
        (("inspect", "hf://me"), 2, "expected hf://owner/repo"),
        (("inspect", "--audit", "hf://me/flux/vae"), 2, "download it first"),
        (("download", "me/many", "--quant", "q4_0"), 2, "labels: BF16, FP8_SCALED"),
        (("download", "me/none"), 1, "no repository"),
        (("download", "me"), 2, "expected hf://owner/repo"),
    ],
)
def test_refusals(repo, command, arguments, code, message):
    ran = command(*arguments)
    assert ran.code == code
    assert message in ran.err


def test_no_network_is_exit_1_and_a_line(repo, command, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    ran = command("inspect", "hf://me/many/b_bf16.safetensors")
    assert ran.code == 1
    assert ran.err.count("\n") == 1


def test_download_prints_a_table_and_a_total(repo, command, tmp_path):
    ran = command("download", "me/many", "--to", tmp_path / "x", "--dry-run")
    assert ran.code == 0
    assert "[dry-run] would download 2 of 2 files, 15.80 MB (15.07 MiB)" in ran.out
    assert not (tmp_path / "x").exists()
    ran = command("download", "me/many", "--to", tmp_path / "x", "--quant", "bf16", "--json")
    (one,) = ran.result["files"]
    assert (one["state"], one["checksum"]) == ("downloaded", "sha256")
    assert command("inspect", tmp_path / "x" / "b_bf16.safetensors").code == 0


def test_quantizing_from_a_hub_gives_the_bytes_of_the_file_itself(repo, command, tmp_path):
    part = EXAMPLES / "flux1-shapes" / "transformer" / "diffusion_pytorch_model.safetensors"
    remote = "hf://me/flux/transformer/diffusion_pytorch_model.safetensors"
    for source, name in ((part, "a.gguf"), (remote, "b.gguf")):
        assert command("quantize", source, "-o", tmp_path / name, "-t", "q8_0").code == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_an_output_without_a_name_is_named_after_the_remote_file(
    repo, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    remote = "hf://me/many/b_bf16.safetensors@main"
    assert command("quantize", remote, "-t", "q8_0", "--verify", "none").code == 0
    assert (tmp_path / "b_bf16-Q8_0.gguf").is_file()


def test_resume_asks_for_a_local_source(repo, command, tmp_path):
    remote = "hf://me/many/b_bf16.safetensors"
    ran = command("quantize", remote, "-o", tmp_path / "a.gguf", "-t", "q8_0", "--resume")
    assert ran.code == 2
    assert "download it first" in ran.err


def test_local_files_load_nothing_that_speaks_http():
    file = EXAMPLES / "sd15-shapes" / "vae" / "diffusion_pytorch_model.safetensors"
    code = (
        "import sys; from diffquant.inspect.describe import describe; "
        f"describe({str(file)!r}); import diffquant.cli.inspect; "
        "print([m for m in ('http.client', 'ssl', 'huggingface_hub', 'torch') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
