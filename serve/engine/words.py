"""The tokenizer on its way from the engine process, which reads models of every kind, to the API, which never loads
torch.
"""

from __future__ import annotations

import json

import tokenizers

from lm.tokenizer import Tokenizer
from serve.engine.messages import Words


def pack(tokenizer: Tokenizer) -> Words:
    return Words(
        tokenizer=tokenizer.inner.to_str(),
        settings=json.dumps(tokenizer.settings),
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        pad_id=tokenizer.pad_id,
    )


def unpack(words: Words) -> Tokenizer:
    inner = tokenizers.Tokenizer.from_str(words.tokenizer)
    settings = json.loads(words.settings)
    return Tokenizer(inner, settings, eos_id=words.eos_id, bos_id=words.bos_id, pad_id=words.pad_id)
