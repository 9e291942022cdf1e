"""The C kernels of serve/engine/kernels, one library for each instruction set; everything else is in pyproject.toml.

They are plain C without Python in it, loaded by ctypes (see serve/engine/kernels/library.py); being extensions of the
package lets setuptools compile, place and ship them. Each is optional: without a compiler the engine works on torch.
"""

from __future__ import annotations

import hashlib
import platform
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = "serve/engine/kernels"
SOURCES, HEADERS = sorted(glob(f"{FOLDER}/*.c")), sorted(glob(f"{FOLDER}/*.h"))
# What library.py compares with the files that it finds.
DIGEST = hashlib.sha256(b"".join(Path(file).read_bytes() for file in SOURCES + HEADERS)).hexdigest()
# -fopenmp compiles the pragmas, and nothing links an OpenMP library: the names are resolved in torch's own, so that
# there is one pool of threads. No contraction: where a multiplication and an addition are one operation, the source
# says so, and a result does not depend on what the compiler saw beside it.
FLAGS = ["-std=gnu11", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
VARIANTS: dict[str, list[str]] = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    VARIANTS["avx512"] = [
        *VARIANTS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    ]
    VARIANTS["avx512bf16"] = [*VARIANTS["avx512"], "-mavx512bf16"]
    VARIANTS["avx512fp16"] = [*VARIANTS["avx512"], "-mavx512fp16"]


class BuildVariants(build_ext):
    """Objects of different flags from the same sources must not share a folder."""

    def build_extension(self, ext: Extension) -> None:
        temp = self.build_temp
        self.build_temp = str(Path(temp) / ext.name)
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = temp


setup(
    cmdclass={"build_ext": BuildVariants},
    ext_modules=[
        Extension(
            f"serve.engine.kernels._{variant}",
            sources=SOURCES,
            depends=HEADERS,
            define_macros=[("HEED_SOURCES", f'"{DIGEST}"')],
            extra_compile_args=[*FLAGS, *flags],
            optional=True,
        )
        for variant, flags in VARIANTS.items()
    ],
)
