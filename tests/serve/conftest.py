"""A tiny model whose answers vary, and real servers on loopback ports: one for all tests, others on demand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lm import DecoderConfig, DecoderLM, pretrained
from lm.architectures import make_config, make_model
from lm.tokenizer import Tokenizer, close_sources, train_bpe, train_translator_bpe

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("the quick brown fox jumps over the lazy dog, and then it sleeps. ", "más ñandú, 你好 世界, 🎉🦊 naïve café. ")
# A chat in few tokens; one role is refused.
TEMPLATE = """{% for message in messages %}
{%- if message.role == 'stranger' %}{{ raise_exception('No strangers, please.') }}{% endif %}
{{- message.role[0] }}: {{ message.content }}{{ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}a: {% endif %}"""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    trained = train_bpe([text * 4 for text in TEXTS], 340)
    assert trained.vocab_size == 337  # tests of error sentences name it
    return trained


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> DecoderLM:
    """Random weights, so large that the next token depends on those before; with grouped queries and a window."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        context=256,
        layers=2,
        width=64,
        heads=4,
        kv_heads=2,
        window=24,
        window_pattern="SL",
    )
    made = DecoderLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made.eval()


@pytest.fixture(scope="session")
def folder(model: DecoderLM, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "tiny"
    pretrained.save(model, path, tokenizer=tokenizer)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


# Models that read their prompt as a source: architecture and shape.
TRANSLATORS = {
    "transformer": (
        "transformer",
        {
            "width": 32,
            "heads": 4,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "mlp_width": 64,
            "positions": "learned",
            "tie_embeddings": "none",
            "start_id": 1,
        },
    ),
    "rnnsearch": ("rnnsearch", {"hidden": 24, "embedding": 16, "maxout": 16, "start_id": 1}),
    "prefix": ("decoder", {"width": 32, "heads": 4, "layers": 2, "prefix": True}),
}


@dataclass(frozen=True)
class Translator:
    """A tiny model of random weights, made such that what it writes depends on what it reads; and its tokenizer."""

    model: Any
    tokenizer: Tokenizer

    @property
    def eos(self) -> list[int]:
        """EOS, and more tokens that count as it, so that random texts end at various lengths."""
        assert self.tokenizer.eos_id is not None
        return [self.tokenizer.eos_id, *range(40, 60)]


@pytest.fixture(scope="session")
def translators() -> dict[str, Translator]:
    words = train_translator_bpe([text * 4 for text in TEXTS], 340)
    made = {}
    for name, (architecture, shape) in TRANSLATORS.items():
        torch.manual_seed(3)
        context = 96 if architecture == "decoder" else 48
        model = make_model(
            make_config(architecture, {"vocab_size": words.vocab_size, "context": context, "dropout": 0.0, **shape})
        ).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if architecture == "transformer":
                    parameter.mul_(10 if "positions" in key else 1)
                elif parameter.dim() > 1:
                    parameter.mul_(2)
        made[name] = Translator(model, close_sources(words, model.encoder_decoder))
    return made


@pytest.fixture(scope="session", params=TRANSLATORS)
def translator(request: pytest.FixtureRequest, translators: dict[str, Translator]) -> Translator:
    return translators[request.param]


class Server:
    """A running `python -m serve`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log
        self.url = f"http://127.0.0.1:{port}"

    def post(self, path: str, **arguments: object) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **arguments)  # type: ignore[arg-type]

    def complete(self, **fields: object) -> dict:
        response = self.post("/v1/completions", json=fields)
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, **fields: object) -> dict:
        response = self.post("/v1/chat/completions", json=fields)
        assert response.status_code == 200, response.text
        return response.json()

    def metric(self, name: str) -> float:
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"vllm:{name}{{", f"vllm:{name} ")))

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def wait(self, seconds: float = 30) -> int:
        return self.process.wait(seconds)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.wait(10)
        if self.process.poll() is None:
            self.process.kill()
            self.wait()


Start = Callable[..., Server]


def launch(folder: Path, log: Path, *flags: str) -> Server:
    """Starts a server on a port that the system picks, and waits until it says that it is ready."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve", str(folder), "--port", "0", *flags],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith(("http", "unix:")) and line.endswith("after the start."):
                port = line.split()[0].rsplit(":", 1)[1]
                return Server(process, int(port) if port.isdigit() else 0, log)
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"the server did not come up (exit status {process.wait()}):\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The one that most tests ask; it serves the names "tiny" and "also-tiny"."""
    log = tmp_path_factory.mktemp("log") / "serve.log"
    running = launch(folder, log, "--served-model-name", "tiny", "also-tiny", "--kv-cache-memory-bytes", "16M")
    yield running
    running.end()


@pytest.fixture(scope="session")
def launching() -> Start:
    """For fixtures that start a server of their own; `start` is for tests."""
    return launch


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts servers with flags of a test's own; ends them with it."""
    started: list[Server] = []

    def starting(*flags: str) -> Server:
        running = launch(folder, tmp_path / f"serve-{len(started)}.log", "--served-model-name", "tiny", *flags)
        started.append(running)
        return running

    yield starting
    for running in started:
        running.end()
