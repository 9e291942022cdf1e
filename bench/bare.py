"""What runs on a machine that has torch and transformers, and not all else that Heed needs.

    python -m bench.bare pytest tests/serve/engine/test_gpu.py

runs a module with a stand-in for msgspec where that is missing: the engine's messages are its structs, and inside one
process, where nothing is packed, dataclasses do. Machines with GPUs often have an image of their own and no network.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import runpy
import sys
import types
from dataclasses import dataclass, field
from typing import Any


class Struct:
    """A dataclass for each class derived from it; options of packing are taken and mean nothing."""

    def __init_subclass__(cls, *, frozen: bool = False, kw_only: bool = False, **_: Any) -> None:
        for name in inspect.get_annotations(cls):
            value = cls.__dict__.get(name)
            if isinstance(value, (list, dict, set)):  # each instance has its own
                setattr(cls, name, field(default_factory=lambda value=value: copy.copy(value)))  # type: ignore[misc]
        dataclass(frozen=frozen, kw_only=kw_only)(cls)


def without_msgspec() -> None:
    """Lets what follows import msgspec on a machine that lacks it."""
    if importlib.util.find_spec("msgspec") is None:
        module = types.ModuleType("msgspec")
        module.Struct = Struct  # type: ignore[attr-defined]
        sys.modules["msgspec"] = module


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"Which module is to be run?\n{__doc__}")
    without_msgspec()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
