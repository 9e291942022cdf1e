"""What a training process is among the others: ranks, device, threads, memory. Accelerate underneath."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from lm.cpu import cpu_info
from lm.linear import bf16_is_fast
from train import preflight
from train.config import Recipe, RecipeError, check_launch
from train.watch import Watch, lost_peer

Made = TypeVar("Made")


class Abandoned(Exception):
    """What is being computed is not needed any more: a rank was asked to stop."""


@dataclass
class Launch:
    """One rank: its Accelerator, and what the loop asks of it."""

    accelerator: Accelerator
    rank: int
    world: int
    device: torch.device
    fsdp2: bool
    watch: Watch = field(default_factory=lambda: Watch(preflight.place()))  # of the other ranks: around the training
    store: torch.distributed.Store | None = None  # what the ranks share; None of one process
    stopping: Callable[[], bool] = lambda: False  # whether this rank has been asked to stop

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[Any]) -> list[float]:
        """Each number (or scalar tensor) summed over the ranks, as Python floats; every rank calls it."""
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in values])
        if self.world > 1:
            self.watch.arrive()
            stacked = stacked.to(self.device)
            torch.distributed.all_reduce(stacked)
        return stacked.tolist()

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return self.sum([float(flag)])[0] > 0 if self.world > 1 else flag

    def check(self) -> None:
        """Raise Abandoned, on every rank, if any of them has been asked to stop. Every rank calls it."""
        if self.any(self.stopping()):
            raise Abandoned

    def alone(self, work: Callable[[Callable[[], None]], Made]) -> Made | None:
        """What `work(check)` makes on the main rank, while the others wait; None on these. Every rank calls it.

        work calls `check()` between its parts, however many they are. Raises Abandoned, on every rank, there or at the
        end, if any of them has been asked to stop.
        """

        def check() -> None:
            self._part(last=False)

        if self.main:
            made = work(check)
            self._part(last=True)
            return made
        while not self._part(last=False):
            pass
        return None

    def _part(self, last: bool) -> bool:
        """A part of the main rank's work alone is done; whether it was the last, which the main rank says."""
        stop, ended = self.sum([self.stopping(), last])
        if stop:
            raise Abandoned
        return ended > 0

    def agree(self, name: str, **facts: Any) -> None:
        """Refuse to go on where a rank has found another fact than rank 0, in what is called `name`. Every rank calls
        it, whenever it has found its own. Raises RecipeError."""
        if self.store is not None:
            facts = {key.replace("_", " "): fact for key, fact in facts.items()}
            preflight.meet(self.store, self.watch.place, name, facts, None)


def settle(recipe: Recipe) -> Recipe:
    """The recipe with train.dtype auto made what is fastest here: the run's config.yaml says which it was."""
    if recipe.train.dtype != "auto":
        return recipe
    fast = bf16_is_fast("cuda" if _on_gpu() else "cpu")
    return replace(recipe, train=replace(recipe.train, dtype="bf16" if fast else "fp32"))


def _on_gpu() -> bool:
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")


def start(recipe: Recipe) -> Launch:
    """Set the process up as the launcher's environment says: the ranks find each other, see that they are the same
    program, and begin to watch each other. Raises RecipeError for what cannot run here."""
    on_gpu = _on_gpu()
    watch, store = preflight.begin(recipe)
    # Longer than the watch is patient: it knows who is missing, and a collective that timed out does not.
    patience = timedelta(seconds=recipe.train.timeout + 15)
    try:
        accelerator = Accelerator(
            cpu=not on_gpu,
            mixed_precision="bf16" if recipe.train.dtype == "bf16" else "no",
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=patience),
            ],
        )
    except ValueError as error:  # a half-set environment, such as WORLD_SIZE without MASTER_ADDR
        why = str(error).splitlines()[0]
        raise RecipeError([f"Accelerate cannot start ({why}); launch with a file from configs/accelerate/."]) from None
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        raise RecipeError([preflight.unconnected(watch.place, error)]) from None
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != accelerator.num_processes:
        raise RecipeError(
            [
                f"WORLD_SIZE is {asked} and Accelerate sees {accelerator.num_processes} process(es); "
                "each would train alone into one folder. Launch with a file from configs/accelerate/."
            ]
        )
    fsdp2 = bool(getattr(accelerator, "is_fsdp2", False))
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes") and not fsdp2:
        raise RecipeError(
            ["the launcher asks for FSDP; it must be version 2, on GPUs. Launch without it, or with DDP."]
        )
    check_launch(recipe, fsdp2)
    _check_share(recipe, accelerator.num_processes, fsdp2)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not on_gpu or recipe.train.threads:
        # The launcher sets OMP_NUM_THREADS=1, which would leave all cores but one idle.
        torch.set_num_threads(recipe.train.threads or max(1, cores() // local))
    if not on_gpu:
        keep_memory()
    else:
        torch.backends.cuda.matmul.allow_tf32 = True
    return Launch(
        accelerator, accelerator.process_index, accelerator.num_processes, accelerator.device, fsdp2, watch, store
    )


def _check_share(recipe: Recipe, world: int, fsdp2: bool) -> None:
    """Every rank needs a sequence of each batch; under FSDP2 equally many, as its forward is a collective."""
    if recipe.data.has_pairs:
        return  # a rank without a pair computes one whose targets do not count
    sequences = recipe.batch_tokens // recipe.model.context
    batch = f"train.batch_tokens is {recipe.train.batch_tokens}, which is {sequences} sequence(s)"
    if world > sequences:
        raise RecipeError([f"{batch}; {world} processes need at least {world * recipe.model.context}."])
    if fsdp2 and sequences % world:
        raise RecipeError([f"{batch}; FSDP2 needs a number of them that its {world} processes can share evenly."])


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_memory() -> None:
    """Tell glibc to keep freed memory for the next step. By default each large tensor is mapped afresh, and the kernel
    zeroes its pages one fault at a time. A no-op where the C library is another."""
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's, for the log and for the peak that MFU is a share of."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_info("model name") or platform.processor() or platform.machine()


def memory_gib(device: torch.device) -> float:
    """The most memory this process has held: on the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    import resource

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20 if platform.system() != "Darwin" else kib / 2**30


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make what is random inside update `step` (dropout) a function of (seed, step, rank): nothing to save, nothing
    to restore.
    """
    torch.manual_seed(((seed * 1_000_003 + step) * 4_099 + rank) % 2**63)
