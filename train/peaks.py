"""What devices can do at most, by their makers' data sheets: the peak that MFU is a share of."""

from __future__ import annotations

import re

# Dense bf16 TFLOP/s (data sheets print twice that where they count structured sparsity), the most specific name first.
# fp32 on NVIDIA means TF32, which the trainer turns on, at half the bf16 rate.
PEAKS = (
    (r"GB200", 2500.0),
    (r"B200", 2250.0),
    (r"GH200", 989.4),
    (r"H200 NVL", 835.5),
    (r"H200", 989.4),
    (r"H100 NVL", 835.5),
    (r"H100 PCIe", 756.0),
    (r"H100|H800", 989.4),
    (r"A100|A800", 312.0),
    (r"A40", 149.7),
    (r"A30", 165.0),
    (r"A10", 125.0),
    (r"L40S", 362.0),
    (r"L40", 181.0),
    (r"L4", 121.0),
    (r"RTX 6000 Ada", 364.2),
    (r"RTX A6000", 154.8),
    (r"RTX 5090", 209.5),
    (r"RTX 4090", 165.2),
    (r"RTX 3090", 71.0),
    (r"MI300X|MI325X", 1307.4),
    (r"MI250X", 191.5),  # one of its two dies, which is what a process sees
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The dense peak of one device in FLOP/s for `dtype` (bf16 | fp32), by its name; None where it is not known.

    A slice of a GPU (MIG), a laptop's version and every CPU are unknown.
    """
    if re.search(r"MIG|Laptop|Max-Q", device_name):
        return None
    for name, peak in PEAKS:
        if re.search(rf"\b(?:{name})\b", device_name, re.IGNORECASE):
            if dtype == "fp32":
                return None if name.startswith("MI") else peak / 2 * 1e12
            return peak * 1e12
    return None
