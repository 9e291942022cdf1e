"""system_fingerprint: what answers say of the software and the settings that they were computed with."""

from __future__ import annotations

import hashlib

import msgspec

from lm import __version__
from serve.engine.messages import EngineConfig, Ready


def fingerprint(mode: str, value: str | None, engine: EngineConfig, ready: Ready) -> str | None:
    """By --fingerprint-mode: the version and a hash of what the engine was told and of how it computes; the text that
    is given (custom); or nothing. One process computes, so that "full" and "hash" are the same here.
    """
    if mode == "none":
        return None
    if mode == "custom":
        return value
    told = msgspec.json.encode([engine, ready.dtype, ready.device, ready.threads], order="sorted")
    return f"heed-{__version__}-{hashlib.sha256(told).hexdigest()[:8]}"
