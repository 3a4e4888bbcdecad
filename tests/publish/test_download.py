"""A download resumes, is checked, and never writes where it was not asked to."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hub_server import blob_sha1_of, sha256_of

from diffquant.core.errors import (
    MalformedFile,
    RemoteError,
    ResourceError,
    UsageError,
    VerificationError,
)
from diffquant.io.remote_path import RemoteEntry
from diffquant.publish import download
from diffquant.publish.download import run_download
from diffquant.publish.download_plan import DownloadRequest, plan_download
from diffquant.publish.selection import local_name, select

KIB = 1 << 10
EXAMPLE = Path(__file__).parents[2] / "examples" / "flux1-shapes"
BIG = np.random.default_rng(5).integers(0, 256, 3 << 20, dtype=np.uint8).tobytes()
SMALL = b"a licence\n"


def run(source, *, dry_run=False, **options):
    with plan_download(DownloadRequest(source, **options)) as plan:
        return run_download(plan, dry_run=dry_run)


@pytest.fixture
def repo(hub, tmp_path, monkeypatch):
    """A repository, and an empty folder to download into."""
    hub.add(
        "me/model",
        {
            "model-Q4_K_S.gguf": BIG,
            "model-Q8_0.gguf": BIG[::-1],
            "notes/LICENSE.md": SMALL,
            "vae/ae.safetensors": BIG[:5000],
        },
    )
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return hub


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_repository_becomes_a_folder_of_its_name_and_every_file_is_checked(repo):
    report = run("me/model")
    assert files_below(Path("model")) == set(repo.repos["me/model"])
    for name, content in repo.repos["me/model"].items():
        assert (Path("model") / name).read_bytes() == content
    checks = {one.path: one.checksum for one in report.files}
    assert checks["notes/LICENSE.md"] == "git sha1"
    assert checks["model-Q4_K_S.gguf"] == "sha256"
    assert report.sent_nbytes == report.nbytes == sum(map(len, repo.repos["me/model"].values()))


def test_a_second_run_fetches_nothing(repo):
    run("hf://me/model", to=Path("here"))
    before = len(repo.asked)
    report = run("hf://me/model", to=Path("here"))
    assert {one.state for one in report.files} == {"already there"}
    assert (report.sent_nbytes, len(repo.asked) - before) == (0, 1)  # the listing


def test_a_named_file_goes_where_we_are(repo):
    run("hf://me/model/vae/ae.safetensors")
    assert files_below(Path()) == {"ae.safetensors"}


def test_a_link_from_a_browser_is_a_named_file(repo):
    run(f"{repo.url}/me/model/blob/main/model-Q8_0.gguf", to=Path("x"))
    assert files_below(Path("x")) == {"model-Q8_0.gguf"}


def test_a_link_to_any_server_is_downloaded_unchecked(repo):
    report = run(f"{repo.cdn_url}/files/me/model/model-Q8_0.gguf?sig=1")
    assert Path("model-Q8_0.gguf").read_bytes() == BIG[::-1]
    assert report.files[0].checksum == ""


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"quant": "q4_k_s"}, {"model-Q4_K_S.gguf"}),
        ({"include": ("*.gguf",)}, {"model-Q4_K_S.gguf", "model-Q8_0.gguf"}),
        ({"include": ("*.gguf",), "exclude": ("*Q8*",)}, {"model-Q4_K_S.gguf"}),
        ({"include": ("vae/",)}, {"vae/ae.safetensors"}),
        ({"exclude": ("*.gguf", "*.md")}, {"vae/ae.safetensors"}),
    ],
)
def test_files_are_chosen(repo, options, names):
    assert {one.path for one in run("me/model", dry_run=True, **options).files} == names
    assert not files_below(Path())


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("me/model", {"quant": "q9"}, r"labelled Q9 \(labels: Q4_K_S, Q8_0\)"),
        ("me/model", {"include": ("*.bin",)}, "no file is left"),
        ("me/model/nodel-Q8_0.gguf", {}, "did you mean 'model-Q8_0.gguf'"),
        ("me/model", {"to": Path("a"), "comfy_root": Path("b")}, "give one"),
        ("me/model", {"comfy_root": Path("b")}, "no folder `models` in it"),
        ("hf://me/model@v1", {"revision": "v2"}, "says another"),
        ("me/model", {"revision": "../x"}, "no branch, tag or commit"),
        ("model", {}, "expected hf://owner/repo"),
    ],
)
def test_a_request_that_makes_no_sense_says_what_would(repo, source, options, message):
    with pytest.raises(UsageError, match=message):
        run(source, **options)


def test_a_cut_is_resumed_within_a_run(repo):
    repo.fail("cut", "cdn", times=3)
    report = run("me/model/model-Q8_0.gguf")
    assert Path("model-Q8_0.gguf").read_bytes() == BIG[::-1]
    assert report.files[0].state == "downloaded"


def test_what_came_before_a_run_was_given_up_is_not_fetched_again(repo):
    repo.fail("cut", "cdn", times=1, value=KIB * 1000)
    repo.fail("status", "cdn", value=500)
    with pytest.raises(RemoteError, match=r"1024000 bytes are kept in .*\.part, the same command"):
        run("me/model/model-Q8_0.gguf")
    assert [path.stat().st_size for path in Path().glob("*.part")] == [KIB * 1000]
    repo.faults.clear()
    with plan_download(DownloadRequest("me/model/model-Q8_0.gguf")) as plan:
        assert (plan.files[0].state, plan.files[0].part_nbytes) == ("part", KIB * 1000)
        report = run_download(plan)
    assert report.files[0].state == "resumed"
    assert report.sent_nbytes == len(BIG) - KIB * 1000
    assert files_below(Path()) == {"model-Q8_0.gguf"}
    assert Path("model-Q8_0.gguf").read_bytes() == BIG[::-1]


@pytest.mark.parametrize("text", ["bytes 0-3145727/3145728", "bytes 1024000-9/9", ""])
def test_a_server_that_resumes_elsewhere_is_an_error(repo, text):
    repo.fail("cut", "cdn", times=1, value=KIB * 1000)
    repo.fail("range", "cdn", value=text)
    with pytest.raises(RemoteError, match="byte 1024000 of 3145728 was asked for"):
        run("me/model/model-Q8_0.gguf")


def test_a_server_that_cannot_resume_begins_again_and_that_is_said(repo):
    repo.fail("cut", "cdn", times=1, value=KIB * 1000)
    repo.ranges = False
    report = run("me/model/model-Q8_0.gguf")
    assert report.files[0].state == "restarted"
    assert Path("model-Q8_0.gguf").read_bytes() == BIG[::-1]


def test_ctrl_c_keeps_what_has_come_and_says_so(repo, monkeypatch):
    class Pressed:
        def start(self, label, total, unit="B"):
            self.left = 2

        def advance(self, amount, key=""):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

        def stop(self):
            pass

    request = DownloadRequest("me/model/model-Q8_0.gguf")
    with (
        plan_download(request) as plan,
        pytest.raises(KeyboardInterrupt, match=r"bytes are kept in model-Q8_0\.gguf.*part"),
    ):
        run_download(plan, progress=Pressed())
    (part,) = Path().glob("*.part")
    assert part.stat().st_size > 0
    assert run("me/model/model-Q8_0.gguf").files[0].state == "resumed"


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(repo, monkeypatch):
    with plan_download(DownloadRequest("me/model/model-Q8_0.gguf")) as plan:
        repo.repos["me/model"]["model-Q8_0.gguf"] = BIG
        with pytest.raises(VerificationError, match=f"sha256 is {sha256_of(BIG)}"):
            run_download(plan)
    assert not files_below(Path())


def test_a_wrong_checksum_of_a_small_file_is_an_error(repo):
    with plan_download(DownloadRequest("me/model/notes/LICENSE.md")) as plan:
        repo.repos["me/model"]["notes/LICENSE.md"] = SMALL.upper()
        with pytest.raises(VerificationError, match=f"git sha1 is {blob_sha1_of(SMALL.upper())}"):
            run_download(plan)


def test_a_damaged_part_is_found_out(repo):
    with plan_download(DownloadRequest("me/model/model-Q8_0.gguf")) as plan:
        download.part_path(plan.files[0].target, plan.files[0].entry).write_bytes(bytes(KIB))
    with pytest.raises(VerificationError, match="damaged"):
        run("me/model/model-Q8_0.gguf")
    assert run("me/model/model-Q8_0.gguf").files[0].state == "downloaded"


def test_a_part_longer_than_the_file_is_begun_again(repo):
    with plan_download(DownloadRequest("me/model/model-Q8_0.gguf")) as plan:
        download.part_path(plan.files[0].target, plan.files[0].entry).write_bytes(bytes(4 << 20))
    run("me/model/model-Q8_0.gguf")
    assert Path("model-Q8_0.gguf").read_bytes() == BIG[::-1]


def test_another_size_than_listed_is_an_error(repo):
    with plan_download(DownloadRequest("me/model/model-Q8_0.gguf")) as plan:
        repo.repos["me/model"]["model-Q8_0.gguf"] = BIG + b"x"
        with pytest.raises(RemoteError, match="3145729 bytes, 3145728 are listed"):
            run_download(plan)


@pytest.mark.parametrize("content", [b"mine", BIG])
def test_a_file_that_differs_is_replaced_with_force_only(repo, content):
    Path("model-Q8_0.gguf").write_bytes(content)
    with pytest.raises(UsageError, match="use --force"):
        run("me/model/model-Q8_0.gguf")
    assert Path("model-Q8_0.gguf").read_bytes() == content
    assert not repo.requests("cdn")
    run("me/model/model-Q8_0.gguf", force=True)
    assert Path("model-Q8_0.gguf").read_bytes() == BIG[::-1]


def test_a_full_disk_is_known_before_the_first_byte(repo, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=KIB))
    with pytest.raises(ResourceError, match=r"needs \d+ bytes, 1024 bytes are free"):
        run("me/model")
    assert not repo.requests("cdn")
    assert not files_below(Path())


HOSTILE = [
    "../evil.gguf",
    "a/../../evil.gguf",
    "/etc/evil.gguf",
    "C:/evil.gguf",
    "a\\..\\evil.gguf",
    "a//evil.gguf",
    "a/./evil.gguf",
    "nul.gguf",
    "COM1",
    "evil.gguf.",
    "evil.gguf ",
    "evil\n.gguf",
    "evil\x1b[2J.gguf",
    "e:vil",
    "e?vil",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_before_anything_is_fetched(repo, name, tmp_path):
    repo.add("me/evil", {"good.gguf": BIG, name: BIG})
    with pytest.raises(MalformedFile, match="no safe file name"):
        run("me/evil")
    assert not repo.requests("cdn")
    assert not files_below(Path())
    run("me/evil", include=("good*",))
    assert files_below(tmp_path / "work") == {"evil/good.gguf"}


def test_names_of_one_spelling_do_not_overwrite_each_other(repo):
    repo.add("me/twins", {"A.gguf": BIG, "a.gguf": BIG})
    with pytest.raises(UsageError, match=r"A.gguf and a.gguf would both be"):
        run("me/twins")


def test_safe_names_stay():
    assert local_name("vae/a b-ü.safetensors") == Path("vae", "a b-ü.safetensors")


def test_a_folder_of_a_repository_is_chosen_by_its_whole_name():
    listing = {name: RemoteEntry(name, 1) for name in ("vae/a", "vae_2/b")}
    assert [one.path for one in select(listing, below="vae")] == ["vae/a"]


def test_files_are_sorted_into_the_folders_of_comfyui(repo, tmp_path):
    repo.add(
        "me/parts",
        {
            "flux.safetensors": EXAMPLE / "transformer/diffusion_pytorch_model.safetensors",
            "split/clip.safetensors": EXAMPLE / "text_encoder/model.safetensors",
            "ae.safetensors": EXAMPLE / "vae/diffusion_pytorch_model.safetensors",
            "strange.gguf": BIG,
            "README.md": SMALL,
        },
    )
    root = tmp_path / "ComfyUI"
    (root / "models").mkdir(parents=True)
    report = run("me/parts", comfy_root=root)
    assert files_below(root / "models") == {
        "diffusion_models/flux.safetensors",
        "text_encoders/clip.safetensors",
        "vae/ae.safetensors",
    }
    assert list(report.left_out) == ["strange.gguf"]
    assert report.no_models == ("README.md",)
    with pytest.raises(UsageError, match="no file that ComfyUI loads"):
        run("me/parts", comfy_root=root, include=("*.md",))


def test_the_real_client_lists_and_fetches_from_the_same_server(repo, tmp_path):
    """The server that these tests trust is one that huggingface_hub can work with."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=repo.url, token=False)
    listed = {
        one.path: one.size
        for one in api.list_repo_tree("me/model", recursive=True)
        if hasattr(one, "size")
    }
    assert listed == {name: len(data) for name, data in repo.repos["me/model"].items()}


def test_reports_turn_into_json(repo):
    from diffquant.core.report import to_json

    body = json.loads(json.dumps(to_json(run("me/model", dry_run=True))))
    assert body["dry_run"] is True
    assert body["files"][0]["label"] == "Q4_K_S"
    assert os.sep not in body["files"][0]["path"]
