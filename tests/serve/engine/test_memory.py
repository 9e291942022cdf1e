"""The size of the cache: as asked, or what fits and a sentence; and a lack of memory is known as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serve.engine import memory
from serve.engine.messages import EngineConfig

BLOCK = 4096  # bytes of a block of 16 tokens


def size(sides: int = 1, **flags: object) -> tuple[int, int, str | None]:
    return memory.size_cache(256, BLOCK, EngineConfig(folder="", **flags), "cpu", sides=sides)  # type: ignore[arg-type]


def test_the_cache_is_as_large_as_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**12)
    assert size(max_num_seqs=4) == (256, 4 * 16 + 1, None)
    assert size(max_num_seqs=4, max_model_len=100) == (100, 4 * 7 + 1, None)
    assert size(kv_cache_memory_bytes=20 * BLOCK) == (256, 20, None)
    assert size(sides=2, max_num_seqs=4) == (256, 4 * 32 + 1, None)  # a source and a target


def test_a_small_memory_shortens_the_context_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(5 * BLOCK / memory.FREE_SHARE) + 1)
    longest, blocks, note = size()
    assert (longest, blocks) == (64, 5)
    assert size(sides=2)[:2] == (32, 5)
    assert note == "max_model_len is 64 and not the model's 256: the memory that is free holds no more."
    longest, blocks, note = size(max_model_len=100)
    assert (longest, blocks) == (64, 5)
    assert note == "max_model_len is 64 and not the 100 of --max-model-len: the memory that is free holds no more."


def test_a_cache_larger_than_the_memory_becomes_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10 * BLOCK)
    assert size(kv_cache_memory_bytes=50 * BLOCK) == (
        128,
        9,
        f"The cache has {9 * BLOCK} bytes and not {50 * BLOCK}, as --kv-cache-memory-bytes {50 * BLOCK} asks: only "
        f"{10 * BLOCK} bytes of memory are free. max_model_len is 128 and not the model's 256: the memory that is "
        "free holds no more.",
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"max_model_len": 257}, "--max-model-len is 257; the model was made for 256 tokens at most."),
        (
            {"max_model_len": 256, "kv_cache_memory_bytes": 5 * BLOCK},
            f"A sequence of 256 tokens needs a cache of {17 * BLOCK} bytes and --kv-cache-memory-bytes {5 * BLOCK} "
            f"allows {5 * BLOCK}: pass --kv-cache-memory-bytes {17 * BLOCK}, or --max-model-len 64.",
        ),
        (
            {"kv_cache_memory_bytes": BLOCK},
            f"A sequence of 256 tokens needs a cache of {17 * BLOCK} bytes and --kv-cache-memory-bytes {BLOCK} "
            f"allows {BLOCK}: pass --kv-cache-memory-bytes {17 * BLOCK}.",
        ),
    ],
)
def test_what_cannot_be_says_what_would(flags: dict[str, int], said: str) -> None:
    with pytest.raises(memory.SetupError) as error:
        size(**flags)
    assert str(error.value) == said


def test_a_source_is_never_longer_than_a_step() -> None:
    config = EngineConfig(folder="", max_num_batched_tokens=100)
    assert memory.step_budget(256, config, whole=False) == (100, None)
    assert memory.step_budget(100, config, whole=True) == (100, None)
    budget, note = memory.step_budget(256, config, whole=True)
    assert budget == 256
    assert note == "max_num_batched_tokens is 256 and not 100: a source is read in one step."


def test_free_memory_is_what_the_machine_has() -> None:
    assert 2**20 < memory.free_bytes("cpu") < 2**50


def test_a_control_group_may_have_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    whole = memory.free_bytes("cpu")
    files = {"memory.max": "5000000\n", "memory.current": "3000000\n", "memory.stat": "anon 1\ninactive_file 700000\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert memory.free_bytes("cpu") == 2_700_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes("cpu") == pytest.approx(whole, rel=0.5)


def test_a_lack_of_memory_is_known_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**55, dtype=torch.int8)
    assert memory.ran_out(error.value)
    assert memory.ran_out(MemoryError())
    assert not memory.ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not memory.ran_out(ValueError("DefaultCPUAllocator"))
