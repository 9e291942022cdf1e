"""Before a run of several processes: is every rank there, and is it the same program, recipe and text everywhere?

Each rank leaves what it is in the store that the launcher keeps on the first node; rank 0 compares and leaves the
verdict, which all read. Nodes differ in ways that nothing else would notice until the loss is wrong: another version,
another recipe, another text under the same name, a run.dir that is not shared.

    python -m train preflight CONFIG [section.key=value ...] --nodes N --node R --address HOST:PORT [--seconds S]

does the same between nodes before any launcher is started: a launcher waits for a missing node for ten minutes, and
then cannot say which.
"""

from __future__ import annotations

import argparse
import hashlib
import ipaddress
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.config import Recipe, RecipeError, load
from train.schema import show
from train.watch import Place, Watch, connect

POLL = timedelta(seconds=1)
ROOT = Path(__file__).resolve().parents[1]
# Of one machine, not of the run.
OWN = ("train.threads", "data.cache")
REMEDY = {
    "heed": "install the same on every node",
    "its source": "copy lm/ and train/ from one node to the others",
    "python": "install the same on every node",
    "torch": "install the same on every node",
    "accelerate": "install the same on every node",
    "the prepared data": "every node must read the same text and tokenizer, from a shared file system or equal copies",
    "the checkpoint to continue from": "run.dir must lie on a file system that all nodes share",
}


def place() -> Place:
    """Where this process is, as torch's launcher, or anything else that sets RANK, says."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    address = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '29500')}"
    return Place(
        rank=rank,
        world=world,
        node=int(os.environ.get("GROUP_RANK", rank // local)),
        nodes=int(os.environ.get("GROUP_WORLD_SIZE", -(-world // local))),
        host=socket.gethostname(),
        address=address,
        ip=own_ip(address) if world > 1 else "",
    )


def begin(recipe: Recipe) -> tuple[Watch, dist.Store | None]:
    """The ranks of this launch find each other and see that they are the same program with the same recipe.

    The watch over them, which is not begun yet, and a connection for what they have to agree on later; None of one
    process. Raises RecipeError.
    """
    here = place()
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        if (
            "ACCELERATE_MIXED_PRECISION" in os.environ
            and "MASTER_ADDR" in os.environ
            and "WORLD_SIZE" not in os.environ
        ):
            raise RecipeError(
                [
                    "the launcher was asked for several processes and has started one, as it does for a CPU; "
                    "launch with --config_file configs/accelerate/cpus.yaml."
                ]
            )
        return Watch(here), None
    if here.world < 2:
        return Watch(here), None
    patience = float(recipe.train.timeout)
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by the launcher
    name = f"heed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    first = connect(here, patience, keep=not kept and here.rank == 0)
    store = dist.PrefixStore(name, first)
    places = meet(store, here, "program", program(recipe), patience)
    use_the_interface_between(here, places)
    # Two connections: the watch talks while the main thread waits on its own.
    return Watch(here, dist.PrefixStore(name, connect(here, patience)), places, patience), store


def unconnected(here: Place, error: Exception) -> str:
    """The sentence for ranks that have met at the store and yet cannot connect to each other."""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    return (
        f"{here} cannot connect to the other ranks ({str(error).splitlines()[0].rstrip('.')}); nodes must reach each "
        "other on every port, over one network: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name its interface"
        + (f" (gloo's is {chosen} now)." if chosen else ".")
    )


def meet(store: dist.Store, here: Place, name: str, facts: Mapping[str, Any], seconds: float | None) -> list[Place]:
    """Wait until every rank has come, and compare `facts` with rank 0's. Where every rank is.

    seconds: how long to wait for the last one; None for as long as it takes, where a Watch says who is gone. Raises
    RecipeError, on every rank the same, for ranks that do not come and facts that differ.
    """
    store.set(
        f"{name}/{here.rank}", json.dumps({"host": here.host, "node": here.node, "ip": here.ip, "facts": dict(facts)})
    )
    keys = [f"{name}/{rank}" for rank in range(here.world)]
    if here.rank == 0:
        missing = _wait(store, keys, seconds)
        problems = _missing(missing, here, seconds) if missing else _differences(store.multi_get(keys), here)
        store.set(f"{name}/verdict", json.dumps(problems))
    elif _wait(store, [f"{name}/verdict"], None if seconds is None else seconds + 10):
        raise RecipeError([f"rank 0 at {here.address} has not said within {seconds} s that all ranks are there."])
    problems = json.loads(store.get(f"{name}/verdict"))
    if here.rank == 0 and problems:  # the store may go with this process
        _wait(store, [f"{name}/read/{rank}" for rank in range(1, here.world) if rank not in missing], 3)
    elif problems:
        store.set(f"{name}/read/{here.rank}", "1")
    if problems:
        raise RecipeError(problems)
    found = [json.loads(value) for value in store.multi_get(keys)]
    return [
        Place(rank, here.world, one["node"], here.nodes, one["host"], here.address, one["ip"])
        for rank, one in enumerate(found)
    ]


def _wait(store: dist.Store, keys: list[str], seconds: float | None) -> list[int]:
    """The indices of the keys that are not there after `seconds`. In slices: a signal is seen between two."""
    began = time.monotonic()
    while True:
        try:
            store.wait(keys, POLL)
            return []
        except dist.DistError:
            if seconds is not None and time.monotonic() - began > seconds:
                return [index for index, key in enumerate(keys) if not store.check([key])]


def _missing(ranks: list[int], here: Place, seconds: float | None) -> list[str]:
    each = here.world // here.nodes
    nodes = sorted({rank // each for rank in ranks})
    names = []
    for node in nodes:
        members = [rank for rank in ranks if rank // each == node]
        which = f"rank {members[0]}" if len(members) == 1 else f"ranks {members[0]}-{members[-1]}"
        names.append(f"node {node} of {here.nodes} ({which})" if here.nodes > 1 else which)
    return [
        f"{' and '.join(names)} did not come to {here.address} within {seconds:.0f} s; start the same command there, "
        "with its own machine rank, and see that it can reach this address."
    ]


def _differences(values: list[bytes], here: Place) -> list[str]:
    """A sentence for each fact in which a host differs from rank 0's; of a host with several ranks, its first."""
    found = [json.loads(value) for value in values]
    first, seen, problems = found[0], set(), []
    for rank, other in enumerate(found):
        for key, wanted in first["facts"].items():
            value = other["facts"].get(key)
            if value != wanted and (other["node"], key) not in seen:
                seen.add((other["node"], key))
                problems.append(
                    f"{key} is {show(value)} on {other['host']} (node {other['node']}, rank {rank}) and "
                    f"{show(wanted)} on {first['host']} (node 0, rank 0); "
                    f"{REMEDY.get(key, 'give every node the same recipe')}."
                )
    return problems


def program(recipe: Recipe) -> dict[str, Any]:
    """What must be the same on every node before anything is prepared: versions, source, and the recipe's keys."""
    facts: dict[str, Any] = {
        "heed": _version(),
        "its source": _source(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "accelerate": version("accelerate"),
    }
    for section, values in recipe.to_dict().items():
        facts |= {f"{section}.{key}": v for key, v in values.items() if f"{section}.{key}" not in OWN}
    return json.loads(json.dumps(facts))


def _version() -> str | None:
    try:
        return version("heed")
    except PackageNotFoundError:  # run from its source, uninstalled
        return None


def _source() -> str:
    digest = hashlib.sha256()
    for folder in ("lm", "train"):
        for file in sorted((ROOT / folder).glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def own_ip(towards: str) -> str:
    """This machine's address on the way to a host:port; "" where there is no way. Sends nothing."""
    host, _, port = towards.rpartition(":")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # of a datagram socket: only chooses a route
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def use_the_interface_between(here: Place, others: Iterable[Place]) -> None:
    """Have gloo speak over the network that joins the nodes. Left alone it takes the one that the host's own name
    stands for, which on many machines is the loopback: other nodes cannot connect to that. So may the first node's own
    name be, as it finds itself; then the way to another node is the one.
    """
    if here.nodes < 2 or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    import psutil

    # Any port does: nothing is sent.
    away = [f"{other.ip}:9" for other in others if other.node != here.node and other.ip]
    for mine in (own_ip(towards) for towards in (here.address, *away)):
        if not mine or ipaddress.ip_address(mine).is_loopback:
            continue
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address.partition("%")[0] == mine for address in addresses):
                os.environ["GLOO_SOCKET_IFNAME"] = name
                return


def main(argv: list[str]) -> int:
    """The verb: one process a node, before the launcher."""
    parser = argparse.ArgumentParser(prog="python -m train preflight", allow_abbrev=False)
    parser.add_argument("config", help="the recipe that will be trained")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    environment = os.environ.get
    parser.add_argument(
        "--nodes", type=int, default=environment("SLURM_NNODES"), help="how many; default: Slurm's SLURM_NNODES"
    )
    parser.add_argument(
        "--node", type=int, default=environment("SLURM_NODEID"), help="which this is, from 0; default: SLURM_NODEID"
    )
    parser.add_argument("--address", required=True, metavar="HOST:PORT", help="of node 0; the port must be free there")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to wait for the last node (default 60)")
    asked = parser.parse_intermixed_args(argv)
    try:
        if asked.nodes is None or asked.node is None or not 0 <= asked.node < asked.nodes:
            raise RecipeError([f"--nodes is {asked.nodes} and --node is {asked.node}; it must be from 0 to nodes - 1."])
        if not asked.address.rpartition(":")[2].isdecimal() or not asked.address.rpartition(":")[0]:
            raise RecipeError([f"--address is {asked.address}; it must be HOST:PORT, such as 10.0.0.1:29400."])
        recipe = load(asked.config, asked.overrides)
        here = Place(asked.node, asked.nodes, asked.node, asked.nodes, socket.gethostname(), asked.address)
        store = connect(here, asked.seconds, keep=here.rank == 0)
        places = meet(dist.PrefixStore("heed/preflight", store), here, "nodes", program(recipe), asked.seconds)
        if here.rank == 0:
            hosts = ", ".join(one.host for one in places)
            print(f"{here.world} node(s) are there, with the same program and recipe: {hosts}.")
            _wait(store, [f"bye/{rank}" for rank in range(1, here.world)], 5)
        else:
            store.set(f"bye/{here.rank}", "1")
    except RecipeError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 2
    return 0
