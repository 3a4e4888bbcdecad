"""Files and a card reach a hub once and safely: the real client, a local hub."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from upload_hub import SIGNATURE, TOKEN, serving

from diffquant.cli.main import cli
from diffquant.convert.request import Request
from diffquant.convert.several import Wanted, run_jobs
from diffquant.quant.types import type_named

# The client's own call of httpx2, which says so at every upload.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
ROOT = Path(__file__).parents[2]
REPO = "me/Shapes-GGUF"
TO = ("--to", f"hf:{REPO}", "--base-model", "me/shapes", "--license", "cc0-1.0")
Q4, Q8 = "shapes-Q4_K_S.gguf", "shapes-Q8_0.gguf"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    names = {"q4_k_s": Q4, "q8_0": Q8}
    run_jobs(
        ROOT / "examples" / "flux1-shapes",
        [Wanted(folder / name, Request("gguf", type_named(kind))) for kind, name in names.items()],
        workers=2,
        verify="none",
    )
    return folder


@pytest.fixture
def out(made, tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    for one in made.iterdir():
        os.link(one, folder / one.name)
    return folder


def run(*words: object):
    return CliRunner().invoke(cli, ["publish", *map(str, words)])


def result(*words: object):
    found = run(*words, "--json")
    assert found.exit_code == 0, found.stderr
    return json.loads(found.stdout)["result"]


def test_files_and_card_arrive_whole_in_a_private_repository(upload_hub, out):
    report = result(out, *TO, "--tag", "v1")
    assert report["state"] == "created"
    assert report["visibility"] == "private"
    assert upload_hub.repos[REPO].private
    files = upload_hub.files(REPO)
    assert set(files) == {"README.md", Q4, Q8}
    assert files[Q4] == (out / Q4).read_bytes()
    assert files["README.md"].decode() == report["card"]
    assert upload_hub.repos[REPO].tags == {"v1": report["commit"]}
    assert sorted(one.name for one in out.iterdir()) == [Q4, Q8]  # no staging folder is left


def test_a_dry_run_draws_nothing(out, tmp_path):
    flux, prompts = ROOT / "examples" / "flux1-shapes", tmp_path / "prompts.txt"
    prompts.write_text("a small red circle\n")
    grid = tmp_path / "grid.png"
    words = ("--draw", flux, "--grid", grid, "--prompts", prompts, "--license", "cc0-1.0")
    before = sorted(tmp_path.rglob("*"))
    ran = run(out, *TO, *words, "--dry-run")
    assert ran.exit_code == 0, ran.stderr
    assert f"{grid} is not there and not in this card" in ran.stderr
    assert "grid.png" not in ran.stdout
    assert sorted(tmp_path.rglob("*")) == before
    prompts.unlink()
    assert run(out, *TO, *words, "--dry-run").exit_code != 0  # what a run refuses
    grid.write_bytes((ROOT / "examples" / "flux1-shapes-samples.png").read_bytes())
    assert "samples: the original" in run(out, *TO, *words, "--dry-run").stdout


def test_a_second_run_makes_no_commit(upload_hub, out):
    result(out, *TO)
    before = upload_hub.count("POST .*/commit/")
    report = result(out, *TO)
    assert report["state"] == "nothing to do"
    assert report["sent_nbytes"] == 0
    assert upload_hub.count("POST .*/commit/") == before == 1
    assert "nothing to do" in run(out, *TO).stdout


def test_only_what_changed_is_sent(upload_hub, out):
    result(out, *TO)
    upload_hub.asked.clear()
    report = result(out / Q4, *TO)  # one file less: the card changes
    states = {one["place"]: one["state"] for one in report["files"]}
    assert states == {"README.md": "changed", Q4: "there"}
    assert upload_hub.count("PUT /lfs") == 0
    assert set(upload_hub.files(REPO)) == {"README.md", Q4, Q8}  # nothing is removed


def test_public_is_asked_for(upload_hub, out):
    assert result(out, *TO, "--public")["visibility"] == "public"
    assert not upload_hub.repos[REPO].private
    refused = run(out / Q4, *TO)
    assert refused.exit_code == 2
    assert "is public" in refused.stderr


def test_visibility_of_a_repository_that_exists_stays(upload_hub, out):
    upload_hub.put(REPO, True)
    found = run(out, *TO, "--public")
    assert found.exit_code == 0
    assert "is private and stays so" in found.stderr
    assert upload_hub.repos[REPO].private


def test_a_foreign_card_is_not_written_over(upload_hub, out):
    upload_hub.put(REPO, True, **{"README.md": b"# mine\n\nwritten by hand\n"})
    refused = run(out, *TO)
    assert refused.exit_code == 2
    assert "2 of its lines" in refused.stderr
    assert upload_hub.files(REPO) == {"README.md": b"# mine\n\nwritten by hand\n"}
    assert result(out, *TO, "--force")["state"] == "updated"


def test_our_own_card_is_replaced_until_somebody_edits_it(upload_hub, out):
    result(out, *TO)
    assert result(out, *TO, "--title", "Shapes")["state"] == "updated"
    files = upload_hub.files(REPO)
    files["README.md"] = files["README.md"].replace(b"# Shapes", b"# Shapes, edited")
    assert run(out, *TO).exit_code == 2


def test_a_pull_request_leaves_the_branch_alone(upload_hub, out):
    upload_hub.put(REPO, True, **{"README.md": b"# mine\n"})
    upload_hub.read_only.add(REPO)
    report = result(out, *TO, "--create-pr")
    assert report["state"] == "proposed"
    assert report["pull_request"].endswith("/discussions/1")
    assert upload_hub.files(REPO) == {"README.md": b"# mine\n"}
    assert Q4 in upload_hub.files(REPO, "refs/pr/1")


def test_a_branch_is_made_and_committed_to(upload_hub, out):
    upload_hub.put(REPO, True)
    result(out, *TO, "--revision", "next")
    assert upload_hub.files(REPO) == {}
    assert Q4 in upload_hub.files(REPO, "next")
    assert result(out, *TO, "--revision", "next")["state"] == "nothing to do"


def test_a_tag_that_exists_is_refused_before_anything_is_sent(upload_hub, out):
    upload_hub.put(REPO, True).tags["v1"] = "0" * 40
    refused = run(out, *TO, "--tag", "v1")
    assert refused.exit_code == 2
    assert upload_hub.count("commit|PUT") == 0


def test_an_upload_that_was_cut_goes_on(upload_hub, out):
    first = max(out.iterdir(), key=lambda one: one.stat().st_size)
    upload_hub.fail("PUT /lfs", times=100)
    cut = run(out, *TO)
    assert cut.exit_code == 1
    assert "cut off" in cut.stderr
    assert "same command again" in cut.stderr
    assert len(cut.stderr.splitlines()[-1]) < 400
    assert sorted(one.name for one in out.iterdir()) == [Q4, Q8]
    upload_hub.faults.clear()
    upload_hub.objects[hashlib.sha256(first.read_bytes()).hexdigest()] = first.read_bytes()
    upload_hub.asked.clear()
    assert result(out, *TO)["state"] == "updated"
    assert upload_hub.count("PUT /lfs") == 1  # the other one had come
    assert set(upload_hub.files(REPO)) == {"README.md", Q4, Q8}


@pytest.mark.parametrize(
    ("where", "status", "said"),
    [
        ("whoami", 401, "the token is not accepted"),
        ("repos/create", 403, "needs write access"),
        ("preupload", 404, "no such repository or revision"),
        ("repos/create", 409, "changed or was made meanwhile"),
        ("POST .*commit/", 409, "changed or was made meanwhile"),
        ("POST .*commit/", 413, "larger than the server takes"),
        ("PUT /lfs", 413, "larger than the server takes"),
        ("objects/batch", 403, "needs write access"),
        ("POST .*commit/", 429, "too many requests"),
        ("POST .*commit/", 503, "the server fails"),
        ("PUT /lfs", 507, "storage of the account is full"),
    ],
)
def test_a_refusal_is_one_clear_line(upload_hub, out, where, status, said):
    upload_hub.fail(where, status, times=100, message=f"quota of {TOKEN}")
    found = run(out, *TO)
    assert found.exit_code == 1
    last = found.stderr.splitlines()[-1]
    assert last.startswith("diffquant publish: me/Shapes-GGUF: ")
    assert str(status) in last
    assert said in last
    assert TOKEN not in found.output + found.stderr


def test_no_right_to_write_is_told_before_files_are_hashed(upload_hub, out, monkeypatch):
    def hashed(*_, **__):
        raise AssertionError("too early")

    monkeypatch.setattr("diffquant.publish.release.facts_of", hashed)
    upload_hub.put(REPO, True)
    upload_hub.read_only.add(REPO)
    found = run(out, *TO)
    assert found.exit_code == 1
    assert "403" in found.stderr
    assert "--create-pr" in found.stderr


def test_a_repository_that_moved_meanwhile_is_left_alone(upload_hub, out):
    repo = upload_hub.put(REPO, True)
    repo.heads["main"] = "1" * 40

    class Moving(dict):
        def get(self, key, default=None):
            return "2" * 40 if key == "main" else default

    repo.heads = Moving(repo.heads)
    found = run(out, *TO)
    assert found.exit_code == 1
    assert "changed meanwhile" in found.stderr


def test_nothing_is_asked_in_a_dry_run_or_for_a_card(upload_hub, out, tmp_path):
    planned = result(out, *TO, "--dry-run")
    assert planned["state"] == "planned"
    card = tmp_path / "README.md"
    assert run(out, "--card-only", "-o", card, *TO[2:]).exit_code == 0
    assert card.read_text().startswith("---\nbase_model:\n- me/shapes\n")
    assert upload_hub.asked == []


def test_offline_and_without_a_token_it_says_so(upload_hub, out, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    found = run(out, *TO)
    assert found.exit_code == 2
    assert "hf auth login" in found.stderr
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = run(out, *TO)
    assert found.exit_code == 1
    assert "HF_HUB_OFFLINE" in found.stderr
    assert upload_hub.asked == []


def test_a_server_that_is_not_there_is_told(upload_hub, out, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = run(out, *TO)
    assert found.exit_code == 1
    assert "check the network" in found.stderr


def test_a_token_file_is_read_and_never_repeated(upload_hub, out, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert result(out, *TO, "--token-file", file)["state"] == "created"
    file.write_text(f"{TOKEN} and more\n")
    found = run(out, *TO, "--token-file", file)
    assert found.exit_code == 2
    assert TOKEN not in found.output + found.stderr


def test_files_are_linked_and_copied_where_they_cannot_be(upload_hub, out, monkeypatch):
    def refused(*_):
        raise OSError(errno.EXDEV, "other disk")

    assert result(out, *TO)["copied_nbytes"] == 0
    monkeypatch.setattr(os, "link", refused)
    found = result(out, *TO, "--title", "x")
    assert found["copied_nbytes"] == sum(one.stat().st_size for one in out.iterdir())
    assert any("copied" in note for note in found["notes"])


def test_no_room_for_a_copy_is_exit_code_6(upload_hub, out, monkeypatch):
    def refused(*_):
        raise OSError(errno.EXDEV, "other disk")

    monkeypatch.setattr(os, "link", refused)
    usage = shutil.disk_usage(out)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    found = run(out, *TO)
    assert found.exit_code == 6
    assert "1000 bytes are free" in found.stderr
    assert upload_hub.count("commit") == 0
    assert sorted(one.name for one in out.iterdir()) == [Q4, Q8]


def test_a_full_disk_while_staging_is_exit_code_6(upload_hub, out, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    found = run(out, *TO)
    assert found.exit_code == 6
    assert "disk full" in found.stderr


def test_the_token_is_nowhere_whatever_is_printed(out, tmp_path):
    """A run of its own, as loud as can be, with faults on the way: nothing repeats the token."""
    with serving() as hub:
        hub.fail("PUT /lfs", 503, times=1, message=TOKEN)
        hub.fail("POST .*commit/", 413, times=1, message=f"for {TOKEN}")
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_VERBOSITY": "debug",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"),
            "DIFFQUANT_CACHE": str(tmp_path / "cache"),
            "DIFFQUANT_DEBUG": "1",
        }
        command = [sys.executable, "-m", "diffquant", "publish", str(out), *TO, "-v", "-v"]
        loud = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert loud.returncode == 1, loud.stderr
    assert "413" in loud.stderr
    assert "Traceback" in loud.stderr
    assert "503" in loud.stderr  # with the URL that it was asked at
    for text in (loud.stdout, loud.stderr):
        assert TOKEN not in text
        assert SIGNATURE not in text
    for place in tmp_path.rglob("*"):
        assert not place.is_file() or TOKEN.encode() not in place.read_bytes(), place


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--to", "me/x"), "expected hf:OWNER/NAME"),
        (("--to", "hf:a/../b"), "expected hf:OWNER/NAME"),
        (("--to", "hf:a/b", "--tag", "-x"), "no name of a tag"),
        (("--to", "hf:a/b", "--revision", "a..b"), "no name of a branch"),
        (("--to", "hf:a/b", "--create-pr", "--revision", "b"), "refs/pr/N"),
        (("--to", "hf:a/b", "--license", "other"), "--license-link"),
        (("--to", "hf:a/b", "--license-name", "x"), "go with --license other"),
        (("--to", "hf:a/b", "-o", "x.md"), "--card-only writes"),
        (("--card-only", "-o", "x.gguf", "--force"), "a card is a .md file"),
        ((), "give --to"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(upload_hub, out, words, said):
    found = run(out, *words, *(() if "--license-name" in words else ("--dry-run",)))
    assert found.exit_code == 2, found.stderr
    assert said in found.stderr
    assert upload_hub.asked == []
