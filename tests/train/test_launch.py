"""What a process knows of the others, and what is refused before anything is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch

from train import launch
from train.config import RecipeError


@pytest.fixture
def start(tiny):
    """start(*overrides) -> the Launch of this process."""
    from accelerate.state import AcceleratorState

    def begin(*overrides: str) -> launch.Launch:
        AcceleratorState._reset_state(reset_partial_state=True)
        return launch.start(tiny.recipe(*overrides))

    return begin


def test_alone_all_cores_are_ours(start) -> None:
    """The launcher sets OMP_NUM_THREADS=1, which is not what it leaves us with."""
    here = start("train.threads=null")
    assert (here.rank, here.world, here.main, here.fsdp2) == (0, 1, True, False)
    if here.device.type == "cpu":
        assert torch.get_num_threads() == launch.cores() == len(os.sched_getaffinity(0))
    start("train.threads=1")
    assert torch.get_num_threads() == 1


def test_cores_are_shared_among_the_processes_of_a_machine(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cores", lambda: 8)
    for local, threads in (("3", 2), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        start("train.threads=null")
        assert torch.get_num_threads() == threads


def test_sums_and_flags_of_one_rank_are_its_own(start) -> None:
    here = start()
    assert here.sum([1, 2.5, torch.tensor(3.0)]) == [1.0, 2.5, 3.0]
    assert here.any(True)
    assert not here.any(False)
    here.check()


@pytest.mark.parametrize("asked", [None, 0, 2], ids=["nobody", "the main rank", "another"])
def test_what_one_rank_makes_alone_all_give_up_together(asked: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks, as threads; the one that is asked is so after the second of five parts."""
    given, parts = Barrier(3), [0]
    values: dict[int, list[float]] = {}

    def exchange(self: launch.Launch, mine: list[float]) -> list[float]:
        values[self.rank] = [float(value) for value in mine]
        given.wait()
        total = [sum(column) for column in zip(*values.values(), strict=True)]
        given.wait()
        return total

    def work(check: Callable[[], None]) -> str:
        for parts[0] in range(1, 6):
            check()
        return "made"

    def run(rank: int) -> str | None:
        here = launch.Launch(None, rank, 3, torch.device("cpu"), False)  # type: ignore[arg-type]
        here.stopping = lambda: rank == asked and parts[0] >= 2
        try:
            return here.alone(work)
        except launch.Abandoned:
            return "given up"

    monkeypatch.setattr(launch.Launch, "sum", exchange)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, range(3)))
    assert found == (["made", None, None] if asked is None else ["given up"] * 3)
    assert parts[0] <= (5 if asked is None else 3)


def test_processes_that_do_not_know_each_other_are_refused(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Accelerate makes of some launches: two processes of which each believes to be alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "Accelerator", lambda **options: SimpleNamespace(num_processes=1))
    with pytest.raises(RecipeError) as refused:
        start()
    assert refused.value.problems == [
        "WORLD_SIZE is 2 and Accelerate sees 1 process(es); each would train alone into one folder. "
        "Launch with a file from configs/accelerate/."
    ]


def test_more_processes_than_sequences_are_refused(start, monkeypatch: pytest.MonkeyPatch) -> None:
    def processes(number: int, fsdp2: bool = False) -> None:
        here = {"num_processes": number, "process_index": 0, "device": torch.device("cpu"), "is_fsdp2": fsdp2}
        monkeypatch.setenv("WORLD_SIZE", str(number))
        monkeypatch.setattr(launch, "Accelerator", lambda **options: SimpleNamespace(**here))

    for number in (4, 6):
        processes(number)
        assert start().world == number
    processes(7)
    with pytest.raises(RecipeError) as refused:
        start()
    assert refused.value.problems == [
        "train.batch_tokens is 96, which is 6 sequence(s); 7 processes need at least 112."
    ]
    processes(4, fsdp2=True)
    with pytest.raises(RecipeError, match="FSDP2 needs a number of them that its 4 processes can share evenly"):
        start("model.tie_embeddings=false")
    with pytest.raises(RecipeError, match=r"model\.tie_embeddings is true; FSDP2 needs"):
        start()


def test_fsdp_that_would_not_come_about_is_refused(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate drops it without a word where it knows none, on a CPU."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(launch, "Accelerator", lambda **options: SimpleNamespace(num_processes=1, is_fsdp2=False))
    with pytest.raises(RecipeError) as refused:
        start()
    assert refused.value.problems == [
        "the launcher asks for FSDP; it must be version 2, on GPUs. Launch without it, or with DDP."
    ]


def test_what_is_random_is_a_function_of_seed_step_and_rank() -> None:
    def drawn(*arguments: int) -> float:
        launch.seed_step(*arguments)
        return torch.rand(()).item()

    places = [(seed, step, rank) for seed in (0, 1, 2**32 - 1) for step in (0, 1, 2) for rank in (0, 1)]
    values = [drawn(*place) for place in places]
    assert len(set(values)) == len(places)
    assert [drawn(*place) for place in reversed(places)] == values[::-1]


def test_the_device_has_a_name_and_memory_a_size() -> None:
    cpu = torch.device("cpu")
    assert launch.device_name(cpu)
    assert 0.05 < launch.memory_gib(cpu) < 100
