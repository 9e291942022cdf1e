"""Choosing and loading the compiled kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.engine import kernels
from serve.engine.kernels import library

needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no kernels were built")


def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEED_KERNELS", "off")
    assert kernels.current() is None
    assert kernels.available() is None


def test_a_variant_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEED_KERNELS", "sse9")
    with pytest.raises(
        ValueError, match=r"HEED_KERNELS is 'sse9'; it can be off, avx512bf16, avx512fp16, avx512, avx2, portable\."
    ):
        kernels.current()


@needs_kernels
def test_the_variant_asked_for_is_taken_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEED_KERNELS", "portable")
    assert kernels.available() == "portable"


@needs_kernels
def test_the_best_is_one_that_the_processor_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEED_KERNELS", raising=False)
    loaded = kernels.current()
    assert loaded is not None
    assert library.NEEDS[loaded.variant] <= library._cpu_flags()


@needs_kernels
def test_a_processor_without_the_instructions_gets_a_lesser_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEED_KERNELS", raising=False)
    monkeypatch.setattr(library, "_cpu_flags", lambda: frozenset({"sse2"}))
    library.load.cache_clear()
    try:
        assert kernels.available() == "portable"
    finally:
        library.load.cache_clear()


@pytest.mark.parametrize(("slow", "first"), [(True, "avx512fp16"), (False, "avx512bf16")])
def test_pairs_of_bfloat16_are_multiplied_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, slow: bool, first: str
) -> None:
    monkeypatch.setattr(library, "pairs_are_slow", lambda: slow)
    order = library.best_first()
    assert order[0] == first
    assert sorted(order) == sorted(library.NEEDS)
    assert order[-2:] == ["avx2", "portable"]
    assert not slow or order.index("avx512") < order.index("avx512bf16")


@needs_kernels
def test_there_is_one_openmp_in_the_process() -> None:
    kernels.current()
    lines = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in lines if "libgomp" in line}) == 1


@needs_kernels
def test_a_library_of_other_sources_is_refused_with_what_to_do(tmp_path: Path) -> None:
    loaded = kernels.current()
    assert loaded is not None
    library._check_sources(loaded.call, tmp_path / "library.so")  # a wheel has no sources
    (tmp_path / "attention.c").write_text("// other\n")
    with pytest.raises(ValueError, match="run `make install`"):
        library._check_sources(loaded.call, tmp_path / "library.so")
