"""What follows from the processor's maker and instructions."""

from __future__ import annotations

import pytest
import torch

from lm import cpu, linear


@pytest.mark.parametrize(
    ("vendor", "instructions", "fast"),
    [
        ("GenuineIntel", {"avx512_bf16"}, False),
        ("GenuineIntel", {"avx512_bf16", "amx_tile"}, True),
        ("AuthenticAMD", {"avx512_bf16"}, True),
        ("AuthenticAMD", set(), False),
    ],
)
def test_bfloat16_is_fast_where_its_products_beat_those_of_floats(
    monkeypatch: pytest.MonkeyPatch, vendor: str, instructions: set[str], fast: bool
) -> None:
    monkeypatch.setattr(cpu, "cpu_info", lambda key: {"vendor_id": vendor}.get(key, ""))
    monkeypatch.setattr(linear.platform, "machine", lambda: "x86_64")
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in instructions, raising=False)
    assert linear.bf16_is_fast.__wrapped__("cpu") is fast
