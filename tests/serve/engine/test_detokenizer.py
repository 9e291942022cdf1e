"""Whatever the ids and the tokenizer: deltas join to the whole text, no character is torn, no stop string leaks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Inner

from lm.tokenizer import Tokenizer, train_bpe, train_characters
from serve.engine.detokenizer import Detokenizer, Detokenizers, Detokenizing, Match, OfBytes, StopStrings

WORDS = "the quick naïve 你好 🎉🦊 ñandú "
BPE = train_bpe([WORDS * 3], 300)
BPE.vocab_size += BPE.inner.add_tokens([AddedToken(" né "), AddedToken("¡!")])  # not written as bytes
CHARACTERS = train_characters([WORDS])


def metaspace() -> Tokenizer:
    """A vocabulary of sentencepiece's kind: words with a sign for the space before them, and bytes to fall back on."""
    pieces = ["<unk>", "▁the", "▁fox", "es", "▁", "▁ñ"] + [f"<0x{byte:02X}>" for byte in range(256)]
    inner = Inner(models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(inner)


TOKENIZERS = {"bpe": BPE, "characters": CHARACTERS, "metaspace": metaspace()}


def streams(tokenizer: Tokenizer, prompt: list[int], **options: bool) -> list[Detokenizing]:
    """That which works for all, and that which such a tokenizer gets."""
    chosen = Detokenizers(tokenizer.inner).after(prompt, **options)
    assert isinstance(chosen, OfBytes) == (tokenizer is BPE)
    return [Detokenizer(tokenizer.inner, prompt, **options), chosen]


def whole(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """The text of ids that follow a prompt, decoded all at once."""
    before = tokenizer.decode(prompt)
    return tokenizer.decode(prompt + ids)[len(before) :]


def any_ids(kind: str) -> st.SearchStrategy[list[int]]:
    """Any ids at all; for bytes to fall back on, whole characters, since one bad byte turns all those beside it bad."""
    if kind != "metaspace":
        return st.lists(st.integers(0, TOKENIZERS[kind].vocab_size - 1), max_size=80)
    characters = st.sampled_from("aé你🎉").map(lambda c: [6 + byte for byte in c.encode()])
    pieces = st.integers(1, 5).map(lambda id: [id])
    return st.lists(pieces | characters, max_size=40).map(lambda parts: [id for part in parts for id in part])


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_deltas_join_to_the_text_of_all_ids(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(any_ids(kind))
    text = data.draw(st.text(alphabet=WORDS, max_size=12))
    prompt = tokenizer.encode(text)
    for stream in streams(tokenizer, prompt):
        deltas = [stream.feed(id) for id in ids]
        assert "".join(deltas) + stream.finish() == whole(tokenizer, prompt, ids)
        assert len(getattr(stream, "_window", ())) <= 64, "the window grows without end"


@settings(max_examples=150, deadline=None)
@given(prompt=st.lists(st.integers(0, BPE.vocab_size - 1), max_size=12), ids=any_ids("bpe"), skip=st.booleans())
def test_both_ways_of_detokenizing_agree_after_any_prompt(prompt: list[int], ids: list[int], skip: bool) -> None:
    one, other = streams(BPE, prompt, skip_special_tokens=skip)
    assert "".join(map(one.feed, ids)) + one.finish() == "".join(map(other.feed, ids)) + other.finish()


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40).filter(lambda text: "<|endoftext|>" not in text))
def test_valid_text_never_shows_a_torn_character(text: str) -> None:
    ids = BPE.encode(text)
    for stream in streams(BPE, BPE.encode("the ")):
        given_out = ""
        for id in ids:
            delta = stream.feed(id)
            assert "\ufffd" not in delta or "\ufffd" in text
            given_out += delta
            assert text.startswith(given_out)
        assert given_out + stream.finish() == text


def test_a_character_that_the_prompt_began_is_completed() -> None:
    ids = BPE.encode("🦉")  # not in the vocabulary: several byte tokens
    assert len(ids) > 1
    for stream in streams(BPE, BPE.encode("the ") + ids[:1]):
        assert "".join(stream.feed(id) for id in ids[1:]) == "🦉"


def test_special_tokens_are_shown_only_where_asked() -> None:
    assert BPE.eos_id is not None
    for skip, expected in ((True, ""), (False, "<|endoftext|>")):
        for stream in streams(BPE, [], skip_special_tokens=skip):
            assert stream.feed(BPE.eos_id) + stream.finish() == expected


def feed(stops: list[str], pieces: list[str], include: bool) -> tuple[str, str | None, list[str]]:
    """All that got out, the stop string that was found, and what was out after each piece."""
    machine, out, seen = StopStrings(stops, include=include), "", []
    for piece in pieces:
        passed = machine.feed(piece)
        if isinstance(passed, Match):
            return out + passed.text, passed.stop, [*seen, out + passed.text]
        out += passed
        seen.append(out)
    return out + machine.finish(), None, seen


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_stop_strings_end_the_text_and_never_leak(pieces: list[str], stops: list[str], include: bool) -> None:
    text = "".join(pieces)
    out, found, seen = feed(stops, pieces, include)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not ends:
        assert (out, found) == (text, None)
        return
    assert found is not None
    end, start = min(ends)
    assert text[start:end] == found or text[:end].endswith(found)
    assert out == text[: end if include else end - len(found)]
    if not include:
        assert all(out.startswith(shown) for shown in seen), "part of a stop string was shown and taken back"


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    machine = StopStrings(["END"])
    assert machine.feed("abc") == "abc"
    assert machine.feed("dE") == "d"
    assert machine.feed("N") == ""
    assert machine.feed("x") == "ENx"
    assert machine.feed("EN") == ""
    assert machine.finish() == "EN"
