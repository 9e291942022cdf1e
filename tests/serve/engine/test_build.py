"""What the engine makes of a folder and the flags: dtype and EOS."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lm.tokenizer import Tokenizer
from serve.engine import build


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
    monkeypatch.setattr(build.kernels, "available", lambda: "avx2")  # which widen it as they read
    assert build.choose_dtype("auto", half, "cpu") == (torch.bfloat16, None)
    whole = folder(tmp_path, dtype="bfloat16", is_encoder_decoder=True)
    assert build.choose_dtype("auto", whole, "cpu")[0] == torch.float32
    monkeypatch.setattr(build.kernels, "available", lambda: None)
    half = folder(tmp_path, dtype="bfloat16")
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
