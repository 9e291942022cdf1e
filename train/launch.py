"""What a training process is among the others: ranks, device, threads, memory. Accelerate underneath."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from lm.linear import bf16_is_fast
from train.config import Recipe, RecipeError, check_launch


@dataclass
class Launch:
    """One rank: its Accelerator, and what the loop asks of it."""

    accelerator: Accelerator
    rank: int
    world: int
    device: torch.device
    fsdp2: bool

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[Any]) -> list[float]:
        """Each number (or scalar tensor) summed over the ranks, as Python floats; every rank calls it."""
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in values])
        if self.world > 1:
            stacked = stacked.to(self.device)
            torch.distributed.all_reduce(stacked)
        return stacked.tolist()

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return self.sum([float(flag)])[0] > 0 if self.world > 1 else flag

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def settle(recipe: Recipe) -> Recipe:
    """The recipe with train.dtype auto made what is fastest here: the run's config.yaml says which it was."""
    if recipe.train.dtype != "auto":
        return recipe
    fast = bf16_is_fast("cuda" if _on_gpu() else "cpu")
    return replace(recipe, train=replace(recipe.train, dtype="bf16" if fast else "fp32"))


def _on_gpu() -> bool:
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")


def start(recipe: Recipe) -> Launch:
    """Set the process up as the launcher's environment says. Raises RecipeError for what cannot run here."""
    on_gpu = _on_gpu()
    try:
        accelerator = Accelerator(
            cpu=not on_gpu,
            mixed_precision="bf16" if recipe.train.dtype == "bf16" else "no",
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    except ValueError as error:  # a half-set environment, such as WORLD_SIZE without MASTER_ADDR
        why = str(error).splitlines()[0]
        raise RecipeError([f"Accelerate cannot start ({why}); launch with a file from configs/accelerate/."]) from None
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
    return Launch(accelerator, accelerator.process_index, accelerator.num_processes, accelerator.device, fsdp2)


def _check_share(recipe: Recipe, world: int, fsdp2: bool) -> None:
    """Every rank needs a sequence of each batch; under FSDP2 equally many, as its forward is a collective."""
    sequences = recipe.train.batch_tokens // recipe.model.context
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
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
