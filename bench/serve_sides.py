"""The servers that bench/serve.py compares: how each is started, stopped while another is measured, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import peers
from bench.record import ROOT, WORK
from bench.serve_models import Model

LOGS = WORK / "serve" / "logs"
NAME = "model"  # what every side serves the model as
SEATS = 32  # sequences at once: the largest concurrency that is measured
CACHE = 1 << 30  # bytes of KV cache
PATIENCE = 600.0  # seconds for a start: vLLM compiles
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy


class DidNotStart(RuntimeError):
    """One sentence: which side did not start, and the last line that it said."""


@dataclass(frozen=True)
class Side:
    """A server: its name in tables, the dtype of its weights and what it is started with beyond its own defaults."""

    name: str
    kind: str  # heed, vllm or llama.cpp
    dtype: str  # bfloat16, float32, or what the weights are rounded to: int8, q8_0
    flags: tuple[str, ...] = ()

    @property
    def says_usage(self) -> bool:
        """Whether the load generator finds the usage of a stream: it looks for it in an event without a choice, and
        llama.cpp's comes with the last one.
        """
        return self.kind != "llama.cpp"

    def command(self, model: Model, port: int, threads: int) -> tuple[list[str], dict[str, str]]:
        """The command line, and the environment variables that go with it."""
        folder = str(model.float32 if self.dtype == "float32" else model.bfloat16)
        if self.kind == "llama.cpp":
            # Each sequence has a seat and an equal part of -c; the longest prompt is not asked of llama.cpp.
            room = ["-c", str(SEATS * 1024), "-np", str(SEATS), "-b", "2048", "-ub", "512", "--cache-ram", "0"]
            plain = ["-m", str(model.q8_0), "-t", str(threads), "-tb", str(threads), "--no-webui"]
            command = [str(peers.llama_server()), *plain, *room, "--port", str(port), "--alias", NAME]
            return [*command, *self.flags], {}
        dtype = "float32" if self.dtype == "float32" else "bfloat16"
        shared = [folder, "--dtype", dtype, "--port", str(port), "--served-model-name", NAME]
        shared += ["--max-model-len", str(model.longest), "--max-num-seqs", str(SEATS)]
        if self.kind == "vllm":
            # It sets its workers' threads itself, by the cores that they are bound to.
            environment = {
                "VLLM_CPU_KVCACHE_SPACE": str(CACHE >> 30),
                "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
                "VLLM_CACHE_ROOT": str(peers.PEERS / "vllm-cache"),
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            return [str(peers.vllm() / "vllm"), "serve", *shared, *self.flags], environment
        own = ["--kv-cache-memory-bytes", str(CACHE)]
        return [sys.executable, "-m", "serve", *shared, *own, *self.flags], {"OMP_NUM_THREADS": str(threads)}


SIDES = (
    Side("heed bf16", "heed", "bfloat16"),
    Side("heed fp32", "heed", "float32"),
    Side("heed int8", "heed", "int8", ("--quantization", "int8")),
    Side("vLLM bf16", "vllm", "bfloat16"),
    Side("vLLM fp32", "vllm", "float32"),
    Side("llama.cpp Q8_0", "llama.cpp", "q8_0"),
)


@dataclass
class Server:
    """A side that runs. `start` returns it ready and awake; `pause` and `wake` stop and continue all its processes."""

    side: Side
    process: subprocess.Popen[bytes]
    port: int
    log: Path
    first_token_s: float = 0.0  # from the start of the process until a client had the first token
    paused: bool = field(default=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def pause(self) -> None:
        """No process of this server gets any more of the processor until `wake`."""
        if not self.paused:
            os.killpg(self.process.pid, signal.SIGSTOP)
            self.paused = True

    def wake(self) -> None:
        """Continues it, and waits until it has answered a request. Raises DidNotStart for one that has ended."""
        if self.process.poll() is not None:
            raise DidNotStart(f"{self.side.name} has ended: {last_line(self.log)}")
        if self.paused:
            os.killpg(self.process.pid, signal.SIGCONT)
            self.paused = False
        self.complete("Once upon a time", 8)

    def complete(self, prompt: str, tokens: int) -> dict[str, Any]:
        """One plain completion, whole."""
        body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with LOCAL.open(request, timeout=PATIENCE) as answer:
            return json.loads(answer.read())

    def metrics(self) -> dict[str, float]:
        """What /metrics says: name (labels left out; the same name summed) -> value."""
        with LOCAL.open(f"{self.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        values: dict[str, float] = {}
        for line in lines:
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.split("{")[0]
                values[name] = values.get(name, 0.0) + float(value)
        return values

    def end(self) -> None:
        """SIGTERM, and SIGKILL for what is still there after ten seconds."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGCONT)
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def start(side: Side, model: Model, threads: int, extra: Sequence[str] = ()) -> Server:
    """Start a side and time it until a client has its first token. Raises DidNotStart."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command, environment = side.command(model, port, threads)
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{model.name}-{side.name.replace(' ', '-')}.log"
    with log.open("wb") as out:
        began = time.perf_counter()
        process = subprocess.Popen(
            [*command, *extra],
            cwd=ROOT if side.kind == "heed" else LOGS,
            env=(os.environ if side.kind == "heed" else alone()) | environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own: pause and wake reach all that it started
        )
    server = Server(side, process, port, log)
    while True:
        try:
            server.complete("Once upon a time", 1)
            server.first_token_s = time.perf_counter() - began
            return server
        except (urllib.error.URLError, ConnectionError):
            pass  # not there yet, or llama.cpp's 503 while it loads
        if process.poll() is not None:
            raise DidNotStart(f"{side.name} did not start: {last_line(log)}")
        if time.perf_counter() - began > PATIENCE:
            server.end()
            raise DidNotStart(f"{side.name} did not start within {PATIENCE:.0f} seconds: {last_line(log)}")
        time.sleep(0.05)


def alone() -> dict[str, str]:
    """The environment's variables for a program with packages and threads of its own, which must not find ours."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}


def last_line(log: Path) -> str:
    """The last line of a server's output that says something."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")
