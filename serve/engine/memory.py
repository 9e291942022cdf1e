"""How large the cache is: what was asked for, or what fits and a sentence about it; and what running out looks like."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from serve.engine.messages import EngineConfig

# Of the memory that is free when the weights are loaded, the most that the cache takes unless told otherwise,
FREE_SHARE = 0.4
# and the most that it takes if told so: more would leave nothing to compute with.
MOST_SHARE = 0.9
GROUP = Path("/sys/fs/cgroup")  # what the control group may take and takes


class SetupError(ValueError):
    """The engine cannot be as asked: one sentence that says what would do."""


class CacheSize(NamedTuple):
    """The longest sequence, the blocks (with the null block), and a sentence where one might have expected more."""

    max_model_len: int
    blocks: int
    note: str | None


def size_cache(context: int, per_block: int, config: EngineConfig, device: str, *, sides: int = 1) -> CacheSize:
    """The cache that was asked for, or what the free memory allows, in blocks of `per_block` bytes.

    A single sequence of max_model_len tokens always fits (`sides` is 2 for a source and a target of that length): the
    length is shortened to what does, and a sentence says so. Raises SetupError, with what would do, for a length and a
    size that were both asked for and contradict each other, for a length that the model was not made for, and where
    not even a sequence of two tokens fits.
    """
    longest = config.max_model_len or context
    if longest > context:
        raise SetupError(f"--max-model-len is {longest}; the model was made for {context} tokens at most.")
    size, asked, free = config.block_size, config.kv_cache_memory_bytes, free_bytes(device)
    alone = -(-sides * longest // size)  # blocks of the longest sequence; one more is the null block
    notes = []
    flag = f"--kv-cache-memory-bytes {asked}"
    if config.num_gpu_blocks_override is not None:
        flag = f"--num-gpu-blocks-override {config.num_gpu_blocks_override}"
        asked = config.num_gpu_blocks_override * per_block
    if asked is None:
        available, source = int(FREE_SHARE * free), "the memory that is free"
    else:
        available, source = asked, flag
        if config.max_model_len is not None and asked // per_block - 1 < alone:
            raise SetupError(_needed(longest, alone, per_block, source, asked, asked // per_block - 1, size, sides))
        if asked > MOST_SHARE * free:
            available, source = int(MOST_SHARE * free), "the memory that is free"
            notes.append(
                f"The cache has {available} bytes and not {asked}, as {flag} asks: only {free} bytes of memory are "
                "free."
            )
    fits = available // per_block - 1
    blocks = min(fits, alone * config.max_num_seqs)
    if blocks < alone:
        shorter = max(fits, 0) * size // sides
        if shorter < 2:  # a prompt and an answer
            raise SetupError(_needed(longest, alone, per_block, source, available, fits, size, sides))
        whose = "the model's" if config.max_model_len is None else "the"
        whence = "" if config.max_model_len is None else " of --max-model-len"
        notes.append(f"max_model_len is {shorter} and not {whose} {longest}{whence}: {source} holds no more.")
        longest = shorter
    return CacheSize(longest, blocks + 1, " ".join(notes) or None)


def _needed(
    longest: int, alone: int, per_block: int, source: str, available: int, fits: int, size: int, sides: int
) -> str:
    needed, shorter = (alone + 1) * per_block, max(fits, 0) * size // sides
    instead = f", or --max-model-len {shorter}" if shorter >= 2 else ""
    return (
        f"A sequence of {longest} tokens needs a cache of {needed} bytes and {source} allows {available}: "
        f"pass --kv-cache-memory-bytes {needed}{instead}."
    )


def step_budget(max_model_len: int, config: EngineConfig, *, whole: bool) -> tuple[int, str | None]:
    """--max-num-batched-tokens, but never less than the longest source where sources are computed whole."""
    asked = config.max_num_batched_tokens
    if not whole or asked >= max_model_len:
        return asked, None
    return max_model_len, f"max_num_batched_tokens is {max_model_len} and not {asked}: a source is read in one step."


def free_bytes(device: str) -> int:
    """Memory that can still be taken: the device's, or the machine's within the limit of its control group."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    try:
        limit = int((GROUP / "memory.max").read_text())  # or "max", which is none
        used = int((GROUP / "memory.current").read_text())
        # What the group's files take and nobody has read lately is given up when memory is needed.
        spare = re.search(r"^inactive_file (\d+)$", (GROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return free
    return min(free, max(0, limit - used + int(spare[1] if spare else 0)))


def ran_out(error: BaseException) -> bool:
    """Whether an error is a lack of memory. torch's CPU allocator says so in a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "std::bad_alloc" in text)
