"""deploy/nginx.conf under a real nginx: streams pass as they come, keys pass, a full server's neighbour is asked."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]
CONFIG = (ROOT / "deploy" / "nginx.conf").read_text(encoding="utf-8")
HERE = ROOT / ".cache" / "nginx" / "usr" / "sbin" / "nginx"  # where a package was unpacked without being installed


@pytest.fixture(scope="module")
def nginx() -> str:
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:{HERE.parent}")
    if found is None:
        pytest.skip("nginx is not here (Debian: apt install nginx)")
    return found


@contextlib.contextmanager
def routing(nginx: str, place: Path, first: int, second: int) -> Iterator[str]:
    """The configuration as it is, but for its ports and the file of its process id; its address."""
    port = free_port()
    text = CONFIG
    for old, new in (
        ("/tmp/heed-nginx.pid", f"{place}/pid"),
        ("listen 127.0.0.1:8080;", f"listen 127.0.0.1:{port};"),
        ("server 127.0.0.1:8000 ", f"server 127.0.0.1:{first} "),
        ("server 127.0.0.1:8001 ", f"server 127.0.0.1:{second} "),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):  # Debian's are root's
        text = text.replace("    access_log off;", f"    {name}_temp_path {place}/{name};\n    access_log off;", 1)
    file = place / "nginx.conf"
    file.write_text(text)
    more = "daemon off;" + (" user root;" if os.geteuid() == 0 else "")  # its workers write into the test's folder
    command = [nginx, "-p", str(place), "-e", "stderr", "-c", str(file), "-g", more]
    log = (place / "log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None, (place / "log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)
        log.close()


@contextlib.contextmanager
def upstream(answer: Callable[[Any], None]) -> Iterator[int]:
    """A server whose every request is answered by `answer(handler)`; its port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            answer(self)

        def log_message(self, *ignored: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def send(handler: Any, status: int, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def test_a_token_is_passed_on_before_the_next_one_is_there(nginx: str, tmp_path: Path) -> None:
    """The server writes its second event only when the client has read the first: a buffer would wait for ever."""
    arrived = threading.Event()

    def answer(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"9\r\ndata: 1\n\n\r\n")
        assert arrived.wait(60)
        handler.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    with upstream(answer) as port, routing(nginx, tmp_path, port, port) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        connection.request("POST", "/v1/completions", b"{}")
        response = connection.getresponse()
        assert response.read(9) == b"data: 1\n\n"
        arrived.set()
        assert response.read() == b"data: [DONE]\n\n"
        connection.close()


def test_keys_pass_and_the_name_is_one_that_a_loopback_server_answers_to(nginx: str, tmp_path: Path) -> None:
    def answer(handler: Any) -> None:
        send(handler, 200, json.dumps(dict(handler.headers)).encode())

    with upstream(answer) as port, routing(nginx, tmp_path, port, port) as url:
        headers = {"Authorization": "Bearer key", "X-Request-Id": "mine", "Host": "api.example"}
        seen = httpx.post(f"{url}/v1/completions", content=b"{}", headers=headers, trust_env=False).json()
    assert seen["Authorization"] == "Bearer key"
    assert seen["X-Request-Id"] == "mine"
    assert seen["Host"] == "localhost"
    assert seen["X-Forwarded-For"] == "127.0.0.1"


def test_a_full_server_is_passed_over_and_two_full_ones_say_so(nginx: str, tmp_path: Path) -> None:
    asked: list[bytes] = []

    def full(handler: Any) -> None:
        asked.append(handler.body)
        send(handler, 503, b'{"error": {"code": 503}}')

    with (
        upstream(full) as first,
        upstream(lambda handler: send(handler, 200, handler.body)) as second,
        routing(nginx, tmp_path, first, second) as url,
    ):
        for number in range(6):
            answer = httpx.post(f"{url}/v1/completions", content=f"{number}", trust_env=False)
            assert (answer.status_code, answer.text) == (200, str(number))
    assert asked  # some of them came to the full one first
    with upstream(full) as first, routing(nginx, tmp_path, first, first) as url:
        answer = httpx.post(f"{url}/v1/completions", content="0", trust_env=False)
        assert (answer.status_code, answer.json()) == (503, {"error": {"code": 503}})


def test_bodies_are_bounded_and_metrics_are_not_shown(nginx: str, tmp_path: Path) -> None:
    with upstream(lambda handler: send(handler, 200, b"ok")) as port, routing(nginx, tmp_path, port, port) as url:
        assert httpx.post(f"{url}/v1/completions", content=b" " * (8 << 20), trust_env=False).status_code == 200
        assert httpx.post(f"{url}/v1/completions", content=b" " * (9 << 20), trust_env=False).status_code == 413
        assert httpx.get(f"{url}/metrics", trust_env=False).status_code == 404


def test_a_stream_through_the_router_is_the_servers(nginx: str, tiny_server: Any, tmp_path: Path) -> None:
    body = {"model": "runs/demo/model", "prompt": "Before", "max_tokens": 12, "temperature": 0, "stream": True}

    def text(url: str) -> str:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, trust_env=False, timeout=60) as answer:
            events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert events[-1] == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])

    port = int(tiny_server.url.rsplit(":", 1)[1])
    with routing(nginx, tmp_path, port, port) as url:
        assert text(url) == text(tiny_server.url) != ""
