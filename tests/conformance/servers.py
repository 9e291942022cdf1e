"""The two servers of the suite: real vLLM and ours, on one folder in float32 with the same flags."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.conformance.case import KEYS, MODEL

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 420.0  # seconds for a start
SHARED = (
    "--dtype", "float32", "--max-model-len", "512", "--served-model-name", MODEL, f"also-{MODEL}",
    "--host", "127.0.0.1", "--api-key", *KEYS,
)  # fmt: skip
# What either needs in addition, to be comparable: one library for structured output, no compiler's wait, little memory.
VLLM = ("--enforce-eager",)
GUIDANCE = ("--structured-outputs-config", '{"backend": "guidance"}')
# With parsers, vLLM's own choice of a library: guidance does not know the form that it gives to calls.
PARSERS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "deepseek_r1")
HEED = ("--kv-cache-memory-bytes", "512M")


@dataclass(frozen=True)
class Servers:
    """Where both are."""

    heed: str
    vllm: str


class DidNotStart(RuntimeError):
    """One sentence."""


@contextmanager
def running(folder: Path, logs: Path, *, parsers: bool = False) -> Iterator[Servers]:
    """Both servers, started side by side; they end with the block. Raises DidNotStart."""
    from bench import peers
    from bench.serve_sides import alone

    with ExitStack() as stack:
        ports = _free_ports(2)
        vllm = [
            str(peers.vllm() / "vllm"),
            "serve",
            str(folder),
            "--port",
            str(ports[0]),
            *SHARED,
            *VLLM,
            *(PARSERS if parsers else GUIDANCE),
        ]
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        environment = alone() | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_CACHE_ROOT": str(peers.PEERS / "vllm-cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        heed = [
            sys.executable,
            "-m",
            "serve",
            str(folder),
            "--port",
            str(ports[1]),
            *SHARED,
            *HEED,
            *(PARSERS if parsers else ()),
        ]
        stack.enter_context(_started("vLLM", vllm, ports[0], logs, logs / "vllm.log", environment))
        stack.enter_context(_started("Heed", heed, ports[1], ROOT, logs / "heed.log", dict(os.environ)))
        yield Servers(heed=f"http://127.0.0.1:{ports[1]}", vllm=f"http://127.0.0.1:{ports[0]}")


@contextmanager
def _started(name: str, command: list[str], port: int, cwd: Path, log: Path, env: dict[str, str]) -> Iterator[None]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait(name, process, port, log)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(name: str, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    from bench.serve_sides import last_line

    how = f"ended with status {process.returncode}" if process.returncode is not None else "is not ready"
    raise DidNotStart(f"{name} {how} after {PATIENCE:.0f} s at most; it said last: {last_line(log)}")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
