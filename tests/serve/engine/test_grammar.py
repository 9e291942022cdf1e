"""Grammars in the engine: what is drawn obeys them, and nothing else that an answer depends on is changed by them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import llguidance
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from lm import DecoderLM, SamplingParams
from lm.tokenizer import Tokenizer, train_bpe
from serve.engine.draft import Speculation
from serve.engine.engine import Engine
from serve.engine.grammar import KEPT, Grammars, Impossible, Rule
from serve.engine.masks import Masks
from serve.engine.messages import Add, Constraint, Grammar, Output
from serve.engine.requests import Request
from serve.engine.served import ServedLM, serve_model

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TEXTS = {
    "date": llguidance.LLMatcher.grammar_from_regex(r"[12][0-9]{3}-[01][0-9]"),
    "word": llguidance.LLMatcher.grammar_from_regex(r"(fox|dog)( (fox|dog)){2,4}"),
    "json": llguidance.LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA), {"whitespace_flexible": False}),
    "any": llguidance.LLMatcher.grammar_from_regex("[a-z ]*"),
}
SAMPLED = SamplingParams(temperature=1.0, seed=5, max_tokens=60)


@pytest.fixture(scope="module")
def served(model: DecoderLM) -> ServedLM:
    return serve_model(deepcopy(model))


def make(model: Any, tokenizer: Tokenizer, **more: Any) -> Engine:
    eos = more.pop("eos", [tokenizer.eos_id])
    engine = Engine(model, tokenizer, **{"eos": eos, "max_model_len": 160, "blocks": 120, **more})
    for key, text in TEXTS.items():
        engine.learn(Grammar(key, text))
    return engine


def add(id: str, grammar: str | None, params: SamplingParams = SAMPLED, prompt: Sequence[int] = (5, 9, 3)) -> Add:
    return Add(id, list(prompt), params, 0.0, constraint=Constraint(grammar) if grammar else None)


def run(engine: Engine, adds: Sequence[Add]) -> dict[str, Output]:
    """Each sequence's outputs as one."""
    for one in adds:
        engine.add(one)
    whole = {one.id: Output(id=one.id, logprobs=[]) for one in adds}
    while engine.has_work:
        for output in engine.step().outputs:
            into = whole[output.id]
            into.text += output.text
            into.tokens = into.tokens + output.tokens
            into.logprobs = (into.logprobs or []) + (output.logprobs or [])
            into.finish_reason, into.stop_reason = output.finish_reason, output.stop_reason
            into.error, into.impossible = output.error, output.impossible
        engine.blocks.check([request.table for request in engine.scheduler])
    assert engine.blocks.free == engine.blocks.count - 1
    return whole


def obeys(grammar: str, text: str) -> bool:
    if grammar == "json":
        value = json.loads(text)
        return set(value) == {"name", "age"} and len(value["name"]) <= 6 and 0 <= value["age"] <= 99
    patterns = {"date": r"[12]\d{3}-[01]\d", "word": r"(fox|dog)( (fox|dog)){2,4}", "any": "[a-z ]*"}
    return re.fullmatch(patterns[grammar], text) is not None


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_what_is_drawn_obeys_the_grammar_and_ends_with_it(
    model: DecoderLM, tokenizer: Tokenizer, temperature: float
) -> None:
    engine = make(model, tokenizer)
    params = replace(SAMPLED, temperature=temperature)
    adds = [
        add(f"{key}-{seed}", key, replace(params, seed=seed)) for key in ("date", "word", "json") for seed in range(3)
    ]
    for id, output in run(engine, [*adds, add("free", None)]).items():
        if id != "free":
            assert obeys(id.split("-")[0], output.text), output.text
            assert (output.finish_reason, output.stop_reason) == ("stop", None)
            assert output.tokens[-1] == tokenizer.eos_id


def test_company_drafts_and_preemption_change_nothing(served: ServedLM, tokenizer: Tokenizer) -> None:
    params = replace(SAMPLED, max_tokens=40)
    adds = [add(f"{key}-{i}", key, replace(params, seed=i), [i + 1] * 15) for i in range(2) for key in TEXTS]
    adds += [add(f"free-{i}", None, replace(params, seed=i), [i + 1] * 15) for i in range(2)]
    alone: dict[str, Output] = {}
    for one in adds:
        alone |= run(make(served, tokenizer), [one])
    tight = make(served, tokenizer, blocks=12, max_num_seqs=6)
    drafting = make(served, tokenizer, speculation=Speculation(4, 3, 1))
    for engine in (make(served, tokenizer), tight, drafting):
        together = run(engine, adds)
        assert {id: output.tokens for id, output in together.items()} == {id: o.tokens for id, o in alone.items()}
        assert {id: output.text for id, output in together.items()} == {id: o.text for id, o in alone.items()}
    assert tight.scheduler.preemptions > 0


def test_drafts_are_kept_where_the_grammar_knows_them(served: ServedLM, tokenizer: Tokenizer) -> None:
    engine = make(served, tokenizer, speculation=Speculation(4, 3, 1))
    engine.learn(Grammar("foxes", llguidance.LLMatcher.grammar_from_regex("(the quick fox ){12}")))
    engine.add(add("foxes", "foxes", SamplingParams(temperature=0.0, max_tokens=120)))
    accepted, text = 0, ""
    while engine.has_work:
        step = engine.step()
        accepted += step.stats.accepted
        text += "".join(output.text for output in step.outputs)
    assert text == "the quick fox " * 12
    assert accepted > 10


def test_the_end_of_a_grammar_counts_more_than_fields_that_would_not_have_it(
    model: DecoderLM, tokenizer: Tokenizer
) -> None:
    eos = tokenizer.eos_id
    assert eos is not None
    for more in ({"min_tokens": 50}, {"ignore_eos": True}, {"logit_bias": {eos: -100.0}}, {"stop_token_ids": (eos,)}):
        output = run(make(model, tokenizer), [add("date", "date", replace(SAMPLED, **more))])["date"]
        assert obeys("date", output.text), more
        assert output.finish_reason == "stop"
    least = run(make(model, tokenizer), [add("any", "any", replace(SAMPLED, min_tokens=30))])["any"]
    assert len(least.tokens) >= 30
    assert obeys("any", least.text)
    stopped = run(make(model, tokenizer), [add("word", "word", replace(SAMPLED, stop=(" ",)))])["word"]
    assert stopped.text in ("fox", "dog")
    assert stopped.stop_reason == " "
    cut = run(make(model, tokenizer), [add("json", "json", replace(SAMPLED, max_tokens=3))])["json"]
    assert (cut.finish_reason, len(cut.tokens)) == ("length", 3)


def test_a_model_without_eos_ends_with_the_grammar(model: DecoderLM, tokenizer: Tokenizer) -> None:
    output = run(make(model, tokenizer, eos=[]), [add("date", "date")])["date"]
    assert obeys("date", output.text)
    assert output.finish_reason == "stop"


def test_log_probabilities_are_those_of_what_may_come(model: DecoderLM, tokenizer: Tokenizer) -> None:
    output = run(make(model, tokenizer), [add("word", "word", replace(SAMPLED, logprobs=20))])["word"]
    assert output.logprobs is not None
    assert len(output.logprobs) == len(output.tokens)
    allowed = [value for _, value in output.logprobs[0].top if value > -np.inf]
    assert sum(np.exp(allowed)) == pytest.approx(1, abs=1e-5)  # few tokens begin "fox" or "dog"
    (date,) = run(make(model, tokenizer), [add("date", "date", replace(SAMPLED, logprobs=1))]).values()
    assert date.logprobs is not None
    assert date.logprobs[-1].logprob == 0  # EOS, the one that is left


def test_a_translation_obeys_too(translator: Any) -> None:
    if translator.tokenizer.eos_id is None:
        pytest.skip("this model has no EOS of its own")
    engine = Engine(translator.model, translator.tokenizer, eos=[translator.tokenizer.eos_id], blocks=64)
    engine.learn(Grammar("date", TEXTS["date"]))
    source = translator.tokenizer.encode("the fox")
    output = run(engine, [add("date", "date", replace(SAMPLED, max_tokens=30), source)])["date"]
    assert obeys("date", output.text)


# ---------------------------------------------------------------- faults


def test_a_grammar_that_is_none_fails_its_own_requests_alone(model: DecoderLM, tokenizer: Tokenizer) -> None:
    engine = make(model, tokenizer)
    engine.learn(Grammar("bad", "start: nowhere"))
    engine.learn(Grammar("deep", llguidance.LLMatcher.grammar_from_regex("(x{1000}){1000}")))
    outputs = run(engine, [add("bad", "bad"), add("deep", "deep"), add("strange", "unknown"), add("date", "date")])
    for id in ("bad", "deep", "strange"):
        assert outputs[id].finish_reason == "error"
        assert outputs[id].impossible
        assert len((outputs[id].error or "").splitlines()) == 1
    assert obeys("date", outputs["date"].text)


def test_compiled_grammars_do_not_pile_up(model: DecoderLM, tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, model.config.vocab_size, [])
    for i in range(KEPT + 5):
        grammars.learn(Grammar(f"{i}", f'start: "{i}"'))
        grammars.learn(Grammar("0", 'start: "0"'))  # who is asked for again stays
    assert len(grammars._compiled) == KEPT
    assert grammars._compiled.keys() >= {"0", f"{KEPT + 4}"}


def test_who_leaves_while_the_grammar_is_compiled_is_forgotten(model: DecoderLM, tokenizer: Tokenizer) -> None:
    engine = make(model, tokenizer)
    engine.add(add("date", "date"))
    assert engine.has_work
    engine.abort(["date"])
    assert not engine.has_work
    assert engine.blocks.free == engine.blocks.count - 1


# ---------------------------------------------------------------- masks


@settings(max_examples=60, deadline=None)
@given(data=st.data(), vocabulary=st.integers(3, 100), height=st.integers(1, 5))
def test_bits_are_spread_over_the_rows_that_are_bound(data: st.DataObject, vocabulary: int, height: int) -> None:
    """Against the definition, for rules that say what they are told."""
    width = -(-vocabulary // 32)
    bits = data.draw(
        st.lists(st.lists(st.booleans(), min_size=32 * width, max_size=32 * width), min_size=height, max_size=height)
    )
    bound = data.draw(st.lists(st.booleans(), min_size=height, max_size=height))

    class Told:
        def __init__(self, row: int) -> None:
            self._row = row

        def masks(self, draft: Sequence[int], masks: np.ndarray) -> list[tuple[int, bool]]:
            if not bound[self._row]:
                return []
            masks[0] = np.packbits(bits[self._row], bitorder="little").view(np.uint32)
            return [(0, False)]

    requests = [Request(id=str(r), prompt=[0], params=SAMPLED, rule=Told(r) if r % 3 else None) for r in range(height)]
    logits = torch.randn(height, vocabulary)
    expected = logits.clone()
    for r in range(height):
        if r % 3 and bound[r]:
            expected[r, ~torch.tensor(bits[r][:vocabulary])] = -torch.inf
    Masks(width).apply(requests, [1] * height, logits)
    assert torch.equal(logits, expected)


def ready(grammars: Grammars, constraint: Constraint) -> Rule:
    rule = grammars.rule(constraint)
    rule.wait(10)
    rule.begin()
    return rule


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_after_a_draft_are_those_of_who_has_drawn_it(data: st.DataObject, tokenizer: Tokenizer) -> None:
    grammars = _grammars(tokenizer)
    fox = tokenizer.encode("fox dog fox dog fox", add_special_tokens=False)
    begun = data.draw(st.integers(0, len(fox) - 1))
    free = data.draw(st.booleans())
    constraint = Constraint("word", end=7 if free else None)
    draft = fox[begun : begun + data.draw(st.integers(0, 4))]
    if data.draw(st.booleans()):
        draft = [*draft, data.draw(st.integers(0, tokenizer.vocab_size - 1))]
    rule, other = ready(grammars, constraint), ready(grammars, constraint)
    for one in (rule, other):
        for token in [*([11, 7] if free else []), *fox[:begun]]:
            one.accept(token)
    width = grammars.vocabulary.mask_words
    together = np.zeros((len(draft) + 1, width), dtype=np.uint32)
    bound = rule.masks(draft, together)
    for row, final in bound:
        alone = np.zeros((1, width), dtype=np.uint32)
        assert other.masks([], alone) == [(0, final)]
        assert np.array_equal(together[row], alone[0])
        if row < len(draft) and row + 1 < len(bound):
            other.accept(draft[row])
    again = np.zeros((1, width), dtype=np.uint32)
    rule.masks([], again)
    assert np.array_equal(again[0], together[0])  # it stands where it stood
    assert len(rule.agreed(list(draft))) <= len(draft)


_KNOWN: dict[int, Grammars] = {}


def _grammars(tokenizer: Tokenizer) -> Grammars:
    """Those of TEXTS, made once."""
    if id(tokenizer) not in _KNOWN:
        grammars = Grammars(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id or 0])
        for key, text in TEXTS.items():
            grammars.learn(Grammar(key, text))
        _KNOWN[id(tokenizer)] = grammars
    return _KNOWN[id(tokenizer)]


@pytest.mark.parametrize(("thinking", "budget"), [(True, 4), (True, 0), (False, 3)])
def test_thinking_ends_with_its_budget_and_then_the_grammar_begins(
    served: ServedLM, tokenizer: Tokenizer, thinking: bool, budget: int
) -> None:
    end, start, eos = 70, 71, tokenizer.eos_id
    assert eos is not None
    bias = {end: -100.0, eos: -100.0, **({} if thinking else {start: 100.0})}
    params = SamplingParams(temperature=0.0, max_tokens=40, logit_bias=bias)
    rule = Constraint("date", end=end, start=start, budget=budget, thinking=thinking)
    found = []
    for more in ({}, {"speculation": Speculation(4, 3, 1)}):
        add_ = Add("a", [5, 9, 3] * 4, params, 0.0, constraint=rule)
        found.append(run(make(served, tokenizer, **more), [add_])["a"].tokens)
    tokens = found[0]
    assert found[1] == tokens
    at = tokens.index(end)
    assert at == (budget if thinking else 1 + budget)
    if thinking:
        assert obeys("date", tokenizer.decode(tokens[at + 1 : -1]))


def test_the_end_of_thinking_alone_is_left_when_its_budget_is_spent(tokenizer: Tokenizer) -> None:
    end, start = 70, 71
    grammars = _grammars(tokenizer)
    rule = ready(grammars, Constraint(end=end, start=start, budget=2))
    masks = np.zeros((4, grammars.vocabulary.mask_words), dtype=np.uint32)
    assert rule.masks([start, 5, 6], masks) == [(3, False)]  # two tokens of thinking, and then its end alone
    assert np.unpackbits(masks[3].view(np.uint8), bitorder="little").nonzero()[0].tolist() == [end]


def test_a_rule_refuses_what_cannot_come(tokenizer: Tokenizer) -> None:
    rule = ready(_grammars(tokenizer), Constraint("date"))
    with pytest.raises(Impossible):
        rule.accept(tokenizer.encode("fox", add_special_tokens=False)[0])


@pytest.mark.parametrize("order", [1, -1])
def test_texts_that_have_a_tag_in_them_can_be_written(order: int) -> None:
    """llguidance offers an added token where such a text is all that is left, and then refuses it."""
    words = train_bpe(["the quick brown fox <tool_call> jumps over the <|system|> lazy dog. " * 4], 330)
    tags = [AddedToken("<tool_call>", special=False), AddedToken("</tool_call>", special=False)]
    tags += [AddedToken("<|system|>", special=True)]
    words.inner.add_tokens(tags[::order])
    words.inner.model.unk_token = "<|system|>"  # a special one, as many vocabularies have it
    grammars = Grammars(words, words.vocab_size, [words.eos_id or 0])
    for text in ("<tool_call>fox</tool_call>", "the <|system|> fox", "<|system|>"):
        grammars.learn(Grammar(text, llguidance.LLMatcher.grammar_from_lark(f"start: {json.dumps(text)}")))
        rule = ready(grammars, Constraint(text))
        tokens: list[int] = []
        masks = np.zeros((1, grammars.vocabulary.mask_words), dtype=np.uint32)
        while not rule.masks([], masks)[0].final:
            tokens.append(int(np.unpackbits(masks[0].view(np.uint8), bitorder="little").nonzero()[0][-1]))
            rule.accept(tokens[-1])
            masks[:] = 0
        assert words.decode(tokens) == text
