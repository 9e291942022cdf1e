"""The CPU kernels: plain C, compiled when the project is installed, chosen by what the processor can do."""

from __future__ import annotations

from serve.engine.kernels.library import Kernels, available, current, load

__all__ = ["Kernels", "available", "current", "load"]
