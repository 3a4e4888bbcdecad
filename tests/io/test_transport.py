"""Whatever bytes a server sends, one of our errors comes of it, in bounded time and memory."""

import random
import socket
import threading
from contextlib import contextmanager, suppress

import pytest

from diffquant.core.errors import DiffquantError, RemoteError, UsageError
from diffquant.io import open_source, transport
from diffquant.io.transport import Patience, Transport, shown

GOOD = (
    b"HTTP/1.1 206 Partial Content\r\nContent-Length: 10\r\nContent-Range: bytes 0-9/10\r\n"
    b'ETag: "x"\r\n\r\n\x02\0\0\0\0\0\0\0{}'
)


@contextmanager
def answering(raw):
    """A server that sends `raw` to whoever connects, and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                try:
                    connection.recv(1 << 16)
                    connection.sendall(raw)
                except OSError:
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/model.safetensors"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(transport, "PATIENCE", Patience(silence_s=0.5, waits_s=(0.0,)))


def test_the_good_answer_is_good():
    with answering(GOOD) as url, open_source(url) as source:
        assert not source.specs


ANSWERS = [
    b"",
    b"\0" * 100,
    b"SSH-2.0-OpenSSH_9\r\n",
    b"HTTP/1.1 abc OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nxxxxx",
    b"HTTP/1.1 206 OK\r\nContent-Length: 9999999999999999999999\r\n\r\nx",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\nabc",
    b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000 + b"\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:99999/x\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://\xff\xfe/x\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: //\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: /a b\xe9\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 416 No\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 204 Nothing\r\n\r\n",
    b"HTTP/1.1 999 What\r\nContent-Length: 0\r\n\r\n",
]


@pytest.mark.parametrize("raw", ANSWERS, ids=range(len(ANSWERS)))
def test_strange_answers_are_errors_of_ours(raw):
    with answering(raw) as url, pytest.raises(DiffquantError):
        open_source(url)


def test_damaged_answers_are_errors_of_ours():
    rng = random.Random(5)
    for _ in range(60):
        damaged = bytearray(GOOD)
        for _ in range(rng.choice((1, 2, 8))):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 10, 13, 32, 45, 57, 255))
        with answering(bytes(damaged)) as url, suppress(DiffquantError):
            open_source(url).close()


@pytest.mark.parametrize(
    "url", ["http://" + "a" * 70 + ".test/x", "http://a..b/x", "http://ü\udc80/x"]
)
def test_hosts_that_no_name_service_knows(monkeypatch, url):
    with pytest.raises((RemoteError, UsageError)):
        open_source(url)


def test_messages_show_no_credentials():
    assert shown("https://user:key@host:8/a/b?sig=1#x") == "https://host:8/a/b"


def test_a_body_that_is_too_long_is_refused_before_it_is_read():
    with (
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n") as url,
        pytest.raises(RemoteError, match="too long: 99999 bytes, at most 10"),
    ):
        Transport().whole(url, limit=10)
