"""What strangers may send: nothing ends the server, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.params import SamplingParams
from serve.api import budget, gate
from serve.api.http import COMMENT, EventStream, with_pauses

ROOT = Path(__file__).resolve().parents[3]
KEY = {"Authorization": "Bearer key"}
JSON = KEY | {"Content-Type": "application/json"}
CONNECTIONS = 32
TIMEOUT = 2  # seconds, as the server is told
PROMPT_ENOUGH = 20  # seconds that a patient client waits at most, on a machine that is busy with other tests
ATTACKS = 6


@pytest.fixture(scope="module")
def safe(folder: Path, tmp_path_factory: pytest.TempPathFactory, launching) -> Iterator[Any]:
    """A server whose limits are near."""
    log = tmp_path_factory.mktemp("log") / "safe.log"
    flags = ["--api-key", "other", "key", "--client-timeout", str(TIMEOUT), "--max-connections", str(CONNECTIONS)]
    flags += ["--allowed-origins", '["https://app.example"]', "--enable-request-id-headers", "--enable-log-requests"]
    flags += ["--served-model-name", "tiny", "--max-num-queued-reqs", "2000"]
    running = launching(folder, log, *flags)
    yield running
    assert running.process.poll() is None, "the server did not survive"
    running.end()
    assert "Traceback" not in log.read_text()


def connect(server: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=4 * TIMEOUT)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes; fails if it does not."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            said += part
    connection.close()
    return said


def say(server: Any, *parts: bytes) -> bytes:
    connection = connect(server)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for part in parts:
            connection.sendall(part)
    return rest(connection)


def head(method: str = "GET", path: str = "/v1/models", *lines: str, host: str = "127.0.0.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode()


def status(said: bytes) -> int:
    return int(said.split(b" ", 2)[1])


def error(said: bytes) -> dict[str, Any]:
    """The one answer there is: OpenAI's error object, and the end."""
    before, _, body = said.partition(b"\r\n\r\n")
    assert b"connection: close" in before.lower()
    found = json.loads(body)["error"]
    assert found["code"] == status(said)
    return found


@contextlib.contextmanager
def patient(server: Any) -> Iterator[None]:
    """Somebody else, who asks all the while, and gets answers soon."""
    done = threading.Event()
    waits: list[float] = []
    wrong: list[Any] = []

    def ask() -> None:
        body = {"prompt": "fox", "max_tokens": 3, "temperature": 0}
        while not done.is_set():
            begin = time.monotonic()
            try:
                answer = httpx.post(server.url + "/v1/completions", json=body, headers=KEY, timeout=PROMPT_ENOUGH)
                if answer.status_code != 200:
                    wrong.append(answer.text)
            except httpx.HTTPError as failed:
                wrong.append(failed)
            waits.append(time.monotonic() - begin)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not wrong
    assert 0 < max(waits) < PROMPT_ENOUGH


def at_once(work: Callable[[], Any], times: int) -> list[Any]:
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(work())) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# ---------------------------------------------------------------- slowness and numbers


@pytest.mark.parametrize(
    ("beginning", "part"),
    [(b"GET /v1/models HTTP/1.1\r\nX: ", "head"), (head("POST", "/v1/completions", "Content-Length: 1000"), "body")],
)
def test_who_speaks_slowly_is_not_listened_to_for_ever(safe, beginning: bytes, part: str) -> None:
    if part == "body":
        beginning = head("POST", "/v1/completions", "Authorization: Bearer key", "Content-Length: 1000")

    def dribble() -> bytes:
        connection = connect(safe)
        connection.sendall(beginning)
        with contextlib.suppress(OSError):
            for _ in range(20 * TIMEOUT):
                connection.sendall(b"a")
                time.sleep(0.1)
        return rest(connection)

    with patient(safe):
        for said in at_once(dribble, ATTACKS):
            # A client that goes on speaking may be cut off before it has heard why.
            assert said == b"" or error(said)["message"].startswith(f"The {part} of the request took longer")
    connection = connect(safe)
    connection.sendall(beginning)
    assert error(rest(connection))["type"] == "RequestTimeoutError"


def test_who_says_nothing_is_let_go(safe) -> None:
    assert rest(connect(safe)) == b""
    connection = connect(safe)
    connection.sendall(head("GET", "/live"))
    assert status(connection.recv(1 << 16)) == 200
    connection.sendall(b"\r\n")  # no request, and no way to stay
    assert error(rest(connection))["code"] == 408


def test_connections_that_do_nothing_keep_nobody_out(safe) -> None:
    with patient(safe):
        opened = []
        for _ in range(4 * CONNECTIONS):
            opened.append(connect(safe))
            opened[-1].sendall(b"GET /")
        time.sleep(0.2)
        for connection in opened[:CONNECTIONS]:
            assert rest(connection) == b""  # the oldest made room
    for connection in opened:
        connection.close()


def test_when_every_connection_is_busy_one_more_is_told_to_come_again(safe) -> None:
    body = json.dumps({"prompt": "fox", "max_tokens": 250, "ignore_eos": True, "n": 60, "stream": True}).encode()
    lines = ["Authorization: Bearer key", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    busy = []
    try:
        for _ in range(CONNECTIONS):
            busy.append(connect(safe))
            busy[-1].sendall(head("POST", "/v1/completions", *lines) + body)
        for connection in busy:
            assert status(connection.recv(100)) == 200
        said = rest(connect(safe))
        assert error(said)["message"].startswith(f"All {CONNECTIONS} connections are busy")
        assert b"Retry-After: 1" in said
    finally:
        for connection in busy:
            connection.close()
    assert eventually(safe, "num_requests_running", 0)


def eventually(server: Any, name: str, value: float, seconds: float = 10) -> bool:
    """Whether a metric takes a value in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            lines = httpx.get(server.url + "/metrics", headers=KEY).text.splitlines()
            if [line for line in lines if line.startswith(f"vllm:{name}{{") and float(line.split()[-1]) == value]:
                return True
        time.sleep(0.05)
    return False


def test_an_answer_that_nobody_reads_ends(safe) -> None:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(4 * TIMEOUT)
    connection.connect(("127.0.0.1", safe.port))
    fields = {"prompt": "fox", "max_tokens": 250, "ignore_eos": True, "n": 99, "stream": True, "request_id": "r" * 128}
    body = json.dumps(fields).encode()  # the id is in each event: more than any buffer on the way takes
    lines = ["Authorization: Bearer key", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    with patient(safe):
        connection.sendall(head("POST", "/v1/completions", *lines) + body)
        connection.recv(1)
    assert eventually(safe, "num_requests_running", 0, 90)  # all is written, or it has been given up
    time.sleep(2 * TIMEOUT)
    said = rest(connection)
    assert said.startswith(b"TTP/1.1 200")
    assert b"[DONE]" not in said
    assert eventually(safe, "kv_cache_usage_perc", 0)


# ---------------------------------------------------------------- heads and bodies


@pytest.mark.parametrize(
    "sent",
    [
        head("GET", "/live", *[f"X-{i}: a" for i in range(300)]),
        head("GET", "/live", "X: " + "a" * 70_000),
        b"GET /live HTTP/1.1\r\nX: " + b"a" * 400_000,
        b"GET /" + b"a" * 400_000,
        head("GET", "/" + "a" * 70_000),
        head("POST", "/ping", "Transfer-Encoding: chunked")
        + b"0\r\n"
        + b"".join(b"X-%d: a\r\n" % i for i in range(300)),
    ],
    ids=["many", "long", "endless", "url-endless", "url", "trailers"],
)
def test_heads_that_are_too_large(safe, sent: bytes) -> None:
    with patient(safe):
        for said in at_once(lambda: say(safe, sent), 3):
            assert b"HTTP/1.1 431 " in said or said == b""  # cut off while it was still speaking


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\n\r\n",
        b"GET /a\x00b HTTP/1.1\r\n\r\n",
    ],
    ids=lambda sent: repr(sent[:24]),
)
def test_what_is_no_request(safe, sent: bytes) -> None:
    said = say(safe, sent)
    assert 400 <= status(said) < 500
    assert status(say(safe, head("GET", "/live", "Connection: close"))) == 200


@given(sent=st.binary(max_size=200))
def test_bytes_at_random(safe, sent: bytes) -> None:
    said = say(safe, sent + b"\r\n\r\n\r\n\x00")
    assert said == b"" or 400 <= status(said) < 500


def test_requests_sent_ahead_of_their_answers(safe) -> None:
    with patient(safe):
        for said in at_once(lambda: say(safe, head("GET", "/live") * 5000), ATTACKS):
            assert said.count(b"HTTP/1.1 200") <= 20


def test_bodies_of_very_many_values_take_turns(server) -> None:
    """Megabytes of JSON each, of which the parser makes seconds; on a busy machine they take a while to be sent."""
    bodies = [
        b'{"prompt": [' + b"1," * 900_000 + b"1]}",
        b'{"prompt": [' + b"[1]," * 2_000_000 + b"[1]]}",
        b'{"prompt": "a", "x": "' + b"[," * 4_000_000 + b'"}',
        b'{"prompt": "a", "x": "' + b'\\"' * 2_000_000,
    ]
    with patient(server):
        for body in bodies:
            for answer in at_once(lambda body=body: server.post("/v1/completions", content=body, headers=JSON), 3):
                assert answer.status_code == (200 if b'"x"' in body and body.endswith(b"}") else 400)
                assert len(answer.content) < 5000


def test_large_bodies_together_have_a_limit() -> None:
    counted = gate.Gate(lambda *_: asyncio.sleep(0), max_body_bytes=1 << 20)  # type: ignore[arg-type]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"a" * (1 << 20), "more_body": True}

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/", "headers": []}
    counted._large = gate.LARGE_BODIES
    asyncio.run(counted(scope, receive, send))
    assert sent[0]["status"] == 503
    assert counted._large == gate.LARGE_BODIES  # what it had is given back


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=50)
@given(value=json_values)
def test_values_are_counted_without_what_stands_in_texts(value: Any) -> None:
    bare = gate.STRINGS.sub(b"", json.dumps(value).encode())
    assert b'"' not in bare

    def containers(one: Any) -> int:
        inner = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        return isinstance(one, (dict, list)) + sum(map(containers, inner))

    assert bare.count(b"[") + bare.count(b"{") == containers(value)


# ---------------------------------------------------------------- log-probabilities


def test_a_flood_of_logprobs_is_refused_before_it_begins(safe) -> None:
    flood = {"prompt": ["fox"] * 4, "n": 128, "logprobs": 20, "max_tokens": 250, "ignore_eos": True}
    with patient(safe):
        for answer in at_once(lambda: safe.post("/v1/completions", json=flood, headers=KEY), ATTACKS):
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "logprobs"
        allowed = {**flood, "prompt": "fox", "n": 16}
        for answer in at_once(lambda: safe.post("/v1/completions", json=allowed, headers=KEY), 3):
            assert answer.status_code == 200


params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 500),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)


@given(work=st.lists(st.tuples(st.lists(st.just(1), min_size=1, max_size=50), params), min_size=1, max_size=20))
def test_the_budget_is_what_may_come(work: list[tuple[list[int], SamplingParams]]) -> None:
    whole = sum(
        (0 if p.logprobs is None else p.max_tokens * (p.logprobs + 1))
        + (0 if p.prompt_logprobs is None else len(prompt) * (p.prompt_logprobs + 1))
        for prompt, p in work
    )
    assert budget.most(work, stream=False) == whole * budget.ENTRY  # type: ignore[arg-type]
    assert budget.most(work, stream=True) <= whole * budget.ENTRY  # type: ignore[arg-type]


# ---------------------------------------------------------------- names, origins, keys


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("127.0.0.1:8000", True),
        ("localhost", True),
        ("LocalHost.:1", True),
        ("[::1]:8000", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost:80@evil.example", False),
        ("", False),
    ],
)
def test_a_name_that_is_not_ours_is_not_answered(safe, host: str, answered: bool) -> None:
    sent = head("GET", "/v1/models", "Authorization: Bearer key", "Connection: close", host=host)
    assert status(say(safe, sent)) == (200 if answered else 403)
    assert status(say(safe, head("GET", "/health", "Connection: close", host=host))) == 200


def test_which_names_are_known() -> None:
    assert gate.known_hosts("127.0.0.1", (), loopback=True) == {"localhost", "127.0.0.1", "::1"}
    assert gate.known_hosts("0.0.0.0", (), loopback=False) is None  # whatever this machine is called
    named = gate.known_hosts("0.0.0.0", ("api.example:443",), loopback=False)
    assert named == {"api.example", "localhost", "127.0.0.1", "::1", "0.0.0.0"}
    assert gate.known_hosts("127.0.0.1", ("*",), loopback=True) is None


def test_pages_of_others_can_read_nothing(safe) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    ours = httpx.options(safe.url + "/v1/completions", headers=ask | {"Origin": "https://app.example"})
    assert ours.status_code == 200
    assert ours.headers["access-control-allow-origin"] == "https://app.example"
    theirs = httpx.options(safe.url + "/v1/completions", headers=ask | {"Origin": "https://evil.example"})
    assert theirs.status_code == 400
    for origin, named in (("https://app.example", True), ("https://evil.example", False)):
        answer = httpx.get(safe.url + "/v1/models", headers=KEY | {"Origin": origin})
        assert ("access-control-allow-origin" in answer.headers) is named
    # What a page may send without asking first is no JSON, and does nothing.
    plain = safe.post("/v1/completions", content=b'{"prompt": "a"}', headers=KEY | {"Content-Type": "text/plain"})
    assert plain.status_code == 400


PATHS = [
    "/v1/models", "//v1/models", "/v1//models", "/v1/../metrics", "/health/../v1/models", "/V1/models", "/v1/models/",
    "/%76%31/models", "/health/", "/Health", "//health", "/health%2f..%2fv1/models", "/health;/v1/models", "/metrics",
    "/metrics/", "/openapi.json", "/docs", "/redoc", "/load", "/version", "http://127.0.0.1/v1/models", "/nothing",
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"])
def test_every_way_to_write_a_path_needs_the_key(safe, method: str) -> None:
    for path in PATHS:
        for lines in ([], ["Authorization: Bearer wrong"], ["Upgrade: websocket", "Sec-WebSocket-Version: 13"]):
            connection = "Connection: Upgrade" if lines and "Upgrade" in lines[0] else "Connection: close"
            client = connect(safe)
            client.sendall(head(method, path, *lines, connection))
            assert status(client.recv(1 << 16)) == 401, (method, path, lines)
            client.close()
    for path in gate.OPEN:
        assert status(say(safe, head("GET", path + "?x=/v1/models", "Connection: close"))) == 200


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = gate.Gate(lambda *_: asyncio.sleep(0), keys=["one", "two", "three"])  # type: ignore[arg-type]
    compared: list[tuple[bytes, bytes]] = []
    real = gate.secrets.compare_digest
    monkeypatch.setattr(gate.secrets, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    guard._authorise({"path": "/v1/models", "headers": [(b"authorization", b"Bearer one")]})
    assert len(compared) == 3  # the first one matched, and the others were looked at all the same
    assert {len(side) for pair in compared for side in pair} == {32}  # digests: a key's length tells nothing


# ---------------------------------------------------------------- what is told


def test_a_line_of_the_log_has_numbers_and_no_words(safe) -> None:
    secret = "quick brown secret"
    body = {"prompt": secret, "max_tokens": 5, "ignore_eos": True}
    answer = safe.post("/v1/completions", json=body, headers=KEY | {"X-Request-Id": "my\tid-1"})
    assert answer.headers["x-request-id"] == "myid-1"
    assert answer.json()["id"] == "cmpl-myid-1"
    safe.post("/v1/completions", json={**body, "temperature": 9}, headers=KEY)
    safe.post("/v1/completions", content=b'{"prompt": "secret', headers=JSON)
    safe.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": secret}]}, headers=KEY)
    log = safe.log.read_text()
    assert re.search(
        r"cmpl-myid-1: \d+ prompt tokens, 5 generated, \d+ cached; "
        r"queue \d+\.\d ms, prefill \d+\.\d ms, decode \d+\.\d ms; length\n",
        log,
    )
    assert "secret" not in log
    named = httpx.get(safe.url + "/v1/models", headers=KEY).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", named)


def test_a_prompt_is_shown_where_that_was_asked_for(start) -> None:
    server = start("--enable-log-requests", "--max-log-len", "7", "--sse-keep-alive-interval", "60")
    server.complete(prompt="the quick\nbrown", max_tokens=1)
    with httpx.stream("POST", server.url + "/v1/completions", json={"prompt": "a", "stream": True}) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 5
    while "prompt 'a'" not in server.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    log = server.log.read_text()
    assert "; prompt 'the qui'\n" in log
    assert "; prompt 'a'\n" in log


def test_nothing_is_unpickled_and_no_code_is_fetched() -> None:
    for path in (*(ROOT / "serve").rglob("*.py"), *(ROOT / "lm").rglob("*.py")):
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|marshal|shelve|dill|cloudpickle)\b", text, re.MULTILINE), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path
        assert not re.search(r"trust_remote_code\s*=\s*True", text), path


# ---------------------------------------------------------------- streams that pause


def test_a_stream_without_news_says_that_it_lives() -> None:
    async def events() -> Any:
        yield {"a": 1}
        await asyncio.sleep(0.1)
        yield {"a": 2}

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    left: list[int] = []
    stream = EventStream(events(), lambda: left.append(1), keep_alive=0.02)
    asyncio.run(stream({"type": "http"}, receive, send))  # type: ignore[arg-type]
    bodies = [message["body"] for message in sent[1:]]
    assert bodies[0] == b'data: {"a":1}\n\n'
    assert set(bodies[1:-2]) == {COMMENT}
    assert bodies[-2:] == [b'data: {"a":2}\n\n', b"data: [DONE]\n\n"]
    assert left == [1]


@given(items=st.lists(st.integers(), max_size=20), failing=st.booleans())
def test_pauses_lose_nothing(items: list[int], failing: bool) -> None:
    async def source() -> Any:
        for item in items:
            await asyncio.sleep(0)
            yield item
        if failing:
            raise KeyError

    async def read() -> list[int]:
        got: list[int] = []
        with contextlib.suppress(KeyError):
            async for item in with_pauses(source(), 5):
                assert item is not None
                got.append(item)
        return got

    assert asyncio.run(read()) == items
