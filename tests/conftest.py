"""What all tests share: an environment that reaches nobody, and a tiny model behind a real server."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before any test imports a library that reads them, and inherited by every process that a test starts: no run of a
# person's wandb account, no hub, and no fight of many threads over two cores.
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

# A property that is true stays true on a machine that is busy with something else.
hypothesis.settings.register_profile("heed", deadline=None)
hypothesis.settings.load_profile("heed")

SENTENCES = (
    "Before we proceed any further, hear me speak.",
    "You are all resolved rather to die than to famish?",
    "First, you know Caius Marcius is chief enemy to the people.",
)


def free_port() -> int:
    """A port of the loopback interface that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a byte-level BPE, a chat template and random weights: every route answers from it."""
    import torch

    from lm import DecoderConfig, DecoderLM, pretrained
    from lm.tokenizer import train_bpe

    torch.manual_seed(0)
    tokenizer = train_bpe(SENTENCES, 300)
    tokenizer.settings["chat_template"] = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    )
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, context=256, layers=2, width=64, heads=4, kv_heads=2)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    pretrained.save(DecoderLM(config), folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file. `make test` fetches it beforehand; without it the tests are skipped."""
    from scripts.fetch import ITEMS, digest

    item = ITEMS["smollm2"]
    if not item.target.exists() or digest(item.target.read_bytes()) != item.sha256:
        pytest.skip(f"{item.target.name} is not here: `python scripts/fetch.py smollm2` fetches it")
    return item.target


@dataclass(frozen=True)
class Server:
    """A running server: where it is, and the folder it serves."""

    url: str
    folder: Path


@pytest.fixture(scope="session")
def tiny_server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`python -m serve` on the tiny folder, under the name that the documentation's examples use."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "serve.log"
    command = [sys.executable, "-m", "serve", str(tiny_folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "runs/demo/model"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until_healthy(process, port, log)
        yield Server(f"http://127.0.0.1:{port}", tiny_folder)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_healthy(process: subprocess.Popen, port: int, log: Path, seconds: float = 60) -> None:
    """Returns when /health answers 200; fails with what the server said when it ended or did not come."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.05)
    pytest.fail(f"the server did not come up (exit status {process.poll()}):\n{log.read_text()[-3000:]}")
