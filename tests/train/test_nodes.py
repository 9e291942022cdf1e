"""Several processes as the documentation starts them: on one machine, and on two nodes with a network of their own.

The nodes are network namespaces, each joined to a switch by a cable that a test can pull out.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from train import checkpoint
from train.launch import cores
from train.metrics import read

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = str(Path(sys.executable).parent / "accelerate")
CPUS = ["launch", "--config_file", "configs/accelerate/cpus.yaml"]
NODES = ["launch", "--config_file", "configs/accelerate/nodes-cpu.yaml"]
ENDLESS = ["train.steps=1000000", "schedule.kind=constant"]
DEADLINE = 6  # train.timeout: seconds


class Process:
    """A command in a process group of its own; all it says is in `log`."""

    def __init__(self, command: list[str], log: Path, **environment: str):
        self.log = log
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=inherited | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} | environment,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def reach(self, run: Path, rows: int, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if len(read(run / "metrics.jsonl")) >= rows:
                return
            time.sleep(0.02)
        pytest.fail(f"the run did not come to {rows} rows (exit status {self.process.poll()}):\n{self.said()[-3000:]}")

    def rank(self, number: int) -> psutil.Process:
        """The process that is this rank: the launcher's child."""
        for child in psutil.Process(self.process.pid).children():
            if child.environ().get("RANK") == str(number):
                return child
        pytest.fail(f"no rank {number}")

    def end(self, seconds: float = 120) -> int:
        return self.process.wait(seconds)

    def causes(self) -> list[str]:
        """The sentences with which ranks end; in the launcher's table they stand once more."""
        return sorted({line for line in self.said().splitlines() if ": the run ends: " in line and line[:4] == "rank"})

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """begin(command, **environment): the process, which does not outlive the test."""
    begun: list[Process] = []

    def start(command: list[str], **environment: str) -> Process:
        begun.append(Process(command, tmp_path / f"log{len(begun)}", **environment))
        return begun[-1]

    yield start
    for process in begun:
        process.stop()


# ------------------------------------------------------------ one machine


def test_a_rank_that_is_killed_ends_the_run_with_its_name(begin, tiny_yaml: Path, tmp_path: Path) -> None:
    """Of four. The launcher sends the others SIGTERM at once; they still find out why. What was kept stays."""
    run = tmp_path / "run"
    options = [*ENDLESS, f"run.dir={run}", "checkpoint.every=5"]
    launched = begin([ACCELERATE, *CPUS, "--num_processes", "4", "-m", "train", str(tiny_yaml), *options])
    launched.reach(run, 12)
    launched.rank(1).kill()
    assert launched.end(60) == 1
    causes = launched.causes()
    assert [cause[:7] for cause in causes] == ["rank 0:", "rank 2:", "rank 3:"]
    for cause in causes:
        assert cause[7:].startswith(" the run ends: rank 1 on ")
        assert " is gone: killed from outside" in cause
        assert "Traceback" not in launched.said().partition(cause)[0]
    assert f"4 process(es), {max(1, cores() // 4)} thread(s) each" in launched.said()
    assert len(read(run / "metrics.jsonl")) >= 12
    assert checkpoint.checkpoints(run)


def test_a_rank_of_which_nothing_is_heard_ends_the_run(begin, tiny_yaml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*ENDLESS, f"run.dir={run}", f"train.timeout={DEADLINE}"]
    launched = begin([ACCELERATE, *CPUS, "-m", "train", str(tiny_yaml), *options])
    launched.reach(run, 2)
    stopped, waiting = launched.rank(1), launched.rank(0)
    stopped.suspend()
    try:
        waiting.wait(60)
        (cause,) = launched.causes()
    finally:
        stopped.kill()  # the launcher would give the one that does not answer 30 s more
    assert cause.startswith("rank 0: the run ends: rank 1 on ")
    assert f" has not been heard of for {DEADLINE} s" in cause


def test_the_launcher_that_starts_one_process_where_several_are_asked_for_is_refused(begin, tiny_yaml: Path) -> None:
    launched = begin([ACCELERATE, "launch", "-q", "--cpu", "--num_processes", "2", "-m", "train", str(tiny_yaml)])
    assert launched.end() == 1
    assert launched.said().splitlines()[-1] == (
        "the launcher was asked for several processes and has started one, as it does for a CPU; launch with "
        "--config_file configs/accelerate/cpus.yaml."
    )


# ------------------------------------------------------------ two nodes


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


class Nodes:
    """Two network namespaces on one switch. `addresses[i]`; `on(i, command)`: the command, to be run on node i."""

    def __init__(self) -> None:
        tag = f"heed{os.getpid() % 10_000}"
        self.switch, self.names = f"{tag}s", [f"{tag}a", f"{tag}b"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def build(self) -> bool:
        switch = self.switch
        made = all(ip("netns", "add", name) for name in (switch, *self.names))
        made = made and ip("-n", switch, "link", "add", "hub", "type", "bridge")
        made = made and ip("-n", switch, "link", "set", "hub", "up")
        for name, address in zip(self.names, self.addresses, strict=True):
            made = made and all(
                [
                    ip("-n", switch, "link", "add", f"to{name}", "type", "veth", "peer", "cable", "netns", name),
                    ip("-n", switch, "link", "set", f"to{name}", "master", "hub", "up"),
                    ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable"),
                    ip("-n", name, "link", "set", "cable", "up"),
                    ip("-n", name, "link", "set", "lo", "up"),
                ]
            )
        return made

    def on(self, node: int, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self.names[node], *command]

    def pull_out(self, node: int) -> None:
        assert ip("-n", self.switch, "link", "set", f"to{self.names[node]}", "down")

    def remove(self) -> None:
        for name in (*self.names, self.switch):
            ip("netns", "del", name)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    built = Nodes()
    try:
        if not (hasattr(os, "geteuid") and os.geteuid() == 0 and Path("/proc/self/ns/net").exists() and built.build()):
            pytest.skip("two nodes need network namespaces, which root may make on Linux")
        yield built
    finally:
        built.remove()


def test_two_nodes_learn_what_one_process_does_and_a_pulled_cable_is_named_on_both(
    begin, nodes: Nodes, tiny, tiny_yaml: Path, tmp_path: Path, figures
) -> None:
    run = tmp_path / "run"
    options = [*ENDLESS, f"run.dir={run}", f"train.timeout={DEADLINE}"]
    alone = tiny("train.steps=4", "schedule.kind=constant", name="alone")
    ranks = []
    for node in (0, 1):
        where = ["--machine_rank", str(node), "--main_process_ip", nodes.addresses[0]]
        command = [ACCELERATE, *NODES, *where, "-m", "train", str(tiny_yaml), *options]
        ranks.append(begin(nodes.on(node, command)))
    ranks[0].reach(run, 6)
    nodes.pull_out(1)
    assert [rank.end(90) for rank in ranks] == [1, 1]
    assert figures(read(run / "metrics.jsonl"))[:4] == pytest.approx(figures(alone), rel=1e-6)
    (first,), (second,) = ranks[0].causes(), ranks[1].causes()
    assert first.startswith("rank 0: the run ends: node 1 (")
    assert f", rank 1) has not been heard of for {DEADLINE} s" in first
    assert second.startswith(
        "rank 1: the run ends: node 0, whose launcher keeps the ranks together at 10.77.0.1:29500,"
    )


def test_gloo_speaks_over_the_network_that_joins_the_nodes(nodes: Nodes, begin) -> None:
    """Not over the loopback, which is what a host's own name stands for on many machines, the first node's too."""
    program = f"""
import os
from dataclasses import replace
from train import preflight
here = preflight.place()
away = replace(here, rank=1 - here.rank, node=1 - here.node, ip={nodes.addresses}[1 - here.rank])
preflight.use_the_interface_between(here, [here, away])
print(os.environ.get("GLOO_SOCKET_IFNAME"))
"""
    asked = []
    for node, first in ((0, "127.0.0.1"), (0, nodes.addresses[0]), (1, nodes.addresses[0])):
        several = {"RANK": str(node), "WORLD_SIZE": "2", "MASTER_ADDR": first, "MASTER_PORT": "29500"}
        asked.append(begin(nodes.on(node, [sys.executable, "-c", program]), **several))
    for one in asked:
        assert (one.end(), one.said()) == (0, "cable\n")


# ------------------------------------------------------------ a batch job

STANDINS = {
    # Each task of a step is a node, here all on this machine.
    "srun": """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
pids=()
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
""",
    "scontrol": """#!/bin/bash
[[ "$*" == "show hostnames $SLURM_JOB_NODELIST" ]] && printf '127.0.0.1\\n127.0.0.1\\n'
""",
}


def test_the_batch_job_checks_its_nodes_and_trains_on_them(begin, tiny_yaml: Path, tmp_path: Path) -> None:
    for name, script in STANDINS.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    job = {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": str(os.getpid()),
        "PROCESSES": "1",
        "LAUNCH": "configs/accelerate/nodes-cpu.yaml",
    }
    run = tmp_path / "run"
    ended = begin(["bash", "configs/slurm.sbatch", str(tiny_yaml), f"run.dir={run}", "train.steps=3"], **job)
    assert ended.end() == 0, ended.said()
    assert "2 node(s) are there, with the same program and recipe" in ended.said()
    assert "2 process(es)" in ended.said()
    assert [row["step"] for row in read(run / "metrics.jsonl")] == [1, 2, 3]
    assert (run / "model-last" / "model.safetensors").exists()
    assert begin(["bash", "configs/slurm.sbatch"], **job).end() == 2
