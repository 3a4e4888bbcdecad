"""Remote names are told from local ones, whatever pathlib made of them."""

from pathlib import Path, PureWindowsPath

import pytest

from diffquant.core.errors import UsageError
from diffquant.io.locations import locate
from diffquant.io.remote_name import HubName, UrlName, parse_remote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf://me/repo", HubName("me/repo")),
        ("hf://me/repo/", HubName("me/repo")),
        ("HF://me/repo", HubName("me/repo")),
        ("hf://models/me/repo", HubName("me/repo")),
        ("hf://me/repo/a/b.gguf", HubName("me/repo", "a/b.gguf")),
        ("hf://me/repo/a/b.gguf@v1.0", HubName("me/repo", "a/b.gguf", "v1.0")),
        ("hf://me/repo@v1.0/a/b.gguf", HubName("me/repo", "a/b.gguf", "v1.0")),
        ("hf://me/repo@v1.0", HubName("me/repo", "", "v1.0")),
        (f"hf://me/repo/x.gguf@{COMMIT}", HubName("me/repo", "x.gguf", COMMIT)),
        ("hf://me/repo@refs/pr/3/a.gguf", HubName("me/repo", "a.gguf", "refs/pr/3")),
        ("hf://me/repo@refs/pr/3", HubName("me/repo", "", "refs/pr/3")),
        ("hf://me/repo/a.gguf@refs%2Fpr%2F3", HubName("me/repo", "a.gguf", "refs/pr/3")),
        ("https://huggingface.co/me/repo", HubName("me/repo")),
        ("https://huggingface.co/me/repo/blob/main/a/b c.gguf", HubName("me/repo", "a/b c.gguf")),
        (
            "https://huggingface.co/me/repo/resolve/v1/a%20b.gguf?download=true",
            HubName("me/repo", "a b.gguf", "v1"),
        ),
        (
            "https://hf.co/me/repo/blob/refs%2Fpr%2F3/a.gguf",
            HubName("me/repo", "a.gguf", "refs/pr/3"),
        ),
        ("https://huggingface.co/me/repo/tree/main", HubName("me/repo")),
        ("https://mirror.test/hf/me/repo/blob/main/a.gguf", HubName("me/repo", "a.gguf")),
        ("https://example.org/a.gguf?sig=1", UrlName("https://example.org/a.gguf?sig=1")),
        ("model.safetensors", None),
        ("./hf/x", None),
        ("C:/models/x.gguf", None),
        ("hf:x", None),
    ],
)
def test_names(monkeypatch, text, name):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.test/hf/")
    assert parse_remote(text) == name


@pytest.mark.parametrize(
    "name", [HubName("me/r", "a/b.gguf", "v1"), HubName("me/r"), HubName("me/r", "", "v1")]
)
def test_what_a_name_prints_as_is_that_name(name):
    assert parse_remote(str(name)) == name


def test_slashes_that_pathlib_lost_are_understood():
    name = HubName("me/repo", "a.gguf")
    assert parse_remote(Path("hf://me/repo/a.gguf")) == name
    assert parse_remote(PureWindowsPath("hf://me/repo/a.gguf")) == name
    url = UrlName("https://example.org/a.gguf")
    assert parse_remote(Path("https://example.org/a.gguf")) == url


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf://me", "expected hf://owner/repo"),
        ("hf://me/../x", "no name of a repository"),
        ("hf://me/repo/../../etc/passwd", "no path inside a repository"),
        ("hf://me/repo/a\0b.gguf", "no path inside a repository"),
        ("hf://me/repo/a.gguf@../../x", "no branch, tag or commit"),
        ("hf://me/repo/a.gguf@a..b", "no branch, tag or commit"),
        ("hf://me/repo/a.gguf@", "no branch, tag or commit"),
        ("hf://me/re po", "no name of a repository"),
        ("hf://datasets/me/repo", "only model repositories"),
        ("https://huggingface.co/datasets/me/repo", "only model repositories"),
        ("https://huggingface.co/me/repo/discussions/3", "no link to a repository"),
        ("https://huggingface.co/me/repo/blob/main/%2e%2e/%2e%2e/x", "no path inside"),
        ("https://user:secret@example.org/x.gguf", "password"),
        ("https://[::1", "no web address"),
    ],
)
def test_what_is_no_name_says_what_one_looks_like(text, message):
    with pytest.raises(UsageError, match=message) as error:
        parse_remote(text)
    assert "secret" not in str(error.value)


def test_a_local_path_stays_a_path(tmp_path):
    assert locate(tmp_path) == tmp_path
    assert locate("a/b.gguf") == Path("a/b.gguf")
