"""Finds, chooses and loads the compiled kernels.

setup.py compiles the C files of this folder once for each instruction set: `_portable`, `_avx2`, `_avx512`,
`_avx512fp16`, `_avx512bf16`. The best of them that was built and that this processor can run is loaded, with ctypes (on
Intel's `_avx512fp16`, and even `_avx512`, are better than `_avx512bf16`: lm/cpu.py). Kernels take pointers, sizes and
strides, and know neither Python nor torch.

To add a function: write it in a C file here (marked API, named heed_*), give its parameters in SIGNATURES, and call it
as `kernels.call.heed_name(...)`; a pointer is `tensor.data_ptr()`. Functions return nothing. They check nothing: the
Python that wraps them checks dtype, device, shape and strides, once where it can.

HEED_KERNELS=off does without them, HEED_KERNELS=portable|avx2|avx512|avx512fp16|avx512bf16 takes that variant or none.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from lm.cpu import cpu_info, pairs_are_slow

# What each variant needs of the processor, best first. Names as Linux spells them in /proc/cpuinfo.
AVX2 = frozenset({"avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
NEEDS: dict[str, frozenset[str]] = {
    "avx512bf16": AVX512 | {"avx512_bf16"},
    "avx512fp16": AVX512 | {"avx512_fp16"},
    "avx512": AVX512,
    "avx2": AVX2,
    "portable": frozenset(),
}

POINTER, INT, FLOAT = c_void_p, c_int64, c_float  # an INT is int64_t in C
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "heed_attend": (POINTER, POINTER),  # attention.py: Step, Layer
    # Decoder (layers.py), Step (attention.py), cells, x, table, rows, qkv, mixed, inner, scratch, wanted, count, last
    "heed_decode": (*(POINTER,) * 5, INT, *(POINTER,) * 5, INT, POINTER),
    # x, out, weight, bias, rows, width, eps, centred, is_bf16
    "heed_norm": (POINTER, POINTER, POINTER, POINTER, INT, INT, FLOAT, INT, INT),
    # qkv, table, q_norm, k_norm, rows, stride, q_heads, k_heads, dim, eps, is_bf16
    "heed_rotate": (POINTER, POINTER, POINTER, POINTER, INT, INT, INT, INT, INT, FLOAT, INT),
    "heed_activate": (POINTER, POINTER, INT, INT, INT, INT),  # x, out, rows, inner, kind, is_bf16
    "heed_softcap": (POINTER, INT, FLOAT),  # x, count, cap
    "heed_pack": (POINTER, INT, INT, INT, POINTER, INT, INT),  # matrix, outputs, inputs, is_bf16, packed, first, apart
    # FloatMap (linears.py), x, residual, out, rows, scratch
    "heed_linear": (POINTER, POINTER, POINTER, POINTER, INT, POINTER),
    # matrix, outputs, inputs, is_bf16, packed, scales, first, apart
    "heed_int8_pack": (POINTER, INT, INT, INT, POINTER, POINTER, INT, INT),
    # Map (quantize.py), x, residual, out, rows, scratch, x_is_bf16, out_is_bf16
    "heed_int8_linear": (POINTER, POINTER, POINTER, POINTER, INT, POINTER, INT, INT),
}


@dataclass(frozen=True)
class Kernels:
    """One loaded library. `call` has a function for each of SIGNATURES."""

    variant: str
    call: Any


def available() -> str | None:
    """The variant that `current` takes, or None where there is none."""
    kernels = current()
    return kernels.variant if kernels else None


def current() -> Kernels | None:
    """The kernels to use: the best variant, or what HEED_KERNELS says."""
    wanted = os.environ.get("HEED_KERNELS", "")
    if wanted == "off":
        return None
    for variant in [wanted] if wanted else best_first():
        if kernels := load(variant):
            return kernels
    return None


def best_first() -> list[str]:
    """The variants as `current` tries them."""
    order = list(NEEDS)
    if pairs_are_slow():  # and halves are not, nor weights that are widened as they are read
        order.remove("avx512bf16")
        order.insert(order.index("avx2"), "avx512bf16")
    return order


@functools.cache
def load(variant: str) -> Kernels | None:
    """This variant, or None where it was not built or where the processor or the linker refuses it.

    Raises ValueError where there is no such variant, and where it was built from other sources than those beside it.
    """
    if variant not in NEEDS:
        raise ValueError(f"HEED_KERNELS is {variant!r}; it can be off, {', '.join(NEEDS)}.")
    if not NEEDS[variant] <= _cpu_flags():
        return None
    for suffix in EXTENSION_SUFFIXES:
        file = Path(__file__).with_name(f"_{variant}{suffix}")
        if not file.is_file():
            continue
        try:
            _share_openmp()
            library = ctypes.CDLL(str(file))
            _check_sources(library, file)
            for name, parameters in SIGNATURES.items():
                function = getattr(library, name)
                function.argtypes, function.restype = parameters, None
        except OSError:  # no OpenMP of torch's to resolve its names in
            return None
        return Kernels(variant, library)
    return None


def _check_sources(library: ctypes.CDLL, file: Path) -> None:
    """Raises ValueError where the C files beside a library, if any, are not those that it was built from: what its
    functions are called with may have changed since.
    """
    files = [*sorted(file.parent.glob("*.c")), *sorted(file.parent.glob("*.h"))]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in files)).hexdigest()
    tell = getattr(library, "heed_sources", None)
    if tell is not None:
        tell.restype = ctypes.c_char_p
    if files and (tell is None or tell() != digest.encode()):
        raise ValueError("The C kernels were compiled from other sources than those that are here: run `make install`.")


def _cpu_flags() -> frozenset[str]:
    return frozenset(cpu_info("flags").split())


def _share_openmp() -> None:
    """Makes torch's OpenMP the one that the kernels use, by making its names visible to what is loaded next.

    A wheel has it as torch/lib/libgomp.so.1, or with a hash in its name and perhaps in torch.libs; a distribution's
    torch uses the system's. What is loaded already is what torch uses.
    """
    import torch  # loads it

    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    files = {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line.rsplit("/", 1)[-1]}
    near = str(Path(torch.__file__).parent)
    for file in sorted(files, key=lambda file: not file.startswith(near))[:1]:
        ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)
