"""From the start to the end: flags, ports, keys, limits, clients that leave, signals, and an engine that dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]
LONG = {"prompt": "fox", "max_tokens": 250, "ignore_eos": True, "stream": True}


def eventually(condition: Any, seconds: float = 8) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if condition():
                return True
        time.sleep(0.02)
    return False


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m serve` with arguments that it cannot serve with."""
    command = [sys.executable, "-m", "serve", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def sentence(done: subprocess.CompletedProcess[str], status: int) -> str:
    """What it said: one line, no traceback."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    return line


class Streams:
    """Requests in threads, each of which reads its stream to the end; `ends` are the last events or the errors."""

    def __init__(self, server, count: int, **fields: Any) -> None:
        self.ends: list[Any] = []
        self._threads = [threading.Thread(target=self._read, args=(server, {**LONG, **fields})) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _read(self, server, fields: dict[str, Any]) -> None:
        last: Any = None
        try:
            with httpx.stream("POST", server.url + "/v1/completions", json=fields, timeout=60) as response:
                if response.status_code != 200:
                    last = response.status_code
                else:
                    for line in response.iter_lines():
                        if line.startswith("data: {"):
                            last = json.loads(line.removeprefix("data: "))
        except httpx.TransportError as error:
            last = error
        self.ends.append(last)

    def join(self) -> list[Any]:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a stream never ended"
        return self.ends


# ---------------------------------------------------------------- what cannot start


def test_a_folder_that_is_none(tmp_path: Path, folder: Path) -> None:
    assert sentence(run(str(tmp_path / "nothing")), 2).endswith(
        "does not exist; a model is a folder with config.json, model.safetensors and tokenizer.json, or a GGUF file."
    )
    (tmp_path / "file.gguf").write_bytes(b"nothing")
    assert "is no GGUF file" in sentence(run(str(tmp_path / "file.gguf"), "--port", "0"), 2)
    assert "has no config.json" in sentence(run(str(tmp_path)), 2)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert "model.safetensors" in sentence(run(str(tmp_path), "--port", "0"), 2)


def test_a_tokenizer_or_defaults_that_are_none(tmp_path: Path, folder: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"temperature": -1}')
    assert "temperature must be in [0, 2], got -1" in sentence(run(str(tmp_path), "--port", "0"), 2)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "is not a tokenizer" in sentence(run(str(tmp_path), "--port", "0"), 2)


def test_a_port_in_use(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = sentence(run(str(folder), "--port", port), 1)
    assert said == f"Port {port} on 127.0.0.1 is in use; choose another with --port."


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "70000"], "argument --port: '70000' is not a whole number from 0 to 65535"),
        (["--max-num-seqs", "0"], "argument --max-num-seqs: '0' is not a whole number of at least 1"),
        (["--dtype", "int3"], "argument --dtype: invalid choice: 'int3'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--max-model-len", "1000"], "--max-model-len is 1000; the model was made for 256 tokens at most."),
        (["--speculative-config", '{"method": "eagle"}'], 'must be an object whose "method" is "ngram"'),
        (["--scheduling-policy", "lifo"], "argument --scheduling-policy: invalid choice: 'lifo'"),
        (["--host", "203.0.113.7"], "Cannot bind 203.0.113.7"),
    ],
)
def test_flags_that_cannot_be(folder: Path, flags: list[str], said: str) -> None:
    if "--port" not in flags:
        flags = [*flags, "--port", "0"]
    assert said in sentence(run(str(folder), *flags), 2)


# ---------------------------------------------------------------- limits


@pytest.fixture(scope="module")
def guarded(folder: Path, tmp_path_factory: pytest.TempPathFactory, launching):
    """A server with a key, little room, and a model_len that the cache made shorter."""
    log = tmp_path_factory.mktemp("log") / "guarded.log"
    flags = ["--api-key", "first-key", "second-key", "--max-body-bytes", "2000", "--max-num-seqs", "1"]
    flags += ["--max-num-queued-reqs", "3", "--kv-cache-memory-bytes", "120000", "--enable-log-requests"]
    running = launching(folder, log, *flags)
    yield running
    running.end()


KEY = {"Authorization": "Bearer second-key"}


def test_the_key_guards_all_but_the_probes(guarded) -> None:
    for path in ("/health", "/ping", "/live"):
        assert httpx.get(guarded.url + path).status_code == 200
    for path in ("/metrics", "/version", "/v1/models", "/openapi.json", "//v1/models", "/v1/../metrics", "/nothing"):
        response = httpx.get(guarded.url + path)
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "AuthenticationError"
    for path in ("/v1/completions", "/tokenize", "/detokenize"):
        assert guarded.post(path, json={"prompt": "a"}).status_code == 401
    for value in ("Bearer wrong", "second-key", "Basic second-key", "Bearer", "Bearer second-key2", ""):
        assert httpx.get(guarded.url + "/v1/models", headers={"Authorization": value}).status_code == 401
    for value in ("Bearer first-key", "bearer second-key"):
        assert httpx.get(guarded.url + "/v1/models", headers={"Authorization": value}).status_code == 200
    for value, status in (("first-key", 200), ("wrong", 401), ("", 401)):
        assert httpx.get(guarded.url + "/v1/models", headers={"x-api-key": value}).status_code == status


def test_a_body_that_is_too_large(guarded) -> None:
    body = json.dumps({"prompt": "a" * 3000}).encode()
    headers = {**KEY, "content-type": "application/json"}
    declared = guarded.post("/v1/completions", content=body, headers=headers)
    streamed = guarded.post("/v1/completions", content=iter([body[:1500], body[1500:]]), headers=headers)
    for response in (declared, streamed):
        assert response.status_code == 413
        assert response.json()["error"]["code"] == 413
        assert "--max-body-bytes" in response.json()["error"]["message"]


def test_a_full_queue(guarded) -> None:
    fields = {"prompt": "a", "max_tokens": 100, "ignore_eos": True}
    whole = guarded.post("/v1/completions", json={**fields, "n": 4}, headers=KEY)
    assert whole.status_code == 400
    assert "4 sequences at once; this server takes 3" in whole.json()["error"]["message"]
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(guarded.post("/v1/completions", json=fields, headers=KEY))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    full = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(full) < 8
    for answer in full:
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert (answer.json()["error"]["code"], answer.json()["error"]["type"]) == (503, "Service Unavailable")
    assert guarded.post("/v1/completions", json=fields, headers=KEY).status_code == 200


def test_a_short_cache_shortens_what_is_served_and_says_so(guarded) -> None:
    log = guarded.log.read_text()
    assert "and not the model's 256: --kv-cache-memory-bytes 120000 holds no more." in log
    card = httpx.get(guarded.url + "/v1/models", headers=KEY).json()["data"][0]
    assert 16 <= card["max_model_len"] < 256
    body = guarded.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}, headers=KEY).json()
    assert eventually(lambda: f"{body['id']}: 1 prompt tokens, 2 generated, 0 cached; " in guarded.log.read_text())


# ---------------------------------------------------------------- clients that leave


def test_clients_that_leave_are_forgotten_at_once(server) -> None:
    before = server.metric("request_success_total")
    with httpx.Client(base_url=server.url, limits=httpx.Limits(max_connections=60), timeout=60) as client:
        responses = []
        for _ in range(50):
            request = client.build_request("POST", "/v1/completions", json={**LONG, "n": 1})
            response = client.send(request, stream=True)
            next(response.iter_lines())
            responses.append(response)
        for response in responses:
            response.close()
    quiet = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    assert eventually(lambda: all(server.metric(name) == 0 for name in quiet), 3)
    assert eventually(lambda: server.metric("request_success_total") - before == 50)


def test_a_client_that_does_not_wait_for_its_body(server) -> None:
    before = server.metric("request_success_total")
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/completions", json={**LONG, "stream": False, "n": 20}, timeout=0.05)
    assert eventually(lambda: server.metric("request_success_total") - before == 20)
    assert server.metric("num_requests_running") == 0
    assert server.metric("kv_cache_usage_perc") == 0


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_ends_with_status_0(start, number: int) -> None:
    server = start()
    assert "serves tiny" in server.log.read_text()
    engine = server.engine_pid()
    streams = Streams(server, 4, n=10)
    assert eventually(lambda: server.metric("num_requests_running") > 20)
    server.process.send_signal(number)
    # Not ready any more, but alive, and those who are being answered are answered to the end.
    states = []
    while server.process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            states.append((httpx.get(server.url + "/health").status_code, httpx.get(server.url + "/live").status_code))
            refused = server.post("/v1/completions", json={"prompt": "a"})
            states.append((refused.status_code, refused.headers.get("retry-after")))
        time.sleep(0.05)
    assert server.wait() == 0
    assert set(states) <= {(503, 200), (503, "1")}  # not once was it ready or took anything
    assert [end["choices"][0]["finish_reason"] for end in streams.join()] == ["length"] * 4
    assert not psutil.pid_exists(engine)
    assert "Traceback" not in server.log.read_text()


def test_a_drain_has_an_end(start) -> None:
    server = start("--shutdown-timeout", "0")
    streams = Streams(server, 2, n=30)
    assert eventually(lambda: server.metric("num_requests_running") > 30)
    begin = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert time.monotonic() - begin < 15
    assert [end["choices"][0]["finish_reason"] for end in streams.join()] == ["abort"] * 2


def test_an_engine_that_dies_takes_the_server_with_it(start) -> None:
    server = start()
    streams = Streams(server, 2, n=30)
    assert eventually(lambda: server.metric("num_requests_running") > 30)
    engine = server.engine_pid()
    os.kill(engine, signal.SIGKILL)
    states = []
    while server.process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            states.append(httpx.get(server.url + "/health").status_code)
    assert server.wait(5) == 1
    assert states == sorted(states)  # 503 from the moment that it is known, and never again 200
    assert not psutil.pid_exists(engine)
    ends = streams.join()
    assert all(end["error"]["code"] == 500 and end["error"]["type"] == "InternalServerError" for end in ends)
    lines = server.log.read_text().splitlines()
    assert lines[-1] == (
        "The engine process has ended unexpectedly; the server is stopping. "
        "It was killed (SIGKILL); the usual reason is that the machine ran out of memory."
    )
    assert "Traceback" not in server.log.read_text()


def test_a_server_that_dies_takes_the_engine_with_it(start) -> None:
    server = start()
    server.chat(messages=[{"role": "user", "content": "fox"}], max_tokens=1)
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) == 2  # the engine, and what renders chats
    server.process.kill()
    server.wait()

    def ended(process: psutil.Process) -> bool:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE

    assert eventually(lambda: all(ended(process) for process in children))


def test_a_server_that_is_killed_while_it_starts_leaves_nobody(folder: Path) -> None:
    command = [sys.executable, "-m", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert eventually(lambda: len(psutil.Process(process.pid).children()) > 0)
    engine = psutil.Process(process.pid).children()[0]
    process.kill()
    process.wait()
    assert eventually(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


def test_a_signal_while_it_starts(folder: Path) -> None:
    command = [sys.executable, "-m", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert eventually(lambda: len(psutil.Process(process.pid).children()) > 0)
    engine = psutil.Process(process.pid).children()[0].pid
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert out == ""
    assert not psutil.pid_exists(engine)


def test_the_http_process_loads_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        "import sys, serve.__main__, serve.api.app, serve.api.server; from lm.tokenizer import Tokenizer;"
        f"Tokenizer.load({str(folder)!r}); print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
