"""What the system says of the processor, and what follows for bfloat16."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def cpu_info(key: str) -> str:
    """A line of /proc/cpuinfo of the first processor, such as "flags"; "" where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key) and ":" in line), "")


def pairs_are_slow() -> bool:
    """Whether AVX512's instruction for pairs of bfloat16 multiplies less in its time than that for floats: on Intel's
    half as much (measured on a Xeon, family 6, model 207: 104 against 207 GFLOP/s a core), on AMD's twice as much. (Its
    instruction for IEEE's 16-bit floats made 400 there.)
    """
    return cpu_info("vendor_id") == "GenuineIntel"
