"""Before a run of several ranks: who is missing, who is another program or has other data. While it runs: who hangs.

Ranks are threads here, each with connections of its own to a store in this process, or processes where they end.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from train import preflight
from train.__main__ import main
from train.schema import RecipeError
from train.watch import Place, Watch, connect, lost_peer, silence

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def ranks():
    """ranks(nodes, facts, seconds): what each rank finds when all that are given facts meet: places, or problems. A
    rank whose facts are None does not come."""
    stores: list[dist.Store] = []

    def meet(nodes: int, facts: list[dict | None], seconds: float = 30.0) -> list[list]:
        world, address = len(facts), f"127.0.0.1:{free_port()}"

        def one(rank: int) -> list:
            here = Place(rank, world, rank * nodes // world, nodes, f"host{rank * nodes // world}", address)
            store = connect(here, 30, keep=rank == 0)
            stores.append(store)
            try:
                return list(preflight.meet(dist.PrefixStore("test", store), here, "facts", facts[rank] or {}, seconds))
            except RecipeError as error:
                return error.problems

        there = [rank for rank, fact in enumerate(facts) if fact is not None]
        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(one, there))

    yield meet
    stores.clear()


def test_ranks_that_are_the_same_program_learn_where_each_other_is(ranks) -> None:
    found = ranks(2, [{"torch": "2.13.0", "optim.lr": 0.1}] * 4)
    assert all(places == found[0] for places in found)
    assert [(place.rank, place.node, place.host) for place in found[0]] == [
        (0, 0, "host0"),
        (1, 0, "host0"),
        (2, 1, "host1"),
        (3, 1, "host1"),
    ]


@pytest.mark.parametrize(
    ("key", "here", "there", "remedy"),
    [
        ("heed", "0.1.0", "0.2.0", "install the same on every node"),
        ("torch", "2.13.0+cpu", "2.12.1", "install the same on every node"),
        ("its source", "aaaa", "bbbb", "copy lm/ and train/ from one node to the others"),
        ("optim.lr", 0.001, 0.01, "give every node the same recipe"),
        ("the prepared data", "feed", "f00d", "every node must read the same text and tokenizer"),
        ("the checkpoint to continue from", "step-40", None, "run.dir must lie on a file system that all nodes share"),
    ],
)
def test_a_node_that_differs_is_named_once_with_both_values_on_every_rank(ranks, key, here, there, remedy) -> None:
    found = ranks(2, [{key: here, "same": 1}] * 2 + [{key: there, "same": 1}] * 2)
    assert all(problems == found[0] for problems in found)
    (problem,) = found[0]
    shown, other = preflight.show(here), preflight.show(there)
    assert problem.startswith(
        f"{key} is {other} on host1 (node 1, rank 2) and {shown} on host0 (node 0, rank 0); {remedy}"
    )


def test_ranks_and_nodes_that_do_not_come_are_named(ranks) -> None:
    same: dict = {"torch": "2"}
    for problems in ranks(2, [same, same, None, None], seconds=2):
        assert "node 1 of 2 (ranks 2-3) did not come to 127.0.0.1:" in problems[0]
        assert " within 2 s; start the same command there" in problems[0]
    for problems in ranks(1, [same, None, same], seconds=2):
        assert problems[0].startswith("rank 1 did not come to 127.0.0.1:")


def test_what_must_be_the_same_is_the_recipe_but_for_what_is_a_machines_own(tiny) -> None:
    facts = preflight.program(tiny.recipe())
    assert facts == preflight.program(tiny.recipe("train.threads=7", "data.cache=elsewhere"))
    other = preflight.program(tiny.recipe("optim.lr=0.5"))
    assert {key for key in facts if facts[key] != other[key]} == {"optim.lr"}
    assert {"heed", "its source", "python", "torch", "accelerate"} <= facts.keys()


# ------------------------------------------------------------ the verb


def verb(recipe: Path, node: int, address: str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "train", "preflight", str(recipe), *more]
    command += ["--nodes", "2", "--node", str(node), "--address", address, "--seconds", "40"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_verb_says_that_all_nodes_are_there_or_which_differs(tiny_yaml: Path) -> None:
    good, bad = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    asked = [verb(tiny_yaml, 0, good), verb(tiny_yaml, 1, good)]
    asked += [verb(tiny_yaml, 0, bad), verb(tiny_yaml, 1, bad, "optim.lr=0.5")]
    said = [one.communicate(timeout=120) for one in asked]
    assert [one.returncode for one in asked] == [0, 0, 2, 2], said
    host = socket.gethostname()
    assert said[0] == (f"2 node(s) are there, with the same program and recipe: {host}, {host}.\n", "")
    assert said[1] == ("", "")
    for out, err in said[2:]:
        assert out == ""
        assert err.startswith(f"optim.lr is 0.5 on {host} (node 1, rank 1) and 0.01 on {host} (node 0, rank 0);")
        assert err.count("\n") == 1


def test_the_verb_refuses_in_a_sentence(tiny_yaml: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    def refused(*words: str) -> str:
        assert main(["preflight", str(tiny_yaml), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    nobody = f"127.0.0.1:{free_port()}"
    assert refused("--nodes", "2", "--node", "2", "--address", nobody).startswith(
        "--nodes is 2 and --node is 2; it must"
    )
    assert refused("--address", nobody).startswith("--nodes is None")
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert refused("--address", "there").startswith("--address is there; it must be HOST:PORT")
    unreachable = refused("--address", nobody, "--seconds", "1")
    assert unreachable.startswith(f"the store of node 0 at {nobody} cannot be reached within 1 s, as rank 1 on ")


# ------------------------------------------------------------ while it runs

WATCHED = """
import sys, time
import torch.distributed as dist
from train.watch import Place, Watch, connect
rank, address = int(sys.argv[1]), sys.argv[2]
places = [Place(r, 2, 0, 1, "here", address) for r in (0, 1)]
store = connect(places[rank], 60, keep=rank == 0)
with Watch(places[rank], dist.PrefixStore("w", store), places, patience=4) as watch:
"""


def two(inside: str) -> list[tuple[int, str]]:
    """Two ranks that do `inside` under their watch: the exit status of each, and what it said."""
    address = f"127.0.0.1:{free_port()}"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WATCHED + textwrap.indent(inside, "    "), str(rank), address],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"},
        )
        for rank in (0, 1)
    ]
    said = [one.communicate(timeout=90)[1] for one in ranks]
    return [(one.returncode, text) for one, text in zip(ranks, said, strict=True)]


def test_a_rank_that_hangs_while_its_process_lives_is_told_from_those_that_wait_for_it() -> None:
    """Rank 1 stays in its second update; rank 0 has done its part and waits for the gradients."""
    for rank, (status, said) in enumerate(
        two(
            """
watch.at("update 1"); watch.arrive(); time.sleep(2)
watch.at("update 2")
if rank == 0:
    watch.arrive()
time.sleep(100)
"""
        )
    ):
        assert status == 1
        assert said.startswith(
            f"rank {rank}: the run ends: rank 1 on here has not gone on from update 2 for 4 s, and the others wait for"
        )
        assert said.count("\n") == 1


def test_a_rank_that_fails_tells_the_others_why() -> None:
    (status, waited), (failure, failed) = two(
        """
if rank == 1:
    raise MemoryError("no room for 8 GiB")
time.sleep(100)
"""
    )
    assert (status, failure) == (1, 1)
    assert failed.splitlines()[-1] == "MemoryError: no room for 8 GiB"
    assert waited.startswith("rank 0: the run ends: rank 1 on here failed: MemoryError: no room for 8 GiB.")


def test_one_process_watches_nobody() -> None:
    with Watch(Place(0, 1, 0, 1, "here", "127.0.0.1:1")) as watch:
        watch.at("update 1")
        watch.arrive()
    with pytest.raises(ZeroDivisionError), watch:
        raise ZeroDivisionError


def test_how_long_is_waited() -> None:
    assert [silence(patience) for patience in (5, 10, 60, 600)] == [5, 10, 10, 60]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3141"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1"), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
    ],
)
def test_an_error_that_says_only_that_somebody_is_gone_is_known(error: Exception, lost: bool) -> None:
    assert lost_peer(error) is lost
