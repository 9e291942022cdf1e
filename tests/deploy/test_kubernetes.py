"""deploy/kubernetes: true to Kubernetes' schema, and to what the servers do with their flags, probes and signals."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from serve.cli import parse
from serve.on_vllm.flags import read, translate, wants_vllm

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))


def objects(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def workloads() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Each pod's file, its spec and its container."""
    for file in FILES:
        for thing in objects(file):
            if thing["kind"] in ("Deployment", "StatefulSet"):
                spec = thing["spec"]["template"]["spec"]
                (container,) = spec["containers"]
                yield file.name, spec, container


def command(container: dict[str, Any]) -> list[str]:
    """The flags of `python -m serve` that a container ends in."""
    if "command" not in container:
        return container["args"]
    (script,) = container["args"]
    (line,) = re.findall(r"exec python3 -m serve (.*)", script.replace("\\\n", " "))
    return [word.replace("$NODES", "2") for word in shlex.split(line)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_schema_holds(file: Path) -> None:
    assert objects(file)
    for thing in objects(file):
        kubernetes_validate.validate(thing, kubernetes_validate.latest_version(), strict=True)


def test_the_schema_would_find_a_mistake() -> None:
    thing = objects(FILES[0])[0]
    thing["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(thing, kubernetes_validate.latest_version(), strict=True)


def test_the_flags_are_those_of_the_engine() -> None:
    engines = set()
    for _, _, container in workloads():
        argv = command(container)
        if wants_vllm(argv):
            line = read(argv)
            assert translate(line, {})
            host, port = line.get("--host"), line.get("--port")
        else:
            server, _ = parse(argv)
            host, port = (server.host,), (str(server.port),)
        engines.add(wants_vllm(argv))
        assert host == ("0.0.0.0",)
        assert int(port[0]) in {entry["containerPort"] for entry in container["ports"]}
    assert engines == {True, False}


def test_the_gpus_are_as_many_as_the_ranks_want() -> None:
    for name, _, container in workloads():
        argv = command(container)
        if wants_vllm(argv):
            gpus = container["resources"]["limits"]["nvidia.com/gpu"]
            assert read(argv).number("--tensor-parallel-size", 1) == gpus, name


def test_a_pod_is_given_the_time_that_a_drain_takes() -> None:
    for name, spec, container in workloads():
        argv = command(container)
        drain = float(argv[argv.index("--shutdown-timeout") + 1])
        pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pause + drain + 10 <= spec["terminationGracePeriodSeconds"], name


def test_the_probes_ask_routes_that_the_engine_has() -> None:
    for name, _, container in workloads():
        probes = {kind: container[kind]["httpGet"]["path"] for kind in container if kind.endswith("Probe")}
        assert probes["readinessProbe"] == "/health"
        if name == "native.yaml":
            assert (probes["livenessProbe"], probes["startupProbe"]) == ("/live", "/live")
        else:
            assert set(probes.values()) == {"/health"}, "vLLM has no /live"


def test_services_and_budgets_name_pods_that_there_are() -> None:
    for file in FILES:
        things = objects(file)
        labels = [
            thing["spec"]["template"]["metadata"]["labels"] for thing in things if "template" in thing.get("spec", {})
        ]
        for thing in things:
            selector = thing["spec"].get("selector", {})
            chosen = selector.get("matchLabels", selector)
            assert chosen in labels, f"{file.name}: {thing['kind']} {thing['metadata']['name']}"
