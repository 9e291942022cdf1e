"""Heed's models, and all that is needed to run one. Knows nothing of training or HTTP."""

from __future__ import annotations

from lm.config import ConfigError, DecoderConfig
from lm.decoder import DecoderLM
from lm.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["ConfigError", "DecoderConfig", "DecoderLM", "SamplingParams", "__version__"]
