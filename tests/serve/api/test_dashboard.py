"""deploy/grafana/heed.json, over vLLM's metrics: asked of a real Prometheus that watches a server under load."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[3]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "heed.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


def test_the_dashboard_is_one() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not mine & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        cells |= mine
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    for title, expression in EXPRESSIONS:
        assert set(re.findall(r"\$(\w+)", expression)) <= variables | {"__rate_interval"}, title
        assert "instance" in expression, title  # each panel follows the choice of server


def test_its_metrics_are_those_of_vllm(server) -> None:
    """So that it shows real vLLM just as well: nothing of it begins with `heed:`."""
    server.complete(prompt="a", max_tokens=1)  # the first request makes HTTP's labels
    served = httpx.get(server.url + "/metrics").text
    for title, expression in EXPRESSIONS:
        names = re.findall(r"\b(?:vllm:|http_|process_)\w+", expression)
        assert names, title
        for name in names:
            assert re.search(rf"^{re.escape(name)}[{{ ]", served, re.MULTILINE), f"{title}: {name}"


class Prometheus:
    """A process that scrapes one server every half second."""

    def __init__(self, binary: str, folder: Path, target: int, port: int) -> None:
        config = {
            "global": {"scrape_interval": "500ms"},
            "scrape_configs": [{"job_name": "heed", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        self.url = f"http://127.0.0.1:{port}"
        self._log = (folder / "prometheus.log").open("wb")
        self.process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def query(self, expression: str) -> list[float]:
        """The values of an instant, those that are no number left out; none where it does not answer (yet)."""
        try:
            answer = httpx.get(self.url + "/api/v1/query", params={"query": expression}, timeout=10).json()
        except httpx.TransportError:
            return []
        assert answer.get("status") == "success", answer
        values = [float(series["value"][1]) for series in answer["data"]["result"]]
        return [value for value in values if not math.isnan(value)]

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        self._log.close()


@pytest.fixture
def prometheus(server, tmp_path: Path) -> Iterator[Prometheus]:
    from tests.conftest import free_port

    unpacked = ROOT / ".cache" / "prometheus" / "usr" / "bin" / "prometheus"
    binary = str(unpacked) if unpacked.exists() else shutil.which("prometheus")
    if binary is None:
        pytest.skip("there is no Prometheus here: `make test-dashboard` fetches Debian's package")
    running = Prometheus(binary, tmp_path, server.port, free_port())
    yield running
    running.end()


def test_every_panel_has_data_from_a_server_under_load(server, prometheus: Prometheus) -> None:
    done = threading.Event()

    def load(seed: int) -> None:
        while not done.is_set():
            text = "the quick brown fox jumps over the lazy dog " * 2
            server.complete(prompt=text, n=2, seed=seed, max_tokens=10 + seed, ignore_eos=True)

    threads = [threading.Thread(target=load, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        missing = dict(EXPRESSIONS)
        deadline = time.monotonic() + 60
        while missing and time.monotonic() < deadline:
            for title, expression in EXPRESSIONS:
                filled = re.sub(r"\$\w+", lambda name: {"$__rate_interval": "10s"}.get(name[0], ".*"), expression)
                if title in missing and prometheus.query(filled):
                    missing.pop(title)
            time.sleep(0.2)
        assert not missing
        # All of a panel's lines, and not only one, once there is something to see.
        for title, expression in EXPRESSIONS:
            filled = re.sub(r"\$\w+", lambda name: {"$__rate_interval": "10s"}.get(name[0], ".*"), expression)
            assert prometheus.query(filled), f"{title}: {filled}"
        assert prometheus.query("sum(rate(vllm:generation_tokens_total[10s]))")[0] > 0
        for variable in ("model_name", "instance"):
            labels = httpx.get(f"{prometheus.url}/api/v1/label/{variable}/values").json()["data"]
            assert labels, variable
    finally:
        done.set()
        for thread in threads:
            thread.join()
