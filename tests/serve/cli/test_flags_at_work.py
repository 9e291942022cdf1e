"""What flags change in a server that runs: where it is found, and what its answers look like."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from lm.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = "{{ mood }}:{% for message in messages %}{{ message.content }}{% endfor %}"


class Local:
    """A server behind a Unix socket."""

    def __init__(self, socket: Path) -> None:
        self._client = httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://tiny", timeout=60)

    def get(self, path: str) -> httpx.Response:
        return self._client.get(path)

    def post(self, path: str, **fields: Any) -> dict[str, Any]:
        response = self._client.post(path, json=fields)
        assert response.status_code == 200, response.text
        return response.json()

    def ask(self, path: str, **fields: Any) -> httpx.Response:
        return self._client.post(path, json=fields)

    def chunks(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        lines = self._client.post(path, json={**fields, "stream": True}).text.splitlines()
        return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


@pytest.fixture(scope="module")
def local(launching, folder: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """A server with every flag of answers, from a file of flags; its tokenizer is in a folder of its own."""
    place = tmp_path_factory.mktemp("flags")
    words, bare = place / "words", place / "bare"
    bare.mkdir()
    words.mkdir()
    for file in folder.iterdir():
        (words if "token" in file.name else bare).joinpath(file.name).write_bytes(file.read_bytes())
    (place / "template.jinja").write_text(TEMPLATE)
    flags = {
        "uds": str(place / "socket"),
        "tokenizer": str(words),
        "chat-template": str(place / "template.jinja"),
        "default-chat-template-kwargs": {"mood": "glad"},
        "response-role": "oracle",
        "return-tokens-as-token-ids": True,
        "enable-force-include-usage": True,
        "stream-interval": 4,
        "override-generation-config": {"temperature": 0.0, "max_new_tokens": 11, "frequency_penalty": 2.0},
        "max-logprobs": -1,
        "fingerprint-mode": "custom",
        "fingerprint-value": "mine",
        "num-gpu-blocks-override": 12,
        "max-num-queued-tokens": 1,
        "max-num-seqs": 1,
    }
    (place / "flags.yaml").write_text(json.dumps(flags))
    running = launching(bare, place / "log", "--config", str(place / "flags.yaml"))
    yield Local(place / "socket")
    running.end()
    assert not (place / "socket").exists()


def test_a_unix_socket_and_a_tokenizer_of_another_folder(local: Local, tokenizer: Tokenizer) -> None:
    assert local.get("/health").status_code == 200
    assert local.post("/tokenize", prompt="the fox")["tokens"] == tokenizer.encode("the fox")


def test_blocks_of_the_cache(local: Local) -> None:
    assert 'num_gpu_blocks="12"' in local.get("/metrics").text


def test_the_chat_template_gets_what_the_flag_says(local: Local, tokenizer: Tokenizer) -> None:
    chat = {"messages": [{"role": "user", "content": "fox"}]}
    assert local.post("/tokenize", **chat)["tokens"] == tokenizer.encode("glad:fox")
    sad = local.post("/tokenize", **chat, chat_template_kwargs={"mood": "sad"})
    assert sad["tokens"] == tokenizer.encode("sad:fox")


def test_role_and_fingerprint(local: Local) -> None:
    chat = {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 2}
    body = local.post("/v1/chat/completions", **chat)
    assert body["choices"][0]["message"]["role"] == "oracle"
    assert body["system_fingerprint"] == "mine"
    assert local.chunks("/v1/chat/completions", **chat)[0]["choices"][0]["delta"]["role"] == "oracle"


def test_sampling_defaults(local: Local) -> None:
    """Greedy unless a request says otherwise, and no answer longer than max_new_tokens."""
    fields = {"prompt": "the", "max_tokens": 50, "ignore_eos": True}
    first, second, greedy = (
        local.post("/v1/completions", **fields, **more) for more in ({}, {}, {"temperature": 0, "seed": 1})
    )
    assert first["choices"][0]["text"] == second["choices"][0]["text"] == greedy["choices"][0]["text"]
    assert first["usage"]["completion_tokens"] == 11
    penalised = local.post("/v1/completions", **fields, frequency_penalty=2.0)
    free = local.post("/v1/completions", **fields, frequency_penalty=0)
    assert penalised["choices"][0]["text"] == first["choices"][0]["text"] != free["choices"][0]["text"]


def test_as_many_logprobs_as_there_are_tokens(local: Local, tokenizer: Tokenizer) -> None:
    body = local.post("/v1/completions", prompt="the", max_tokens=1, logprobs=100)
    assert len(body["choices"][0]["logprobs"]["top_logprobs"][0]) >= 100


def test_tokens_as_ids(local: Local) -> None:
    fields = {"prompt": "the", "max_tokens": 2, "logprobs": 1, "return_token_ids": True}
    choice = local.post("/v1/completions", **fields)["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{id}" for id in choice["token_ids"]]
    choice = local.post("/v1/completions", **fields, return_tokens_as_token_ids=False)["choices"][0]
    assert not any(token.startswith("token_id:") for token in choice["logprobs"]["tokens"])


def test_chunks_of_four_tokens_each_with_usage(local: Local) -> None:
    fields = {"prompt": "the", "max_tokens": 10, "ignore_eos": True, "return_token_ids": True}
    *chunks, last = local.chunks("/v1/completions", **fields)
    lengths = [len(chunk["choices"][0]["token_ids"]) for chunk in chunks]
    assert all(length >= 4 for length in lengths[1:-1])
    assert sum(lengths) == 10
    assert len(lengths) <= 4
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks][-1] == 10
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 10)
    finer = local.chunks("/v1/completions", **fields, stream_interval=1)
    assert len(finer) <= 5  # a request may ask for longer chunks, not for shorter ones


def test_prompts_that_wait_bound_the_queue(local: Local) -> None:
    fields = {"prompt": "the fox", "max_tokens": 10, "ignore_eos": True}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: local.ask("/v1/completions", **fields), range(16)))
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert "tokens of prompts are waiting" in answer.json()["error"]["message"]
            assert int(answer.headers["retry-after"]) >= 1
    assert local.ask("/v1/completions", **fields).status_code == 200
    refused = sum(answer.status_code == 503 for answer in answers)
    lines = local.get("/metrics").text.splitlines()
    (counted,) = [line for line in lines if "rejections_total" in line and 'reason="max_num_queued_tokens"' in line]
    assert float(counted.split()[-1]) == refused


# ---------------------------------------------------------------- TLS, a path, no description, HTTP's log


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("tls")
    made = (place / "certificate.pem", place / "key.pem")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*command, "-out", made[0], "-keyout", made[1]], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate")
    return made


def test_tls_under_a_path_without_a_description(start, certificate: tuple[Path, Path]) -> None:
    flags = ["--ssl-certfile", str(certificate[0]), "--ssl-keyfile", str(certificate[1])]
    flags += ["--root-path", "/models", "--disable-fastapi-docs", "--uvicorn-log-level", "info"]
    flags += ["--disable-access-log-for-endpoints", "/health,/metrics"]
    server = start(*flags)
    trusted = ssl.create_default_context(cafile=certificate[0])
    with httpx.Client(base_url=f"https://127.0.0.1:{server.port}", verify=trusted) as client:
        assert client.get("/models/v1/models").json()["data"][0]["id"] == "tiny"
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        for path in ("/docs", "/redoc", "/openapi.json"):
            assert client.get(path).status_code == 404
        for path in ("/health", "/models/health", "/metrics?a=b"):
            assert client.get(path).status_code == 200
        answer = client.post("/v1/completions", json={"prompt": "the", "max_tokens": 1}).json()
    assert answer["system_fingerprint"].count("-") == 2
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{server.port}/health")
    server.end()
    log = server.log.read_text()
    assert '"POST /v1/completions HTTP/1.1" 200' in log
    assert '"GET /models/v1/models HTTP/1.1" 200' in log
    assert "/health" not in log
    assert "/metrics" not in log


def test_a_client_has_to_show_a_certificate(start, certificate: tuple[Path, Path]) -> None:
    """The server's own serves as a client's, and as the authority that has made it."""
    own = [str(path) for path in certificate]
    server = start("--ssl-certfile", own[0], "--ssl-keyfile", own[1], "--ssl-ca-certs", own[0], "--ssl-cert-reqs", "2")
    unknown = ssl.create_default_context(cafile=own[0])
    with httpx.Client(verify=unknown) as client, pytest.raises(httpx.TransportError):
        client.get(f"https://127.0.0.1:{server.port}/health")
    known = ssl.create_default_context(cafile=own[0])
    known.load_cert_chain(*own)
    with httpx.Client(verify=known) as client:
        assert client.get(f"https://127.0.0.1:{server.port}/health").status_code == 200
    server.end()


def test_http_has_no_log_unless_asked_for(server) -> None:
    httpx.get(server.url + "/v1/models")
    assert "HTTP/1.1" not in server.log.read_text()


# ---------------------------------------------------------------- what cannot be


def refused(*flags: str) -> str:
    """The one sentence with which the start ends."""
    command = [sys.executable, "-m", "serve", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


def test_what_cannot_be_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("nothing")
    assert "is there and no socket" in refused(str(folder), "--uds", str(tmp_path / "file"))
    assert "--ssl-certfile" in refused(str(folder), "--ssl-certfile", str(tmp_path / "file"))
    assert "--ssl-keyfile needs --ssl-certfile" in refused(str(folder), "--ssl-keyfile", str(tmp_path / "file"))
    assert "--ssl-ca-certs needs --ssl-certfile" in refused(str(folder), "--ssl-ca-certs", str(tmp_path / "file"))
    needed = [str(folder), "--ssl-certfile", str(tmp_path / "file"), "--ssl-cert-reqs", "2"]
    assert "--ssl-cert-reqs needs --ssl-ca-certs" in refused(*needed)
    assert "both say how large the cache is" in refused(
        str(folder), "--num-gpu-blocks-override", "9", "--kv-cache-memory-bytes", "1M"
    )
    assert "need each other" in refused(str(folder), "--fingerprint-value", "mine")


def test_sampling_defaults_that_are_none(folder: Path) -> None:
    override = ["--port", "0", "--override-generation-config"]
    assert "has 'temprature', which is no sampling default" in refused(str(folder), *override, '{"temprature": 1}')
    assert "temperature must be in [0, 2], got 3" in refused(str(folder), *override, '{"temperature": 3}')
    assert "max_new_tokens is 0 and must be" in refused(str(folder), *override, '{"max_new_tokens": 0}')
