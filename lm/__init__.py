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
    from lm.rnnsearch import RNNSearch
    from lm.rnnsearch_config import RNNSearchConfig
    from lm.transformer import Transformer
    from lm.transformer_config import TransformerConfig

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "DecoderConfig",
    "DecoderLM",
    "RNNSearch",
    "RNNSearchConfig",
    "SamplingParams",
    "Transformer",
    "TransformerConfig",
    "__version__",
]

_HOMES = {
    "ConfigError": "lm.config",
    "DecoderConfig": "lm.config",
    "DecoderLM": "lm.decoder",
    "RNNSearch": "lm.rnnsearch",
    "RNNSearchConfig": "lm.rnnsearch_config",
    "SamplingParams": "lm.params",
    "Transformer": "lm.transformer",
    "TransformerConfig": "lm.transformer_config",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lm' has no attribute {name!r}")


hf.install()  # costs nothing until somebody imports transformers' Auto classes
