"""The tokenizer that a GGUF file carries, rebuilt: vocabulary, pre-tokenizer by name, special tokens, chat template.

Two kinds are read, under llama.cpp's names for them: gpt2 (byte-level BPE) and llama (SentencePiece's BPE, whose merges
are recovered from the scores). Byte-level BPE is written too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from lm.gguf import GGUF
from lm.tokenizer import Tokenizer, TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPACE = "▁"

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _bytes(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(*expressions: str) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*steps, _bytes(False)])


# How text is cut before the merges, by tokenizer.ggml.pre.
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: _bytes(True),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes(True)]),
    "llama-bpe": lambda: _split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"),
    "qwen2": lambda: _split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"),
    "default": lambda: _split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_OTHER_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "gpt2": "gpt-2"}
_WHOLE_WORDS = ("llama-bpe",)  # a piece that is in the vocabulary is one token, whatever the merges say
_BOS_IN_FRONT = ("llama-bpe",)  # unless tokenizer.ggml.add_bos_token says otherwise


def tokenizer(file: GGUF) -> Tokenizer:
    """The file's tokenizer. Raises TokenizerError."""
    kind = file.metadata.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            inner, bos = _byte_level(file)
        elif kind == "llama":
            inner, bos = _sentencepiece(file)
        else:
            raise TokenizerError(f"tokenizer.ggml.model is {kind!r}; the supported ones are gpt2, llama")
        return _finished(file, inner, bos)
    except TokenizerError as error:
        raise TokenizerError(f"{file.path}: {error}.") from None
    except Exception as error:  # `tokenizers` raises a bare Exception, for a merge of what is no token and the like
        raise TokenizerError(f"{file.path} holds no readable tokenizer: {str(error).splitlines()[0]}.") from None


def _byte_level(file: GGUF) -> tuple[tokenizers.Tokenizer, bool]:
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    name = _OTHER_NAMES.get(name, name) if isinstance(name, str) else name
    if name not in PRE_TOKENIZERS:
        known = ", ".join((*PRE_TOKENIZERS, *_OTHER_NAMES))
        raise TokenizerError(f"tokenizer.ggml.pre is {name!r}; the supported ones are {known}")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _texts(file, "merges"))]
    inner = tokenizers.Tokenizer(models.BPE(_vocabulary(file), merges, ignore_merges=name in _WHOLE_WORDS))
    if name == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = PRE_TOKENIZERS[name]()
    inner.decoder = decoders.ByteLevel()
    return inner, name in _BOS_IN_FRONT


def _sentencepiece(file: GGUF) -> tuple[tokenizers.Tokenizer, bool]:
    vocabulary = _vocabulary(file)
    scores, types = file.metadata.get("tokenizer.ggml.scores"), _types(file)
    if not isinstance(scores, list) or len(scores) != len(vocabulary):
        raise TokenizerError("tokenizer.ggml.scores is no list with a score for each token")
    normal = {token for token, kind in zip(vocabulary, types, strict=True) if kind == NORMAL}
    found = []
    for token, score in zip(vocabulary, scores, strict=True):
        if token in normal:
            pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            found += [
                (-score, vocabulary[left], vocabulary[right], left, right)
                for left, right in pairs
                if left in normal and right in normal
            ]
    merges = [(left, right) for *_, left, right in sorted(found)]  # the best score first
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokens = list(vocabulary)
    model = models.BPE(vocabulary, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=BYTE in types)
    inner = tokenizers.Tokenizer(model)
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    inner.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return inner, True


def _finished(file: GGUF, inner: tokenizers.Tokenizer, bos_in_front: bool) -> Tokenizer:
    """With its special tokens, what is put around a text, and the settings of tokenizer_config.json."""
    tokens, types = _texts(file, "tokens"), _types(file)
    added = [
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    inner.add_tokens(added)
    ids: dict[str, int] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        id = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(id, int) and id < len(tokens):
            ids[name] = id
        elif id is not None:
            raise TokenizerError(f"tokenizer.ggml.{key}_token_id is {id!r}; there are {len(tokens)} tokens")
    around = [
        [name] if name in ids and file.metadata.get(f"tokenizer.ggml.add_{name}_token", default) else []
        for name, default in (("bos", bos_in_front), ("eos", False))
    ]
    if any(around):
        first, last = ([tokens[ids[name]] for name in names] for names in around)
        special = [(tokens[ids[name]], ids[name]) for name in sorted({*around[0], *around[1]})]
        inner.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last], pair=[*first, "$A", *last, "$B:1", *last], special_tokens=special
        )
    settings: dict[str, Any] = {f"{name}_token": tokens[id] for name, id in ids.items()}
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    eos, bos, pad = (ids.get(name) for name in ("eos", "bos", "pad"))
    return Tokenizer(inner, settings, eos_id=eos, bos_id=bos, pad_id=pad)


def _texts(file: GGUF, name: str) -> list[str]:
    texts = file.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TokenizerError(f"tokenizer.ggml.{name} is no list of texts")
    return texts


def _types(file: GGUF) -> list[int]:
    count = len(_texts(file, "tokens"))
    types = file.metadata.get("tokenizer.ggml.token_type", [NORMAL] * count)
    if not isinstance(types, list) or len(types) != count:
        raise TokenizerError("tokenizer.ggml.token_type is no list with a type for each token")
    return types


def _vocabulary(file: GGUF) -> dict[str, int]:
    tokens = _texts(file, "tokens")
    vocabulary = {token: id for id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for id, token in enumerate(tokens) if vocabulary[token] != id)
        raise TokenizerError(f"the token {twice!r} is there twice")
    return vocabulary


# ---------------------------------------------------------------- the way back


def metadata(given: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer, keys without `tokenizer.`; ids up to `vocab_size` that no token has are
    filled up as unused. Raises TokenizerError where GGUF has no such kind."""
    state = json.loads(given.inner.to_str())
    model = state["model"]
    name = next((name for name, make in PRE_TOKENIZERS.items() if _same(make(), state.get("pre_tokenizer"))), None)
    if model["type"] != "BPE" or name is None:
        raise TokenizerError(
            f"The tokenizer is {model['type']} behind a pre-tokenizer that GGUF has no name for; "
            f"what can be written is byte-level BPE cut like {', '.join(PRE_TOKENIZERS)}."
        )
    added = {token["id"]: token for token in state["added_tokens"]}
    by_id = {id: token for token, id in given.inner.get_vocab(with_added_tokens=True).items()}
    if vocab_size < given.vocab_size:
        raise TokenizerError(f"The tokenizer has {given.vocab_size} tokens; the model has room for {vocab_size}.")
    types = []
    for id in range(vocab_size):
        if id in added:
            types.append(CONTROL if added[id]["special"] else USER_DEFINED)
        else:
            types.append(NORMAL if id in by_id else UNUSED)
    around = given.inner.encode("", add_special_tokens=True).ids
    values: dict[str, Any] = {
        "ggml.model": "gpt2",
        "ggml.pre": name,
        "ggml.tokens": [by_id.get(id, f"[PAD{id}]") for id in range(vocab_size)],
        "ggml.token_type": types,
        "ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "ggml.add_bos_token": given.bos_id is not None and around[:1] == [given.bos_id],
        "ggml.add_eos_token": given.eos_id is not None and around[-1:] == [given.eos_id] and len(around) > 1,
    }
    special = {"bos": given.bos_id, "eos": given.eos_id, "padding": given.pad_id}
    values |= {f"ggml.{key}_token_id": id for key, id in special.items() if id is not None}
    if isinstance(given.settings.get("chat_template"), str):
        values["chat_template"] = given.settings["chat_template"]
    return values


def _same(ours: pre_tokenizers.PreTokenizer, theirs: dict[str, Any] | None) -> bool:
    """Whether two pre-tokenizers cut alike; offsets do not count, nor that a sequence of one is that one."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            part = {key: plain(value) for key, value in part.items() if key != "trim_offsets"}
            if part.get("type") == "Sequence" and len(part.get("pretokenizers", [])) == 1:
                return part["pretokenizers"][0]
        return [plain(item) for item in part] if isinstance(part, list) else part

    holder = tokenizers.Tokenizer(models.BPE())
    holder.pre_tokenizer = ours
    return plain(json.loads(holder.to_str())["pre_tokenizer"]) == plain(theirs)
