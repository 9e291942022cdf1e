"""Each rank watches the others, so that a rank that dies or hangs ends the run with its cause, and not with silence.

What the ranks share is the key-value store that the launcher on the first node keeps (rank 0 itself where there is no
such launcher). A thread of each rank writes its beat there every second: a number that grows, and how far its training
has come. Rank 0 reads all beats, the others rank 0's and what has been found; a training step is not held up by any of
it. A second thread judges, because a store that cannot be reached may not even say so:

- nothing is heard of a rank for `silence` seconds: it was killed, or its node cannot be reached;
- the store does not answer for as long: the first node cannot be reached;
- a rank stays where it is for `patience` seconds while another waits further on: it hangs.

Whoever finds a cause leaves it in the store. Each rank then says it in one sentence and exits: its main thread waits
inside a collective that nothing but the end of the process would end.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from train.schema import RecipeError

BEAT = 1.0  # seconds between two beats
NOTICE = 3.5  # beats after which a rank whose connections broke is told from one that merely waits
FOUND = "found"  # the key of the cause


@dataclass(frozen=True)
class Place:
    """Where a rank is: in the world, on its node, and where the store is kept."""

    rank: int
    world: int
    node: int
    nodes: int
    host: str
    address: str  # of the store, as host:port
    ip: str = ""  # of its own, on the way to the store; a loopback's on the node that has the store

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}" + (f" (node {self.node})" if self.nodes > 1 else "")


class Watch:
    """One rank's watch. Without a store (one process) it does nothing.

    As a context it lasts as long as the training: what is raised inside is told to the other ranks, and an error that
    only says that another rank is gone becomes a sentence and exit status 1.
    """

    def __init__(
        self, place: Place, store: dist.Store | None = None, hosts: Iterable[Place] = (), patience: float = 600.0
    ):
        self.place, self.patience = place, patience
        self.silence = silence(patience)
        self._store = store
        self._places = {other.rank: other for other in hosts}
        self._came, self._at = 0, "its start"
        self._beats: dict[int, dict[str, object]] = {}
        self._changed: dict[int, float] = {}  # when a rank's beat was last seen to grow
        self._moved: dict[int, float] = {}  # when a rank was last seen to go on
        self._answered = time.monotonic()
        self._broken: str | None = None  # why the store cannot be asked any more
        self._found: str | None = None
        self._everyone = place.rank == 0
        self._leaving = False
        self._done = threading.Event()
        self._lock = threading.Lock()

    def at(self, where: str) -> None:
        """The main thread is about to begin `where`, such as "update 12"."""
        self._at, self._came = where, self._came + 1

    def arrive(self) -> None:
        """The main thread is about to wait for the others, at the place that it has named."""
        self._came += 1

    # ------------------------------------------------------------ from begin to end

    def __enter__(self) -> Watch:
        if self._store is not None:
            for work in (self._talk, self._judge):
                threading.Thread(target=work, name=f"watch {work.__name__}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is None:
            return
        if isinstance(error, RecipeError):
            if error.problems:  # else it is the main rank that says why
                self._leave(f"{self.place} refuses: {' '.join(error.problems)}")
        elif error is not None and lost_peer(error):
            said = str(error).splitlines()[0].rstrip(".")
            self._end(self._find() or f"a connection to another rank was lost ({said})")
        elif isinstance(error, Exception):
            self._leave(f"{self.place} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        elif error is not None:  # a signal ends this rank: often the launcher's, because another one has ended
            self._leaving = True
            cause = self._find()
            if cause is not None:
                self._end(cause)
        self._leaving = True
        self._done.set()
        with suppress(dist.DistError, RuntimeError):
            self._beat()

    def _find(self) -> str | None:
        """Something ended, perhaps because a rank is gone, which is all that it says: which, if there is one."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, for the same cause: it grants 30 s
        began = time.monotonic()
        self._everyone = True
        others = [rank for rank in self._places if rank != self.place.rank]
        while time.monotonic() - began < (NOTICE + 1) * BEAT and not self._found and not self._broken:
            if all(self._beats.get(rank, {}).get("done") for rank in others):
                return None
            time.sleep(BEAT / 10)
        gone = [rank for rank in others if self._changed.get(rank, 0) < began + BEAT]
        gone = [rank for rank in gone if not self._beats.get(rank, {}).get("done")]
        if self._found is None and self._broken is None and gone:
            self._leave(f"{self._name(gone)} is gone: killed from outside, by the system for want of memory, or ended")
        return self._found or (self._first_node_is_lost() if self._broken else self._cause())

    # ------------------------------------------------------------ the thread that talks

    def _beat(self) -> None:
        assert self._store is not None
        beat = {"n": time.monotonic(), "came": self._came, "at": self._at, "done": self._leaving}
        self._store.set(f"beat/{self.place.rank}", json.dumps(beat))

    def _talk(self) -> None:
        assert self._store is not None
        known: set[int] = set()
        try:
            while True:
                with self._lock:
                    self._beat()
                    if self._found is None and self._store.check([FOUND]):
                        self._found = self._store.get(FOUND).decode()
                    wanted = self._places if self._everyone else [0]
                    known |= {rank for rank in wanted if rank not in known and self._store.check([f"beat/{rank}"])}
                    asked = sorted(known.intersection(wanted))
                    for rank, beat in zip(asked, self._store.multi_get([f"beat/{r}" for r in asked]), strict=True):
                        self._hear(rank, json.loads(beat))
                self._answered = time.monotonic()
                if self._done.wait(BEAT):
                    return
        except (dist.DistError, RuntimeError, ValueError) as error:
            self._broken = str(error).splitlines()[0]

    def _hear(self, rank: int, beat: dict[str, object]) -> None:
        now, before = time.monotonic(), self._beats.get(rank, {})
        if before.get("n") != beat["n"]:
            self._changed[rank] = now
        if before.get("came") != beat["came"]:
            self._moved[rank] = now
        self._beats[rank] = beat

    def _leave(self, cause: str) -> None:
        """Tell the others, if the store still takes it; the first cause stays."""

        def put() -> None:
            assert self._store is not None
            with suppress(dist.DistError, RuntimeError), self._lock:
                if not self._store.check([FOUND]):
                    self._store.set(FOUND, cause)

        teller = threading.Thread(target=put, daemon=True)  # a store that is gone may hold it for ever
        teller.start()
        teller.join(2 * BEAT)
        self._found = self._found or cause

    # ------------------------------------------------------------ the thread that judges

    def _judge(self) -> None:
        while not self._done.wait(BEAT / 2):
            cause = self._found
            if cause is None:
                cause = self._cause()
                if cause is None:
                    continue
                self._leave(cause)
            # A cause of the main thread's own, or the same one seen there, is told by it.
            if not self._done.wait(2 * BEAT):
                self._end(cause)

    def _cause(self) -> str | None:
        now = time.monotonic()
        waited = now - self._answered
        if waited > self.silence or (self._broken and waited > NOTICE * BEAT):
            return self._first_node_is_lost()
        awake = {rank: beat for rank, beat in self._heard() if rank != self.place.rank}
        silent = [rank for rank in awake if now - self._changed[rank] > self.silence]
        if silent and waited < 2 * BEAT:
            return (
                f"{self._name(silent)} has not been heard of for {self.silence:.0f} s: it was killed or stopped, or "
                "its node cannot be reached"
            )
        if self.place.rank == 0:
            return self._hanging(now)
        return None

    def _heard(self) -> list[tuple[int, dict[str, object]]]:
        """The newest beat of each rank that has not ended. A list at once: the other thread may add one meanwhile."""
        return [(rank, beat) for rank, beat in list(self._beats.items()) if not beat["done"]]

    def _first_node_is_lost(self) -> str:
        return (
            f"node 0, whose launcher keeps the ranks together at {self.place.address}, has not answered for "
            f"{time.monotonic() - self._answered:.0f} s: it has ended or cannot be reached"
        )

    def _hanging(self, now: float) -> str | None:
        """Who keeps the others waiting. Before all have begun to train they prepare, each at its own pace."""
        came = {rank: int(str(beat["came"])) for rank, beat in self._heard()}
        if len(came) < 2 or min(came.values()) == 0:
            return None
        behind = [rank for rank, count in came.items() if count < max(came.values())]
        if not behind or now - max(list(self._moved.values())) < self.patience:
            return None
        return (
            f"{self._name(behind)} has not gone on from {self._beats[behind[0]]['at']} for {self.patience:.0f} s, and "
            "the others wait for it (train.timeout)"
        )

    def _name(self, ranks: list[int]) -> str:
        """Ranks by name; a node whose ranks are all among them, as that node."""
        nodes: dict[int, list[Place]] = defaultdict(list)
        for place in self._places.values():
            nodes[place.node].append(place)
        names = []
        for node, members in nodes.items():
            found = [place for place in members if place.rank in ranks]
            if found and len(nodes) > 1 and len(found) == len(members):
                which = ", ".join(str(place.rank) for place in found)
                names.append(f"node {node} ({found[0].host}, rank{'s' * (len(found) > 1)} {which})")
            else:
                names += [str(place) for place in found]
        return " and ".join(names)

    def _end(self, cause: str) -> NoReturn:
        say(
            f"rank {self.place.rank}: the run ends: {cause}. What was logged and the last checkpoint stay; "
            "the same command continues."
        )
        sys.stdout.flush()
        os._exit(1)


def silence(patience: float) -> float:
    """Seconds without a beat after which a rank is given up: a tenth of train.timeout, at least ten."""
    return max(patience / 10, min(10.0, patience))


def lost_peer(error: BaseException) -> bool:
    """Whether an error says no more than that a collective failed, which is somebody else's doing."""
    if isinstance(error, dist.DistError):
        return True
    words = r"gloo|NCCL|Connection (closed|reset)|Broken pipe|Timed out waiting|Socket Timeout"
    return isinstance(error, RuntimeError) and re.search(words, str(error)) is not None


def say(sentence: str) -> None:
    """On the screen, and in the launcher's own table of what failed."""
    print(sentence, file=sys.stderr, flush=True)
    tell_launcher(sentence)


def tell_launcher(sentence: str) -> None:
    """Have torch's launcher show the sentence as what this rank failed of."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        told = {
            "message": {
                "message": sentence,
                "extraInfo": {"py_callstack": sentence, "timestamp": str(int(time.time()))},
            }
        }
        with suppress(OSError), open(file, "w", encoding="utf-8") as out:
            json.dump(told, out)


def connect(place: Place, seconds: float, keep: bool = False) -> dist.TCPStore:
    """A connection of our own to the store at place.address; `keep`: this process keeps the store. Raises RecipeError.

    Its own, because a blocking call holds the connection that it is made on.
    """
    host, _, port = place.address.rpartition(":")
    try:
        return dist.TCPStore(
            host.strip("[]"),
            int(port),
            is_master=keep,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistError, RuntimeError) as error:
        why = "cannot be opened here" if keep else "cannot be reached"
        raise RecipeError(
            [
                f"the store of node 0 at {place.address} {why} within {seconds:.0f} s, as {place} found "
                f"({str(error).splitlines()[0].rstrip('.')}); check the address, the port, firewalls, and that node 0 "
                "runs."
            ]
        ) from None
