"""Tokenizers: exact, equal through AutoTokenizer, and read from folders that others wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from lm.tokenizer import (
    END_OF_TEXT,
    END_OF_TEXT_CHARACTER,
    UNKNOWN,
    Tokenizer,
    TokenizerError,
    close_sources,
    train_bpe,
    train_characters,
    train_translator_bpe,
    train_words,
)

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n\tAll: Don't  — naïve café 12345. 🦄\r\n"
KNOWN = sorted(set(TEXT))

anything = st.text(max_size=60)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([TEXT] * 3, 400)


@pytest.fixture(scope="module")
def characters() -> Tokenizer:
    return train_characters([TEXT])


@pytest.fixture(scope="module")
def ending() -> Tokenizer:
    return train_characters([TEXT], eos=END_OF_TEXT_CHARACTER)


def through_auto(tokenizer: Tokenizer, folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer.save(folder)
    # What stands beside it in a model folder: without a tokenizer_class transformers would go by the model's type.
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def auto_bpe(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return through_auto(bpe, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def auto_characters(characters: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return through_auto(characters, tmp_path_factory.mktemp("characters"))


@pytest.fixture(scope="module")
def auto_ending(ending: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return through_auto(ending, tmp_path_factory.mktemp("ending"))


# ------------------------------------------------------------ byte-level BPE


@given(text=anything)
@example(text=" a  b\n\n c\t\r\n ")
@example(text="don't , . ! ? it 's")
@example(text=f"x{END_OF_TEXT}y")
@example(text="\x00\x03\u2028e\u0301\U0001f984\ufffd")
def test_bpe_gives_any_text_back_and_equal_ids_through_auto(bpe: Tokenizer, auto_bpe: Any, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids, skip_special_tokens=False) == text
    assert auto_bpe(text)["input_ids"] == ids
    assert auto_bpe.decode(ids) == text
    assert auto_bpe.decode(ids, skip_special_tokens=True) == bpe.decode(ids)
    assert bpe.encode_batch([text, "", text]) == [ids, [], ids]


@given(text=anything)
def test_token_bytes_of_bpe_are_the_bytes_of_the_text(bpe: Tokenizer, text: str) -> None:
    assert bpe.token_bytes()[bpe.encode(text)].sum() == len(text.encode()) - len(END_OF_TEXT) * text.count(END_OF_TEXT)


def test_bpe_has_the_size_that_was_asked_for_or_what_the_text_gives() -> None:
    assert train_bpe([TEXT], 280).vocab_size == 280
    small = train_bpe(["ab ab"], 1000)
    assert 257 < small.vocab_size < 300
    assert small.decode(small.encode("日本")) == "日本"
    with pytest.raises(ValueError, match="vocab_size is 256; it must hold 256 bytes and 1 special"):
        train_bpe([TEXT], 256)


def test_bpe_without_end_of_text(tmp_path: Path) -> None:
    tokenizer = train_bpe([TEXT], 300, eos=None)
    assert tokenizer.eos_id is None
    auto = through_auto(tokenizer, tmp_path)
    assert auto.eos_token_id is None
    assert Tokenizer.load(tmp_path).eos_id is None
    assert tokenizer.decode(tokenizer.encode(END_OF_TEXT)) == END_OF_TEXT


def test_end_of_text_is_special_in_both(bpe: Tokenizer, auto_bpe: Any) -> None:
    assert auto_bpe.eos_token_id == bpe.eos_id == bpe.encode(END_OF_TEXT)[0]
    assert bpe.decode(bpe.encode(f"a{END_OF_TEXT}b")) == "ab"


# ------------------------------------------------------------ characters


@given(text=anything)
@example(text="a\nb\r\nc\u2028\x85")
@example(text=UNKNOWN)
@example(text=f"{UNKNOWN}{END_OF_TEXT}\x03\ufffd🦄🦄")
def test_characters_are_as_many_as_ids_in_both(
    characters: Tokenizer, auto_characters: Any, ending: Tokenizer, auto_ending: Any, text: str
) -> None:
    for ours, auto in ((characters, auto_characters), (ending, auto_ending)):
        ids = ours.encode(text)
        assert len(ids) == len(text)
        assert auto(text)["input_ids"] == ids
        assert auto.decode(ids, skip_special_tokens=True) == ours.decode(ids)
        known = {*KNOWN, END_OF_TEXT_CHARACTER} if ours is ending else set(KNOWN)
        expected = [character if character in known else UNKNOWN for character in text]
        assert ours.decode(ids, skip_special_tokens=False) == "".join(expected)


@given(text=st.text(alphabet=KNOWN, max_size=80))
def test_known_characters_come_back(characters: Tokenizer, auto_characters: Any, text: str) -> None:
    ids = characters.encode(text)
    assert characters.decode(ids) == text == auto_characters.decode(ids)
    assert UNKNOWN not in auto_characters.convert_ids_to_tokens(ids)
    assert characters.token_bytes()[ids].sum() == len(text.encode())


def test_the_vocabulary_of_characters_does_not_depend_on_how_the_text_comes() -> None:
    assert train_characters(TEXT).fingerprint() == train_characters([TEXT[:10], TEXT[10:], TEXT]).fingerprint()
    assert train_characters([TEXT]).vocab_size == len(KNOWN) + 1


def test_an_end_of_text_for_characters_is_one_character(ending: Tokenizer) -> None:
    assert ending.eos_id is not None
    assert ending.decode([*ending.encode("me"), ending.eos_id]) == "me"
    with pytest.raises(ValueError, match="must be one character"):
        train_characters([TEXT], eos=END_OF_TEXT)


# ------------------------------------------------------------ folders


def test_a_saved_tokenizer_comes_back_equal(bpe: Tokenizer, ending: Tokenizer, tmp_path: Path) -> None:
    for number, tokenizer in enumerate((bpe, ending)):
        tokenizer.save(tmp_path / str(number))
        loaded = Tokenizer.load(tmp_path / str(number))
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert (loaded.eos_id, loaded.bos_id, loaded.pad_id) == (tokenizer.eos_id, None, None)
        assert loaded.vocab_size == tokenizer.vocab_size
    assert bpe.fingerprint() != ending.fingerprint()


def foreign(folder: Path, **files: Any) -> Path:
    """A folder as sentencepiece models have it: Metaspace, bytes for what is unknown, BOS put in front."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    vocabulary |= {"▁": 259, "▁hear": 260, "▁me": 261, "é": 262}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    inner.add_tokens([AddedToken("[é]", special=False)])
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    inner.enable_truncation(4)
    inner.enable_padding(length=9)
    inner.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        path = folder / {"chat_template": "chat_template.jinja"}.get(name, f"{name}.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "</s>", "bos_token": "<s>"}},
        {"tokenizer_config": {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": {"content": "<s>"}}},
        {"special_tokens_map": {"eos_token": "</s>", "bos_token": {"content": "<s>"}}},
        {"tokenizer_config": {"eos_token": None}, "generation_config": {"eos_token_id": [2, 1], "bos_token_id": 1}},
        {"tokenizer_config": {"eos_token": "<gone>"}, "config": {"eos_token_id": 2, "bos_token_id": 1}},
    ],
)
def test_a_foreign_folder_says_its_special_tokens_in_many_ways(tmp_path: Path, files: dict[str, Any]) -> None:
    tokenizer = Tokenizer.load(foreign(tmp_path, **files))
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (2, 1, None)


def test_a_foreign_folder_keeps_its_rules_but_not_its_last_use(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(foreign(tmp_path, tokenizer_config={"eos_token": "</s>"}))
    assert tokenizer.encode("hear me")[0] == 1
    assert tokenizer.encode("hear me", add_special_tokens=False)[0] != 1
    assert len(tokenizer.encode("hear me hear me")) > 4  # no truncation, no padding
    assert tokenizer.encode_batch(["hear", "hear me"], add_special_tokens=False)[0][-1] != 0


def test_bytes_of_a_foreign_vocabulary(tmp_path: Path) -> None:
    sizes = Tokenizer.load(foreign(tmp_path)).token_bytes()
    assert sizes.dtype == np.int64
    assert sizes[[0, 1, 2]].tolist() == [0, 0, 0]
    assert sizes[[3, 258, 259, 260, 262]].tolist() == [1, 1, 1, 5, 2]
    assert sizes[-1] == len("[é]".encode())


def test_what_a_foreign_folder_sets_is_kept_when_saved(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    settings = {"eos_token": "</s>", "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}
    folder = foreign(tmp_path / "in", tokenizer_config=settings, chat_template="{{ messages }}")
    Tokenizer.load(folder).save(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings.items() <= saved.items()
    assert saved["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "has no tokenizer.json"),
        ({"tokenizer.json": "{"}, "is not a tokenizer"),
        ({"tokenizer.json": "[]"}, "is not a tokenizer"),
        ({"tokenizer_config.json": "{"}, "is not JSON"),
        ({"tokenizer_config.json": "[]"}, "holds no JSON object"),
    ],
)
def test_an_unreadable_folder_gets_a_sentence(
    tmp_path: Path, bpe: Tokenizer, files: dict[str, str], sentence: str
) -> None:
    if "tokenizer_config.json" in files:
        bpe.save(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=sentence) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_loading_takes_neither_torch_nor_transformers(tmp_path: Path, bpe: Tokenizer) -> None:
    bpe.save(tmp_path)
    code = (
        "import sys; from lm.tokenizer import Tokenizer; t = Tokenizer.load(sys.argv[1]); print(t.encode('hear me'));"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == bpe.encode("hear me")


def test_a_translators_words() -> None:
    """The most frequent ones, ties in order of the alphabet; all else is <unk>; a space stands between two."""
    tokenizer = train_words(["b a a", "c b d  d", "<unk> </s> e"], vocab_size=7)
    vocabulary = sorted(tokenizer.inner.get_vocab().items(), key=lambda item: item[1])
    assert [token for token, _ in vocabulary] == ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "d"]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.decode(tokenizer.encode(" a  c\tb ")) == "a <unk> b"
    assert train_words(["x y"]).vocab_size == 6
    with pytest.raises(ValueError, match="vocab_size is 4; it must hold 4 special tokens and a word"):
        train_words(["a"], 4)


@pytest.mark.parametrize("kind", ["bpe", "words"])
@pytest.mark.parametrize(("encoder_decoder", "end"), [(True, 2), (False, 1)])
def test_a_source_is_closed_as_its_reader_needs_it_through_autotokenizer_too(
    tmp_path: Path, kind: str, encoder_decoder: bool, end: int
) -> None:
    from transformers import AutoTokenizer

    texts = ["ein mann geht .", "a man walks ."]
    learned = train_words(texts) if kind == "words" else train_translator_bpe(texts, 270)
    tokenizer = close_sources(learned, encoder_decoder)
    ids = tokenizer.encode(texts[0])
    assert ids[-1] == end
    assert ids[:-1] == tokenizer.encode(texts[0], add_special_tokens=False) == learned.encode(texts[0])
    assert tokenizer.decode(ids) == texts[0]
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.pad_id, loaded.bos_id, loaded.eos_id) == (0, 1, 2)
    assert loaded.encode(texts[0]) == ids == AutoTokenizer.from_pretrained(tmp_path)(texts[0]).input_ids
    assert tokenizer.encode("") == [end]


def test_a_tokenizer_without_an_end_translates_nothing() -> None:
    with pytest.raises(ValueError, match="the tokenizer has no pad_token, which a translator needs"):
        close_sources(train_characters(["abc"]), True)
