"""What the engine makes of a folder and the flags: dtype, cache, EOS; and the sentence where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lm.tokenizer import Tokenizer
from serve.engine import build
from serve.engine.messages import EngineConfig
from serve.engine.pages import Pages

BLOCK = Pages.bytes_per_block(layers=2, kv_heads=2, dim=16, size=16, dtype=torch.float32)


def size(sides: int = 1, **flags: object) -> tuple[int, int, str | None]:
    return build.size_cache(256, BLOCK, EngineConfig(folder="", **flags), "cpu", sides=sides)  # type: ignore[arg-type]


def test_the_cache_is_as_large_as_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "free_bytes", lambda device: 10**12)
    assert size(max_num_seqs=4) == (256, 4 * 16 + 1, None)
    assert size(max_num_seqs=4, max_model_len=100) == (100, 4 * 7 + 1, None)
    assert size(kv_cache_memory_bytes=20 * BLOCK) == (256, 20, None)
    assert size(sides=2, max_num_seqs=4) == (256, 4 * 32 + 1, None)  # a source and a target


def test_a_small_memory_shortens_the_context_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "free_bytes", lambda device: int(5 * BLOCK / build.FREE_SHARE) + 1)
    longest, blocks, note = size()
    assert (longest, blocks) == (64, 5)
    assert size(sides=2)[:2] == (32, 5)
    assert note == "max_model_len is 64 and not the model's 256: the memory that is free holds no more."


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
    with pytest.raises(build.SetupError) as error:
        size(**flags)
    assert str(error.value) == said


def test_a_source_is_never_longer_than_a_step() -> None:
    config = EngineConfig(folder="", max_num_batched_tokens=100)
    assert build.step_budget(256, config, whole=False) == (100, None)
    assert build.step_budget(100, config, whole=True) == (100, None)
    budget, note = build.step_budget(256, config, whole=True)
    assert budget == 256
    assert note == "max_num_batched_tokens is 256 and not 100: a source is read in one step."


def test_free_memory_is_what_the_machine_has() -> None:
    assert 2**20 < build.free_bytes("cpu") < 2**50


def folder(path: Path, **config: object) -> str:
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def test_dtype_is_the_folders_where_the_machine_is_fast_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = folder(tmp_path, dtype="bfloat16")
    assert build.choose_dtype("float16", half, "cpu") == (torch.float16, None)
    assert build.choose_dtype("auto", half, "cuda") == (torch.bfloat16, None)
    monkeypatch.setattr(build, "bf16_is_fast", lambda device: True)
    assert build.choose_dtype("auto", half, "cpu") == (torch.bfloat16, None)
    monkeypatch.setattr(build, "bf16_is_fast", lambda device: False)
    dtype, note = build.choose_dtype("auto", half, "cpu")
    assert dtype == torch.float32
    assert note is not None
    assert "bfloat16" in note
    assert build.choose_dtype("auto", folder(tmp_path, torch_dtype="float32"), "cpu") == (torch.float32, None)
    assert build.choose_dtype("auto", folder(tmp_path), "cpu") == (torch.float32, None)


def test_eos_is_the_tokenizers_then_the_folders(tmp_path: Path, tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_id
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, eos, 10**9]}))
    assert build.eos_token_ids(folder(tmp_path, eos_token_id=6), tokenizer, tokenizer.vocab_size) == [eos, 5, 6]
    bare = Tokenizer(tokenizer.inner)
    (tmp_path / "generation_config.json").unlink()
    assert build.eos_token_ids(folder(tmp_path), bare, tokenizer.vocab_size) == []
