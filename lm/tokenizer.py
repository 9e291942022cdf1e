"""Text to token ids and back: byte-level BPE, words and characters, trained here or loaded from a Hugging Face folder.

`tokenizers` does the work. What is ours is the recipe of each kind, a folder that `transformers.AutoTokenizer`, vLLM
and others read to equal ids, and the count of UTF-8 bytes each id stands for, which bits per byte needs.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_CHARACTER = "\x03"  # U+0003 END OF TEXT: one character, so that ids and characters stay equal in number
UNKNOWN = "<unk>"
PAD, BEGIN, END = "<pad>", "<s>", "</s>"  # of a translator: ids 0, 1 and 2


class TokenizerError(ValueError):
    """A folder whose tokenizer cannot be read. The message is one sentence."""


class Tokenizer:
    """Text to ids and back.

    `inner` is the `tokenizers.Tokenizer`; `settings` is what tokenizer_config.json holds. `eos_id`, `bos_id` and
    `pad_id` are None where the tokenizer has no such token.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        settings: dict[str, Any] | None = None,
        *,
        eos_id: int | None = None,
        bos_id: int | None = None,
        pad_id: int | None = None,
    ):
        self.inner = inner
        # PreTrainedTokenizerFast by name: without it transformers picks a class by the model's type, which has its own
        # ideas about spaces and unknown characters. The clean-up would drop spaces before punctuation in decoded text.
        ours = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        self.settings: dict[str, Any] = ours | (settings or {})
        self.eos_id, self.bos_id, self.pad_id = eos_id, bos_id, pad_id
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. A folder's own rule may put BOS in front unless `add_special_tokens` is false."""
        return self.inner.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Iterable[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text; the texts are shared among the machine's cores."""
        encodings = self.inner.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that are no UTF-8, as when ids end within a character, become U+FFFD."""
        return self.inner.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokenizer's canonical JSON: equal for tokenizers that give equal ids for every text."""
        canonical = json.dumps(json.loads(self.inner.to_str()), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def token_bytes(self) -> np.ndarray:
        """int64 [vocab_size]: the UTF-8 bytes that each id stands for; special tokens stand for none."""
        state = json.loads(self.inner.to_str())
        parts = list(_components(state.get("pre_tokenizer"))) + list(_components(state.get("decoder")))
        kinds = {part["type"] for part in parts}
        added = {token["id"]: token for token in state.get("added_tokens", [])}
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, id in self.inner.get_vocab(with_added_tokens=True).items():
            if id in added:
                sizes[id] = 0 if added[id]["special"] else len(token.encode())
            elif "ByteLevel" in kinds:
                sizes[id] = len(token)  # byte-level vocabularies write each byte as one printable character
            elif "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                sizes[id] = 1
            elif token == UNKNOWN:
                sizes[id] = 0
            else:
                sizes[id] = len(token.replace("▁", " ").encode() if "Metaspace" in kinds else token.encode())
        return sizes

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers reads as PreTrainedTokenizerFast."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = dict(self.settings)
        for name, id in (("eos_token", self.eos_id), ("bos_token", self.bos_id), ("pad_token", self.pad_id)):
            if id is not None:
                settings.setdefault(name, self.inner.id_to_token(id))
        self.inner.save(str(folder / "tokenizer.json"))
        text = json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a folder's tokenizer.json, whoever wrote it. Raises TokenizerError.

        EOS, BOS and PAD come from tokenizer_config.json (a token, or an object with its content), else from
        special_tokens_map.json, else as an id from generation_config.json or config.json (the first, of several).
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{folder} has no tokenizer.json, and that is the file a tokenizer is read from.")
        try:
            inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # `tokenizers` raises a bare Exception for a malformed file
            raise TokenizerError(f"{path} is not a tokenizer: {str(error).splitlines()[0]}.") from None
        inner.no_truncation()  # a folder may carry the truncation or padding of its last use
        inner.no_padding()
        settings = _read_json(folder / "tokenizer_config.json")
        template = folder / "chat_template.jinja"
        if template.is_file():
            settings["chat_template"] = template.read_text(encoding="utf-8")
        named = [settings, _read_json(folder / "special_tokens_map.json")]
        numbered = [_read_json(folder / "generation_config.json"), _read_json(folder / "config.json")]

        def special(kind: str) -> int | None:
            for mapping in named:
                token = mapping.get(f"{kind}_token")
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str) and inner.token_to_id(token) is not None:
                    return inner.token_to_id(token)
            for mapping in numbered:
                ids = mapping.get(f"{kind}_token_id")
                id = ids[0] if isinstance(ids, list) and ids else ids
                if isinstance(id, int) and inner.id_to_token(id) is not None:
                    return id
            return None

        return cls(inner, settings, eos_id=special("eos"), bos_id=special("bos"), pad_id=special("pad"))


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    eos: str | None = END_OF_TEXT,
    first: Iterable[str] = (),
    progress: bool = False,
) -> Tokenizer:
    """Learn a byte-level BPE of at most `vocab_size` entries, EOS included (arXiv 1508.07909, over bytes as in GPT-2).

    Every text round-trips exactly, whatever its characters: 256 entries are the bytes. A text too small for
    `vocab_size` gives fewer entries. `texts` is iterated once. `first`: special tokens that stand before EOS. Raises
    ValueError where `vocab_size` does not hold the bytes and the special tokens.
    """
    special = [*first] if eos is None else [*first, eos]
    if vocab_size < 256 + len(special):
        raise ValueError(f"vocab_size is {vocab_size}; it must hold 256 bytes and {len(special)} special tokens.")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner, eos_id=None if eos is None else inner.token_to_id(eos))


def train_characters(texts: Iterable[str], *, eos: str | None = None) -> Tokenizer:
    """A vocabulary of the characters (code points) in `texts`, sorted, after one entry for the unknown.

    len(ids) == len(text) for every text, here and through AutoTokenizer: an unknown character is one UNKNOWN, which is
    an entry of the vocabulary that no text can spell. `eos`, if any, must be one character (END_OF_TEXT_CHARACTER) for
    the same reason; ValueError otherwise.
    """
    if eos is not None and len(eos) != 1:
        raise ValueError(f"eos is {eos!r}; it must be one character, or ids and characters would differ in number.")
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if eos is not None:
        characters.add(eos)
    vocabulary = {token: id for id, token in enumerate([UNKNOWN, *sorted(characters)])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    # [\s\S] and not a dot, which stops at line ends. Fuse joins the pieces without spaces.
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    if eos is not None:
        inner.add_special_tokens([AddedToken(eos, special=True, normalized=False)])
    return Tokenizer(inner, eos_id=None if eos is None else vocabulary[eos])


def train_words(texts: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """A translator's vocabulary of words, what white space divides: the `vocab_size` most frequent (the 30,000 of arXiv
    1409.0473, section 4.1), or all; every other word is UNKNOWN.

    PAD, BEGIN, END and UNKNOWN come first and count. Ids turn back into words with one space between.
    """
    special = [PAD, BEGIN, END, UNKNOWN]
    if vocab_size is not None and vocab_size <= len(special):
        raise ValueError(f"vocab_size is {vocab_size}; it must hold {len(special)} special tokens and a word.")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.split())
    for token in special:
        del counts[token]
    most = None if vocab_size is None else vocab_size - len(special)
    words = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]]
    vocabulary = {token: id for id, token in enumerate(special + words)}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # and no decoder: words are joined by spaces
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special[:3]])
    return Tokenizer(inner, eos_id=vocabulary[END], bos_id=vocabulary[BEGIN], pad_id=vocabulary[PAD])


def train_translator_bpe(texts: Iterable[str], vocab_size: int, *, progress: bool = False) -> Tokenizer:
    """A translator's joint vocabulary: a byte-level BPE of both languages' texts, with PAD, BEGIN and END."""
    tokenizer = train_bpe(texts, vocab_size, eos=END, first=(PAD, BEGIN), progress=progress)
    inner = tokenizer.inner
    return Tokenizer(inner, eos_id=tokenizer.eos_id, bos_id=inner.token_to_id(BEGIN), pad_id=inner.token_to_id(PAD))


def close_sources(tokenizer: Tokenizer, encoder_decoder: bool) -> Tokenizer:
    """The tokenizer whose `encode` of a source is what a translator reads: for an encoder-decoder the source ends with
    EOS; for a decoder-only one BOS divides it from the target, which follows. Raises ValueError where it lacks one.
    """
    for kind, id in (("pad", tokenizer.pad_id), ("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if id is None:
            raise ValueError(f"the tokenizer has no {kind}_token, which a translator needs.")
    id = tokenizer.eos_id if encoder_decoder else tokenizer.bos_id
    assert id is not None
    token = tokenizer.inner.id_to_token(id)
    inner = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    inner.post_processor = processors.TemplateProcessing(single=f"$A {token}", special_tokens=[(token, id)])
    return Tokenizer(
        inner, tokenizer.settings, eos_id=tokenizer.eos_id, bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id
    )


def _components(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A pre-tokenizer or decoder and, where it is a Sequence, what it is made of."""
    if part is None:
        return
    yield part
    for inner in part.get("pretokenizers", []) + part.get("decoders", []):
        yield from _components(inner)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file. Raises TokenizerError for what is not an object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds no JSON object.")
    return content
