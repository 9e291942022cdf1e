"""Heed's models, and all that is needed to run one. Knows nothing of training or HTTP.

The names below are looked up when they are asked for: a process that needs `lm.tokenizer` or `lm.params` alone loads
no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lm import hf

if TYPE_CHECKING:
    from lm.config import ConfigError, DecoderConfig
    from lm.decoder import DecoderLM
    from lm.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["ConfigError", "DecoderConfig", "DecoderLM", "SamplingParams", "__version__"]

_HOMES = {
    "ConfigError": "lm.config",
    "DecoderConfig": "lm.config",
    "DecoderLM": "lm.decoder",
    "SamplingParams": "lm.params",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lm' has no attribute {name!r}")


hf.install()  # costs nothing until somebody imports transformers' Auto classes
