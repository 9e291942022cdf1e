"""What anybody may send: mutations of valid requests, raw bytes and odd heads, against a real server of a tiny model.

    make fuzz                       # 20,000 calls
    python -m bench.fuzz --minutes 60 --record      # the figures of docs/clients.md

No call may be answered 500, or not at all, and the server must be there at the end. 503 comes of the queue alone. With
--schemathesis the calls are those that schemathesis (of the clients' environment, `make test-clients`) makes of
/openapi.json. Each failure is kept under .cache/bench/fuzz/, and ends the run with status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch

from bench.fuzz_requests import Call, Maker
from bench.record import ROOT, WORK, save_table
from lm import DecoderConfig, DecoderLM, pretrained
from lm.tokenizer import train_bpe

SCRATCH = WORK / "fuzz" / str(os.getpid())  # of one run; kept where something failed
CLIENTS = ROOT / ".cache" / "clients" / "bin" / "schemathesis"
TEXT = "the quick brown fox jumps over the lazy dog, and then it sleeps. 你好 🎉 naïve café. "
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
# Of schemathesis: answers are what /openapi.json says; 501 and 503 are answers, too.
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
EXPECTED = '[checks]\nnot_a_server_error.expected-statuses = ["2xx", "4xx", "501", "503"]\n'
PATIENCE = 60.0  # seconds that an answer may take
FLAGS = ["--max-num-queued-reqs", "384", "--kv-cache-memory-bytes", "32M", "--enable-tokenizer-info-endpoint"]
FLAGS += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]


@dataclass
class Tally:
    """What came of the calls."""

    statuses: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0

    @property
    def calls(self) -> int:
        return sum(self.statuses.values())

    def fail(self, what: str, call: Call | None = None) -> None:
        self.failures.append(what)
        place = SCRATCH / "failures" / f"{len(self.failures)}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(what + "\n\n" + (call.told() if call is not None else ""), encoding="utf-8")


class Served:
    """`python -m serve` on a tiny model of random weights."""

    def __init__(self) -> None:
        self._log = SCRATCH / "serve.log"
        folder = SCRATCH / "tiny"
        _tiny(folder)
        command = [sys.executable, "-m", "serve", str(folder), "--port", "0", "--served-model-name", "tiny", *FLAGS]
        with self._log.open("wb") as output:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=environment)
        self.url = self._wait()

    def _wait(self) -> str:
        while self.process.poll() is None:
            ready = re.search(r"^(http\S+) serves tiny", self._log.read_text(), re.MULTILINE)
            if ready:
                return ready[1]
            time.sleep(0.1)
        sys.exit(f"{self._log.read_text()}\nThe server ended before it was ready.")

    def memory(self) -> float:
        """MiB of its processes."""
        import psutil

        server = psutil.Process(self.process.pid)
        return sum(one.memory_info().rss for one in [server, *server.children(recursive=True)]) / 2**20

    def end(self, tally: Tally) -> None:
        """Ends it as an operator would; what was left or said amiss is a failure."""
        if self.process.poll() is not None:
            tally.fail(f"the server ended with status {self.process.returncode}:\n{self._log.read_text()[-3000:]}")
            return
        self.process.terminate()
        if self.process.wait(60) != 0:
            tally.fail(f"after SIGTERM the server ended with status {self.process.returncode}")
        if "Traceback" in self._log.read_text():
            tally.fail(f"the log has a traceback: {self._log}")


def _tiny(folder: Path) -> None:
    torch.manual_seed(0)
    words = train_bpe([TEXT * 8], 340)
    words.settings["chat_template"] = TEMPLATE
    config = DecoderConfig(vocab_size=words.vocab_size, context=256, layers=2, width=64, heads=4, kv_heads=2)
    pretrained.save(DecoderLM(config), folder, tokenizer=words)


async def mutate(served: Served, tally: Tally, seed: int, calls: int, deadline: float, workers: int) -> None:
    """Calls until there are so many, or until the clock (time.monotonic) says so."""
    maker, left = Maker(random.Random(seed)), calls

    async def work() -> None:
        nonlocal left
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE, limits=limits) as client:
            while left > 0 and time.monotonic() < deadline and served.process.poll() is None:
                left -= 1
                await _call(client, maker.call(), tally)

    await asyncio.gather(*(work() for _ in range(workers)))


async def _call(client: httpx.AsyncClient, call: Call, tally: Tally) -> None:
    began = time.monotonic()
    try:
        if call.leaves:
            await _leave(str(client.base_url), call)
            tally.statuses["left"] += 1
            return
        request = client.build_request(call.method, call.path, content=call.body, headers=call.head)
        response = await client.send(request)
    except (httpx.InvalidURL, httpx.LocalProtocolError):
        tally.statuses["not sent"] += 1  # the client itself refuses to say it
        return
    except httpx.HTTPError as error:
        tally.statuses["no answer"] += 1
        tally.fail(f"no answer: {type(error).__name__} {error}", call)
        return
    tally.slowest = max(tally.slowest, time.monotonic() - began)
    status = response.status_code
    tally.statuses[str(status)] += 1
    if status >= 500 and status not in (501, 503):
        tally.fail(f"status {status}: {response.text[:500]}", call)
    elif status == 200 and call.stream and '"type":"InternalServerError"' in response.text:
        tally.fail(f"an error of the server in a stream: {response.text[-500:]}", call)
    elif status >= 400 and not response.content.startswith(b"{") and call.method != "HEAD":
        tally.fail(f"status {status} without an error object: {response.text[:200]}", call)


async def _leave(url: str, call: Call) -> None:
    """Asks and goes without waiting for the answer."""
    async with httpx.AsyncClient(base_url=url) as client:
        with contextlib.suppress(TimeoutError, httpx.HTTPError, httpx.InvalidURL):
            request = client.build_request(call.method, call.path, content=call.body, headers=call.head)
            await asyncio.wait_for(client.send(request, stream=True), 0.01)


def by_schema(served: Served, tally: Tally, examples: int) -> None:
    """schemathesis over /openapi.json: `examples` a route, and what it finds to cover besides."""
    if not CLIENTS.exists():
        sys.exit("schemathesis is not here: `make test-clients` makes its environment.")
    report = SCRATCH / "schemathesis.ndjson"
    (SCRATCH / "schemathesis.toml").write_text(EXPECTED)
    command = [str(CLIENTS), "run", f"{served.url}/openapi.json", "--checks", CHECKS]
    command += ["--phases", "coverage,fuzzing", "--max-examples", str(examples), "--no-shrink"]
    command += ["--continue-on-failure", "--request-timeout", str(PATIENCE), "--suppress-health-check", "all"]
    command += ["--report", "ndjson", "--report-ndjson-path", str(report), "--generation-database", "none"]
    done = subprocess.run(command, cwd=SCRATCH, capture_output=True, text=True)
    for line in report.read_text(encoding="utf-8").splitlines():
        for status in re.findall(r'"status_code":\s*(\d+)', line):
            tally.statuses[status] += 1
    if done.returncode:
        tally.fail(done.stdout[-6000:] + done.stderr[-1000:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, help="go on for so long, however many calls that is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8, help="connections")
    parser.add_argument("--schemathesis", type=int, metavar="EXAMPLES", help="calls of schemathesis, so many a route")
    parser.add_argument("--record", action="store_true", help="write the result into bench/results")
    options = parser.parse_args()
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir(parents=True)
    tally, served, began = Tally(), Served(), time.monotonic()
    before = 0.0
    try:
        if options.schemathesis:
            by_schema(served, tally, options.schemathesis)
        else:
            calls, seconds = (options.calls, 1e9) if options.minutes is None else (10**12, 60 * options.minutes)
            warm = min(2000, calls // 4)
            asyncio.run(mutate(served, tally, options.seed, warm, began + seconds, options.workers))
            before = served.memory()
            asyncio.run(mutate(served, tally, options.seed + 1, calls - warm, began + seconds, options.workers))
        after = served.memory() if served.process.poll() is None else 0.0
    finally:
        served.end(tally)
    minutes = (time.monotonic() - began) / 60
    print(
        f"{tally.calls} calls in {minutes:.1f} minutes"
        + (f", the slowest {tally.slowest:.1f} s" if tally.slowest else "")
        + f": {dict(sorted(tally.statuses.items()))}"
    )
    print(f"{len(tally.failures)} failures" + (f" -> {SCRATCH / 'failures'}" if tally.failures else ""))
    for failure in tally.failures[:10]:
        print(failure[:300])
    if not tally.failures:
        shutil.rmtree(SCRATCH)
    if options.record:
        keep(options, tally, minutes, {"MiB after 2,000 calls": before, "MiB at the end": after})
    return 1 if tally.failures else 0


def keep(options: argparse.Namespace, tally: Tally, minutes: float, memory: dict[str, float]) -> None:
    if options.schemathesis:
        command = f"python -m bench.fuzz --schemathesis {options.schemathesis} --record"
        record("fuzz-schemathesis", "Calls that schemathesis makes of /openapi.json.", tally, minutes, {}, command)
    else:
        length = f"--calls {options.calls}" if options.minutes is None else f"--minutes {options.minutes:g}"
        command = f"python -m bench.fuzz {length} --record"
        record("fuzz", "Mutated requests, raw bytes and odd heads, on a tiny model.", tally, minutes, memory, command)


def record(name: str, note: str, tally: Tally, minutes: float, memory: dict[str, float], command: str) -> None:
    row = {
        "minutes": minutes,
        "calls": tally.calls,
        "200": tally.statuses["200"],
        "4xx": sum(count for status, count in tally.statuses.items() if status.startswith("4")),
        "501": tally.statuses["501"],
        "503": tally.statuses["503"],
        "500": sum(tally.statuses[status] for status in ("500", "502", "504")),
        "no answer": tally.statuses["no answer"],
        "client left": tally.statuses["left"],
        "failures": len(tally.failures),
        **memory,
    }
    save_table(
        name,
        "what anybody may send",
        command,
        list(row),
        [row],
        note=note,
        statuses=dict(tally.statuses),
        slowest_seconds=tally.slowest or None,  # schemathesis does not tell
        failures=tally.failures[:100],
    )


if __name__ == "__main__":
    sys.exit(main())
