"""ModelScope: the calls fit the real client's signatures; a fake stands where the server would.

No server that speaks ModelScope's routes is at hand. The client's class is mocked with its own
signatures, so that a call it would not take fails; a closed port shows what a real failure says.
"""

import inspect
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest

from diffquant.core.errors import RemoteError, UsageError
from diffquant.publish.hubs import RemoteFile, Target

hub = pytest.importorskip("modelscope_hub")

from diffquant.publish.modelscope import ModelScope  # noqa: E402 - after the skip

TOKEN = "ms-verySecretToken0123"
TARGET = Target("modelscope", "me/x")


@pytest.fixture
def client(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "token"
    file.write_text(TOKEN)
    made = ModelScope(file)
    made._api = create_autospec(hub.HubApi, instance=True)
    return made


def test_a_repository_is_read(client):
    api = client._api
    api.repo_exists.return_value = True
    api.get_repo.return_value = hub.types.RepoInfo(private=True)
    info = inspect.signature(hub.types.FileInfo)
    assert {"path", "size", "sha256", "type"} <= set(info.parameters)
    api.list_repo_files.return_value = [
        hub.types.FileInfo(path="a.gguf", size=3, sha256="ab"),
        hub.types.FileInfo(path="samples", type="tree"),
    ]
    found = client.state(TARGET, write=True)
    assert found.private is True
    assert found.files == {"a.gguf": RemoteFile(3, "ab", "")}
    api.repo_exists.return_value = False
    assert client.state(TARGET, write=True) is None


@pytest.mark.parametrize(("visibility", "private"), [(1, True), (3, True), (5, False)])
def test_visibility_is_told(client, visibility, private):
    client._api.repo_exists.return_value = True
    client._api.get_repo.return_value = hub.types.RepoInfo(visibility=visibility)
    client._api.list_repo_files.return_value = []
    assert client.state(TARGET, write=True).private is private


def test_a_folder_is_sent_without_what_is_there(client, tmp_path):
    client.create("me/x", private=True)
    client.upload(
        TARGET, tmp_path, unchanged=["a[1].gguf"], message="m", parent="", create_pr=False
    )
    client.tag(TARGET, "v1", "")
    (_, made), (_, sent) = client._api.create_repo.call_args, client._api.upload_folder.call_args
    assert made == {"visibility": "private"}
    assert sent["ignore_patterns"] == ["a[[]1].gguf"]
    assert tmp_path not in Path(sent["tracker_path"]).parents or "cache" in str(
        sent["tracker_path"]
    )
    client._api.create_repo_tag.assert_called_once_with("me/x", "model", "v1", revision="master")


def test_there_are_no_pull_requests(client, tmp_path):
    with pytest.raises(UsageError, match="no pull requests"):
        client.upload(TARGET, tmp_path, unchanged=[], message="m", parent="", create_pr=True)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        ("AuthenticationError", 401, "token is not accepted"),
        ("PermissionDeniedError", 403, "write access"),
        ("RateLimitError", 429, "too many requests"),
        ("ServerError", 502, "the server fails"),
    ],
)
def test_refusals_are_one_line_without_the_token(client, error, status, said):
    raised = getattr(hub.errors, error)(f"no, {TOKEN}", status_code=status)
    client._api.whoami.side_effect = raised
    with pytest.raises(RemoteError, match=said) as found:
        client.check("me/x")
    assert str(status) in str(found.value)
    assert TOKEN not in f"{found.value} {found.value.__cause__}"


def test_our_own_mistakes_are_not_the_hubs(client):
    client._api.whoami.side_effect = TypeError("a bug")
    with pytest.raises(TypeError):
        client.check("me/x")


def test_the_real_client_tells_of_a_server_that_is_not_there(client, monkeypatch):
    client._api = hub.HubApi(token=TOKEN, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(RemoteError, match="check the network") as found:
        client.check("me/x")
    assert TOKEN not in f"{found.value} {found.value.__cause__}"


def test_without_client_or_token_it_says_what_to_do(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(
        "modelscope_hub.config.get_default_config",
        lambda: SimpleNamespace(token=None, endpoint=None),
    )
    with pytest.raises(UsageError, match="ms-hub login"):
        ModelScope()
    monkeypatch.setitem(__import__("sys").modules, "modelscope_hub", None)
    with pytest.raises(UsageError, match=r"pip install diffquant\[modelscope\]"):
        ModelScope()
