"""Files on a server read as files on a disk do, and every fault of a network is one clear error."""

import json
import logging
import socket
import struct

import numpy as np
import pytest
from hub_server import COMMIT

from diffquant.core.errors import (
    CheckpointError,
    MalformedFile,
    RemoteError,
    SeveralCheckpoints,
    TruncatedFile,
)
from diffquant.io import open_source, transport
from diffquant.io.locations import is_remote, locate
from diffquant.io.transport import Patience, Transport

KIB = 1 << 10


def safetensors_bytes(tensors, padding=0):
    """key -> (dtype, shape, bytes) as a file; `padding` spaces make the header long."""
    header, at = {}, 0
    for key, (dtype, shape, data) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode() + b" " * padding
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(one for _, _, one in tensors.values())


def noise(count, seed=3):
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8).tobytes()


BIG = {"a": ("U8", [700, KIB], noise(700 * KIB)), "b": ("I8", [3], b"abc")}


@pytest.fixture
def repo(hub, sample):
    """Every container's sample as a repository; yields (hub, name to open, sample)."""
    root = sample.path if sample.path.is_dir() else sample.path.parent
    files = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.parts)
    }
    hub.add("me/sample", files)
    name = "hf://me/sample"
    return hub, name if sample.path.is_dir() else f"{name}/{sample.path.name}", sample


def test_every_container_reads_as_it_does_from_a_disk(repo):
    _, name, sample = repo
    with open_source(name) as remote, open_source(sample.path) as local:
        assert list(remote.specs.values()) == list(local.specs.values())
        assert dict(remote.metadata) == dict(local.metadata)
        assert dict(remote.configs) == dict(local.configs)
        assert (remote.container, remote.nbytes) == (local.container, local.nbytes)
        for key, data in sample.tensors.items():
            found = remote.read(key)
            assert np.array_equal(found, data)
            assert not found.flags.writeable
    with pytest.raises(CheckpointError, match="after close"):
        remote.read(next(key for key, spec in remote.specs.items() if spec.nbytes))


def test_a_cut_connection_goes_on_where_it_was_cut(repo):
    hub, name, sample = repo
    hub.fail("cut", "resolve|files", times=2)
    with open_source(name) as source:
        for key, data in sample.tensors.items():
            assert np.array_equal(source.read(key), data)


def test_a_sharded_repository_without_a_named_file_opens_its_index(hub, writing):
    plan, write_all = writing
    del plan, write_all
    parts = [safetensors_bytes({key: ("I8", [3], b"abc")}) for key in ("a", "b")]
    names = [f"m-0000{index}-of-00002.safetensors" for index in (1, 2)]
    index = json.dumps({"weight_map": dict(zip("ab", names, strict=True))}).encode()
    hub.add(
        "me/sharded",
        {"m.safetensors.index.json": index, **dict(zip(names, parts, strict=True))},
    )
    with open_source("hf://me/sharded") as source:
        assert source.container == "sharded"
        assert set(source.specs) == {"a", "b"}


def big_repo(hub, **files):
    hub.add("me/big", {"big.safetensors": safetensors_bytes(BIG), **files})
    return "hf://me/big/big.safetensors"


def test_a_header_takes_one_request_to_the_hub_and_one_to_the_cdn(hub):
    with open_source(big_repo(hub)) as source:
        assert set(source.specs) == {"a", "b"}
    assert [one.server for one in hub.asked] == ["hub", "cdn"]


def test_a_long_header_takes_one_more(hub):
    hub.add("me/big", {"big.safetensors": safetensors_bytes(BIG, padding=600 * KIB)})
    with open_source("hf://me/big/big.safetensors") as source:
        assert np.array_equal(source.read("a"), np.frombuffer(BIG["a"][2], np.uint8))
    ranges = [one.headers["Range"] for one in hub.requests("cdn")]
    assert ranges[0] == "bytes=0-262143"
    assert ranges[1].startswith("bytes=262144-")
    assert len(ranges) == 3


def test_later_requests_go_to_the_cdn_without_the_hub_until_the_link_expires(hub):
    with open_source(big_repo(hub)) as source:
        source.read("a", (400, 401))
        assert len(hub.requests("hub")) == 1
        hub.fail("status", "cdn", times=1, value=403)
        assert source.read("a", (600, 601)).size == KIB
    assert len(hub.requests("hub")) == 2


def test_what_was_fetched_is_not_fetched_again(hub):
    with open_source(big_repo(hub)) as source:
        before = len(hub.asked)
        source.read("a", (0, 100))
        assert len(hub.asked) == before


def test_the_token_goes_to_the_hub_and_not_to_the_cdn(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with open_source(big_repo(hub)):
        pass
    assert hub.requests("hub")[0].headers["Authorization"] == "Bearer hf_secret"
    assert "Authorization" not in hub.requests("cdn")[0].headers


def test_markers_are_fetched_together_wherever_they_lie(hub):
    tensors = {}
    for index in range(40):
        tensors[f"{index}.weight"] = ("I8", [400, KIB], bytes(400 * KIB))
        tensors[f"{index}.marker"] = ("U8", [20], noise(20, index))
    near = {f"{index}.m": ("U8", [20], noise(20, index)) for index in range(300)}
    hub.add("me/far", {"m.safetensors": safetensors_bytes(tensors)})
    hub.add("me/near", {"m.safetensors": safetensors_bytes({"w": tensors["0.weight"], **near})})
    with open_source("hf://me/far/m.safetensors") as source:
        before = len(hub.asked)
        source.read("7.marker")
        assert len(hub.asked) - before == 40  # all of them, several at a time
        for index in range(40):
            assert source.read(f"{index}.marker").tobytes() == noise(20, index)
        assert len(hub.asked) - before == 40
    hub.asked.clear()
    with open_source("hf://me/near/m.safetensors") as source:
        for index in range(300):
            assert source.read(f"{index}.m").tobytes() == noise(20, index)
    assert len(hub.asked) == 3


def test_a_pickle_is_described_without_a_request_for_each_storage(hub, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.ckpt"
    state = {f"{index}": torch.full((300, 300), index) for index in range(30)}
    torch.save({"state_dict": state}, path)
    hub.add("me/old", {"model.ckpt": path})
    with open_source("hf://me/old") as source:
        assert len(source.specs) == 30
        assert len(hub.requests("cdn")) <= 3
        assert source.read("7").view(np.int64)[0] == 7


def test_requests_and_bytes_are_logged(hub, caplog):
    with caplog.at_level(logging.INFO, logger="diffquant"), open_source(big_repo(hub)):
        pass
    assert "2 requests, 262149 bytes fetched" in caplog.text


def test_the_commit_of_the_first_answer_is_asked_for_from_then_on(hub):
    with open_source(big_repo(hub)) as source:
        hub.fail("status", "cdn", times=1, value=403)
        source.read("a", (600, 601))
    assert f"/resolve/{COMMIT}/" in hub.requests("hub")[1].path


@pytest.mark.parametrize("revision", [COMMIT, "refs/pr/3"])
def test_a_revision_is_asked_for(hub, revision):
    with open_source(f"{big_repo(hub)}@{revision}"):
        pass
    assert f"/resolve/{revision.replace('/', '%2F')}/" in hub.asked[0].path


# Names and access


def test_a_repository_of_several_names_them(hub):
    hub.add("me/big", {"x-Q4_K_S.gguf": b"GGUF", "README.md": b"x", "optimizer.pt": b"x"})
    big_repo(hub)
    with pytest.raises(SeveralCheckpoints, match=r"2 checkpoints.*big.safetensors") as error:
        open_source("hf://me/big")
    assert error.value.names == ("big.safetensors", "x-Q4_K_S.gguf")


def test_a_repository_without_a_checkpoint_says_what_it_has(hub):
    hub.add("me/text", {"README.md": b"x", "notes/a.txt": b"x"})
    with pytest.raises(CheckpointError, match=r"no checkpoint in it \(it has README.md, notes\)"):
        open_source("hf://me/text")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://me/none/x.gguf", "no repository me/none"),
        ("hf://me/none", "no repository me/none"),
        ("hf://me/big/big.safetensors@nope", "no branch, tag or commit 'nope'"),
        ("hf://me/big@nope", "no branch, tag or commit 'nope'"),
        ("hf://me/big/bg.safetensors", "did you mean 'big.safetensors'"),
        ("hf://me/big/zzzzz.gguf", "no file 'zzzzz.gguf' .it has big.safetensors"),
        ("hf://me/big/folder", "no file 'folder'"),
        ("hf://me/gated/x.gguf", "accept its licence at .*/me/gated, then set HF_TOKEN"),
        ("hf://me/gated", "accept its licence"),
    ],
)
def test_a_refusal_says_what_to_do(hub, name, message):
    big_repo(hub)
    hub.add("me/gated", {"x.gguf": b"GGUF" * 1000})
    hub.gated.add("me/gated")
    with pytest.raises(RemoteError, match=message) as error:
        open_source(name)
    assert str(error.value).startswith(name)


def test_what_a_hub_says_of_a_refusal_is_shown(hub):
    name = big_repo(hub)
    hub.fail("status", "hub", value=403)
    with pytest.raises(RemoteError, match="refuses: forbidden; set HF_TOKEN"):
        open_source(name)
    hub.message = "this token may not read\x1b[2J" + "x" * 1000
    with pytest.raises(RemoteError, match="refuses: this token may not read") as error:
        open_source(name)
    assert len(str(error.value)) < 400


def test_hostile_names_of_a_listing_do_not_lead_out_of_the_cache(hub, tmp_path):
    (tmp_path / ".hf-cache" / "models--me--evil" / "snapshots" / COMMIT).mkdir(parents=True)
    refs = tmp_path / ".hf-cache" / "models--me--evil" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    (tmp_path / "secret.safetensors").write_bytes(safetensors_bytes(BIG))
    up = "/".join([".."] * 4)
    hub.add("me/evil", {f"{up}/secret.safetensors": b"no checkpoint at all"})
    with pytest.raises(CheckpointError):
        open_source("hf://me/evil")


def test_a_token_opens_a_gated_repository(hub, monkeypatch):
    hub.add("me/gated", {"big.safetensors": safetensors_bytes(BIG)})
    hub.gated.add("me/gated")
    hub.token = "hf_good"
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(RemoteError, match="set a token that may read it"):
        open_source("hf://me/gated/big.safetensors")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    with open_source("hf://me/gated/big.safetensors") as source:
        assert "a" in source.specs


def test_a_listing_of_several_pages_is_one(hub):
    hub.page = 2
    hub.add("me/many", {f"{index}.gguf": b"GGUF" for index in range(9)})
    with pytest.raises(SeveralCheckpoints) as error:
        open_source("hf://me/many")
    assert len(error.value.names) == 9


def test_a_listing_that_is_none_is_malformed(hub, monkeypatch):
    hub.add("me/odd", {})
    monkeypatch.setattr("hub_server.json.dumps", lambda rows: "{")
    with pytest.raises(MalformedFile, match="listing"):
        open_source("hf://me/odd")


# Faults


def test_a_connection_that_is_always_cut_is_given_up(hub):
    name = big_repo(hub)
    hub.fail("cut", "cdn", value=0)
    with pytest.raises(RemoteError, match="cut 4 times at byte 0"):
        open_source(name)


def test_progress_forgives_cuts(hub):
    name = big_repo(hub)
    hub.fail("cut", "cdn", times=20, value=20 * KIB)
    with open_source(name) as source:
        assert set(source.specs) == {"a", "b"}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(hub, status):
    name = big_repo(hub)
    hub.fail("status", times=2, value=status)
    with open_source(name):
        pass
    assert len(hub.asked) == 4


@pytest.mark.parametrize(("status", "message"), [(429, "too many requests"), (500, "answers 500")])
def test_a_server_that_stays_busy_is_given_up(hub, status, message):
    name = big_repo(hub)
    hub.fail("status", value=status)
    with pytest.raises(RemoteError, match=message):
        open_source(name)
    assert len(hub.asked) == 4


def test_a_silent_server_is_given_up(hub, monkeypatch):
    name = big_repo(hub)
    monkeypatch.setattr(transport, "PATIENCE", Patience(silence_s=0.1, waits_s=(0.0,)))
    hub.fail("silence", "resolve")
    with pytest.raises(RemoteError, match=r"no answer from 127\.0\.0\.1.* in 2 tries: timed out"):
        open_source(name)


def test_a_server_that_drips_is_given_up(hub, monkeypatch):
    name = big_repo(hub)
    impatient = Patience(silence_s=0.5, slowest=1 << 30, waits_s=())
    monkeypatch.setattr(transport, "PATIENCE", impatient)
    hub.fail("drip", "cdn", times=1, value=30)
    with open_source(name) as source:  # what came is kept, and the rest asked for again
        assert set(source.specs) == {"a", "b"}
    assert len(hub.requests("cdn")) == 2


def test_no_server_is_one_line(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RemoteError, match=r"no answer from 127\.0\.0\.1:9 in 4 tries"):
        open_source("hf://me/big/big.safetensors")


def test_an_unknown_host_is_asked_for_once(hub, monkeypatch):
    asked = []

    def unknown(*address, **_):
        asked.append(address)
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr("http.client.socket.create_connection", unknown)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.test")
    with pytest.raises(RemoteError, match=r"the name hub\.test cannot be resolved"):
        open_source("hf://me/big/big.safetensors")
    assert len(asked) == 1


def test_a_server_without_ranges_is_not_downloaded_from(hub):
    name = big_repo(hub, **{"huge.safetensors": noise(9 << 20)})
    hub.ranges = False
    with open_source(name) as source:  # 700 KiB: the whole of it is one answer
        assert source.read("b").tobytes() == b"abc"
    with pytest.raises(RemoteError, match="no range requests and would send the whole file"):
        open_source("hf://me/big/huge.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        "bytes 5-262148/716945",
        "bytes 0-262143/*",
        "bytes 0-262144/716945",
        "bytes 0-99/50",
        "bytes 9-3/716945",
        "0-262143/716945",
        "",
        "bytes 0-262143/99999999999999999999999",
        f"bytes 0-262143/{2**60}",
    ],
)
def test_a_wrong_content_range_is_refused(hub, text):
    name = big_repo(hub)
    hub.fail("range", "cdn", value=text)
    with pytest.raises(RemoteError, match="asked for, the server sends"):
        open_source(name)


def test_a_length_that_contradicts_its_range_is_refused(hub):
    name = big_repo(hub)
    hub.fail("length", "cdn", value=2**60)
    with pytest.raises(RemoteError, match=f"announces {2**60} bytes"):
        open_source(name)


def test_a_compressed_answer_is_refused(hub):
    name = big_repo(hub)
    hub.fail("encoding", "cdn")
    with pytest.raises(RemoteError, match="compresses"):
        open_source(name)


@pytest.mark.parametrize("ranged", [True, False])
def test_a_file_that_changes_while_it_is_read_is_an_error(hub, ranged):
    with open_source(big_repo(hub)) as source:
        hub.etag_suffix = "-new"
        if ranged:  # a server that ignores If-Range
            hub.faults.clear()
            hub.ignore_if_range = True
        with pytest.raises(RemoteError, match="was replaced on the server"):
            source.read("a", (600, 601))


def test_a_size_that_the_header_denies_is_truncated(hub):
    whole = safetensors_bytes(BIG)
    hub.add("me/big", {"big.safetensors": whole[:-5]})
    with pytest.raises(TruncatedFile):
        open_source("hf://me/big/big.safetensors")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("file:///etc/passwd", "no web address"),
        ("ftp://127.0.0.1/x", "no web address"),
        ("http://[", "no URL"),
    ],
)
def test_a_redirect_to_elsewhere_than_the_web_is_refused(hub, target, message):
    name = big_repo(hub)
    hub.fail("redirect", "hub", value=target)
    with pytest.raises(RemoteError, match=message):
        open_source(name)


def test_redirects_have_an_end(hub):
    name = big_repo(hub)
    hub.fail("redirect", "hub", value=f"{hub.url}/again?token=secret")
    with pytest.raises(RemoteError, match="over 5 redirects") as error:
        open_source(name)
    assert "secret" not in str(error.value)


def test_from_https_nothing_leads_to_http():
    with pytest.raises(RemoteError, match=r"from https to http://127\.0\.0\.1/x: refused"):
        transport._next_url("https://huggingface.co/a", "http://127.0.0.1/x?sig=secret", "here")


def test_a_hostile_header_is_refused_before_anything_is_allocated(hub):
    hub.add("me/big", {"big.safetensors": struct.pack("<Q", 99_000_000) + b"{" + bytes(2000)})
    with pytest.raises(TruncatedFile, match="header of 99000000 bytes"):
        open_source("hf://me/big/big.safetensors")


def test_an_empty_file_is_truncated(hub):
    hub.add("me/big", {"big.safetensors": b""})
    with pytest.raises(CheckpointError):
        open_source("hf://me/big/big.safetensors")


def test_local_use_of_a_remote_path_is_a_clear_error(hub):
    path = locate(big_repo(hub))
    assert is_remote(path)
    with pytest.raises(CheckpointError, match="download it"):
        open(path)  # noqa: PTH123, SIM115 - what a reader that knows no remote files would do


# Caches, offline, plain servers


def cached(hub, monkeypatch, tmp_path, files):
    """What huggingface_hub leaves behind after a download."""
    import huggingface_hub.constants

    base = tmp_path / ".hf-cache" / "models--me--cached"
    for name, content in files.items():
        path = base / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (base / "refs").mkdir(parents=True, exist_ok=True)
    (base / "refs" / "main").write_text(COMMIT)
    assert str(tmp_path) in huggingface_hub.constants.HF_HUB_CACHE


def test_a_cached_file_costs_no_request(hub, monkeypatch, tmp_path):
    cached(hub, monkeypatch, tmp_path, {"a.safetensors": safetensors_bytes(BIG)})
    for offline in ("", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        with open_source("hf://me/cached/a.safetensors") as source:
            assert source.read("b").tobytes() == b"abc"
    assert not hub.asked


def test_offline_without_a_cached_file_says_so(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("hf://me/big/a.gguf", "hf://me/big", "https://example.org/a.gguf"):
        with pytest.raises(RemoteError, match="HF_HUB_OFFLINE"):
            open_source(name)


def test_a_link_to_any_server_is_read(hub):
    hub.add("me/big", {"big.safetensors": safetensors_bytes(BIG)})
    url = f"{hub.cdn_url}/files/me/big/big.safetensors?signature=secret"
    with open_source(url) as source:
        assert source.read("b").tobytes() == b"abc"
        assert "secret" not in str(source.path)
    hub.fail("status", value=403)
    with pytest.raises(RemoteError, match="forbidden") as error:
        open_source(url)
    assert "secret" not in str(error.value)


def test_shards_beside_a_link_are_found(hub):
    part = safetensors_bytes({"a": ("I8", [3], b"abc")})
    index = {"weight_map": {"a": "m-00001-of-00001.safetensors"}}
    hub.add(
        "me/web",
        {
            "m.safetensors.index.json": json.dumps(index).encode(),
            "m-00001-of-00001.safetensors": part,
        },
    )
    with open_source(f"{hub.cdn_url}/files/me/web/m.safetensors.index.json") as source:
        assert source.read("a").tobytes() == b"abc"


def test_connections_are_kept(hub):
    client = Transport()
    for _ in range(5):
        response, body = client.whole(f"{hub.url}/nothing", limit=100)
        assert (response.status, body) == (404, b"")
    assert [len(kept) for kept in client._idle.values()] == [1]
    client.close()


def test_a_proxy_of_the_environment_is_used(hub, monkeypatch):
    hub.add("me/big", {"big.safetensors": safetensors_bytes(BIG)})
    monkeypatch.setenv("http_proxy", hub.cdn_url.replace("//", "//user:p%40ss@"))
    with open_source("http://models.test/files/me/big/big.safetensors") as source:
        assert "a" in source.specs
    assert hub.asked[0].path == "http://models.test/files/me/big/big.safetensors"
    assert hub.asked[0].headers["Proxy-Authorization"] == "Basic dXNlcjpwQHNz"
    assert hub.asked[0].headers["Host"] == "models.test"
