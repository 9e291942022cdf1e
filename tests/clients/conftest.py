"""One server for all clients: SmolLM2-135M-Instruct as a float32 folder, served by the project's own environment.

These tests run in the clients' environment (`make test-clients`), which has none of the server's packages; HEED_PYTHON
is the interpreter that serves.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("HEED_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
MODEL = ROOT / ".cache" / "weights" / "SmolLM2-135M-Instruct-fp32"
NAME = "smollm2"
KEY = "open-sesame"
# Nobody out there is asked anything, whatever a client's habits are.
os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Server:
    """A running `python -m serve` that wants a key."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log
        self.api = url + "/v1"

    def post(self, path: str, **fields: Any) -> dict[str, Any]:
        response = httpx.post(self.url + path, json=fields, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
        assert response.status_code == 200, response.text
        return response.json()

    def has(self, path: str) -> bool:
        """Whether the server describes this route."""
        description = httpx.get(self.url + "/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
        return path in description["paths"]


@pytest.fixture(scope="session")
def folder() -> Path:
    """SmolLM2 as others read it, too: written once, from the GGUF file that scripts/fetch.py brings."""
    if not (MODEL / "model.safetensors").exists():
        subprocess.run([PYTHON, "scripts/fetch.py", "smollm2"], cwd=ROOT, check=True, capture_output=True)
        source = MODEL.with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
        command = [PYTHON, "-m", "lm", "convert", str(source), str(MODEL), "--dtype", "float32"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return MODEL


@pytest.fixture(scope="session")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "serve.log"
    command = [PYTHON, "-m", "serve", str(folder), "--port", "0", "--dtype", "float32", "--kv-cache-memory-bytes", "1G"]
    command += ["--max-model-len", "2048", "--served-model-name", NAME, "--api-key", KEY]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        ready = [line for line in log.read_text().splitlines() if line.startswith("http") and "first token" in line]
        if ready:
            yield Server(process, ready[0].split()[0], log)
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"the server did not come up:\n{log.read_text()[-3000:]}")
    process.terminate()
    status = process.wait(30)
    assert status == 0, log.read_text()[-3000:]
    assert "Traceback" not in log.read_text()


def run(command: list[str], *, cwd: Path, seconds: float = 420, **environment: str) -> str:
    """What a command line program says; fails with all of it where the program does."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
