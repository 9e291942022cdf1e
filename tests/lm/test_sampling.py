"""Sampling against a reference in plain Python: which tokens can be drawn, how often, and by whose random numbers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lm.sampling
from lm.adjust import Row, adjust
from lm.params import RepetitionDetectionParams
from lm.sampling import SamplingParams, Uniforms, sample

GRID = 4000


# ------------------------------------------------------------ the reference


def probabilities(logits: list[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    weights = [math.exp((value - top) / max(temperature, 0.01)) for value in logits]
    return [weight / sum(weights) for weight in weights]


def reference(logits: list[float], params: SamplingParams) -> tuple[list[tuple[float, int]], float]:
    """What may be drawn, likeliest first, as (probability after the filters, token); and how near a cut was to falling
    elsewhere, where rounding could decide."""
    ranked = sorted(((p, token) for token, p in enumerate(probabilities(logits, params.temperature))), reverse=True)
    floor, margin = params.min_p * ranked[0][0], 1.0
    if params.min_p > 0:
        margin = min([margin] + [abs(p - floor) for p, _ in ranked[1:]])
    ranked = [(p, token) for p, token in ranked if p >= floor]
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    total, before, kept = sum(p for p, _ in ranked), 0.0, []
    for p, token in ranked:
        if before >= params.top_p * total:
            break
        kept.append((p, token))
        before += p
        if params.top_p < 1:
            margin = min(margin, abs(before - params.top_p * total))
    mass = sum(p for p, _ in kept)
    return [(p / mass, token) for p, token in kept], margin


def drawn(logits: list[float], params: SamplingParams, draws: int = GRID) -> Counter[int]:
    """How often each token comes out when the uniform number takes `draws` evenly spaced values."""
    uniforms = [(i + 0.5) / draws for i in range(draws)]
    return Counter(sample(torch.tensor([logits] * draws), [params] * draws, uniforms).tolist())


# ------------------------------------------------------------ which tokens, how often


@pytest.mark.parametrize("shortlist", [64, 3])  # of 3, most rows need a longer one
@settings(max_examples=50, deadline=None)
@given(
    quarters=st.lists(st.integers(-6, 6), min_size=1, max_size=25),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.sampled_from([-1, 0, 1, 2, 5, 1000]),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.013, 0.17, 1.0]),
)
def test_exactly_the_kept_tokens_are_drawn_with_their_shares(
    shortlist: int, quarters: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Quarters make many ties: of equal tokens it does not matter which is kept, but how many are."""
    logits = [q / 4 for q in quarters]
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    kept, margin = reference(logits, params)
    assume(margin > 1e-6 or min_p == 1.0)
    grid = GRID if shortlist > 3 else GRID // 10  # rows that need more than the shortlist are drawn one by one
    assume(kept[-1][0] > 2 / grid)  # else the grid may step over it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.sampling, "SHORTLIST", shortlist)
        counts = drawn(logits, params, grid)
    ours = sorted(((counts[token], logits[token]) for token in counts), key=lambda pair: (pair[1], pair[0]))
    expected = sorted(((share * grid, logits[token]) for share, token in kept), key=lambda pair: (pair[1], pair[0]))
    assert [value for _, value in ours] == [value for _, value in expected]
    assert [count for count, _ in ours] == pytest.approx([count for count, _ in expected], abs=2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.0, "top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_frequencies_pass_a_chi_square_test(options: dict[str, Any]) -> None:
    draws, params = 20_000, SamplingParams(**options)
    logits = (1.2 * torch.randn(20, generator=torch.Generator().manual_seed(3))).tolist()
    uniforms = Uniforms(seed=7)
    tokens = sample(torch.tensor([logits] * draws), [params] * draws, [uniforms[i] for i in range(draws)])
    counts = Counter(tokens.tolist())
    kept, _ = reference(logits, params)
    assert counts.keys() <= {token for _, token in kept}
    statistic = sum((counts[token] - share * draws) ** 2 / (share * draws) for share, token in kept)
    freedom = len(kept) - 1
    # Wilson and Hilferty: (chi2 / n)^(1/3) is nearly normal. 3.3 deviations are one in two thousand.
    deviations = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert deviations < 3.3


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"top_p": 0.5}, 501), ({"top_k": 100, "top_p": 0.5}, 51), ({"top_k": 600}, 600), ({"min_p": 0.999}, 101)],
    ids=str,
)
def test_a_flat_distribution_needs_more_than_the_shortlist(options: dict[str, Any], kept: int) -> None:
    """1,000 tokens that hardly differ: most filters leave more than the 64 that are looked at first."""
    logits = [-token * 1e-5 for token in range(1000)]
    expected, _ = reference(logits, SamplingParams(**options))
    assert len(expected) == pytest.approx(kept, abs=5)
    counts = drawn(logits, SamplingParams(**options), 1500)
    assert len(counts) == pytest.approx(len(expected), abs=2)
    assert max(counts) == pytest.approx(max(token for _, token in expected), abs=2)


def test_greedy_is_the_first_of_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, -1.0, 0.0, 0.0]])
    for temperature in (0.0, 9e-6):
        params = SamplingParams(temperature=temperature, top_p=0.3, top_k=2, min_p=0.5)
        assert sample(logits, [params] * 2, [0.9, 0.9]).tolist() == [1, 0]
    mixed = [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0)]
    assert sample(logits, mixed, [0.999, 0.999]).tolist() == [1, 3]


def test_a_tiny_temperature_is_raised() -> None:
    """As vLLM does it: below 0.01 the quotients would overflow."""
    logits = torch.tensor([[0.0, 0.004]])
    low = sample(logits.expand(2000, 2), [SamplingParams(temperature=2e-5)] * 2000, [i / 2000 for i in range(2000)])
    assert float((low == 1).float().mean()) == pytest.approx(1 / (1 + math.exp(-0.4)), abs=1e-3)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_tokens_that_can_be_drawn(uniform: float) -> None:
    banned = torch.full((1, 300), -torch.inf)
    banned[0, [7, 150]] = torch.tensor([1.0, 0.0])
    for options in ({}, {"top_p": 0.99}, {"top_k": 50}, {"min_p": 0.01}):
        assert sample(banned, [SamplingParams(**options)], [uniform]).item() in (7, 150)


# ------------------------------------------------------------ a row and its batch


@st.composite
def rows(draw: st.DrawFn) -> list[tuple[int, SamplingParams, float]]:
    params = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        top_k=st.sampled_from([0, 1, 3, 64, 65, 200]),
        top_p=st.sampled_from([0.1, 0.5, 0.95, 1.0]),
        min_p=st.sampled_from([0.0, 0.1]),
    )
    return draw(
        st.lists(st.tuples(st.integers(0, 3), params, st.floats(0, 1, exclude_max=True)), min_size=1, max_size=6)
    )


@settings(max_examples=60, deadline=None)
@given(rows())
def test_a_row_is_the_same_alone_and_in_any_batch(batch: list[tuple[int, SamplingParams, float]]) -> None:
    """With ties, too: coarse logits, of which one kind is flat and needs a long shortlist."""
    kinds = torch.randn(4, 400, generator=torch.Generator().manual_seed(8))
    kinds = (kinds * torch.tensor([[8.0], [2.0], [0.3], [0.0]])).round()
    logits = torch.stack([kinds[kind] for kind, _, _ in batch])
    together = sample(logits, [params for _, params, _ in batch], [uniform for *_, uniform in batch]).tolist()
    alone = [sample(logits[r : r + 1], [params], [uniform]).item() for r, (_, params, uniform) in enumerate(batch)]
    assert together == alone


def test_random_numbers_are_a_function_of_seed_and_index() -> None:
    first, again, other = Uniforms(11), Uniforms(11), Uniforms(12)
    values = [first[i] for i in range(2000)]
    assert [again[i] for i in reversed(range(2000))] == values[::-1]
    assert all(0 <= value < 1 for value in values)
    assert len(set(values) | {other[i] for i in range(2000)}) == 4000
    assert sum(values) / 2000 == pytest.approx(0.5, abs=0.03)
    assert Uniforms()[0] != Uniforms()[0]
    assert Uniforms(-1)[0] == Uniforms(-1)[0]  # any int64 is a seed
    assert Uniforms(2**63 - 1)[0] != Uniforms(0)[0]


# ------------------------------------------------------------ bias and penalties, by hand

LOGITS = [1.0, -1.0, 0.5, 2.0, -3.0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, LOGITS),
        # Tokens 0 and 1 stand in the prompt, 1 and 3 in the output, 3 twice.
        ({"repetition_penalty": 2.0}, [0.5, -2.0, 0.5, 1.0, -3.0]),
        ({"repetition_penalty": 0.5}, [2.0, -0.5, 0.5, 4.0, -3.0]),
        ({"frequency_penalty": 0.5}, [1.0, -1.5, 0.5, 1.0, -3.0]),
        ({"presence_penalty": 0.5}, [1.0, -1.5, 0.5, 1.5, -3.0]),
        ({"frequency_penalty": -1.0, "presence_penalty": 0.25}, [1.0, -0.25, 0.5, 3.75, -3.0]),
        ({"repetition_penalty": 2.0, "frequency_penalty": 1.0, "presence_penalty": 1.0}, [0.5, -4.0, 0.5, -2.0, -3.0]),
        ({"logit_bias": {2: 1.5, 4: -1.0}}, [1.0, -1.0, 2.0, 2.0, -4.0]),
        ({"logit_bias": {2: 500.0, 4: -500.0}}, [1.0, -1.0, 100.5, 2.0, -103.0]),  # vLLM bounds a bias to 100
        # The bias comes before the repetition penalty.
        ({"logit_bias": {1: 2.0}, "repetition_penalty": 2.0}, [0.5, 0.5, 0.5, 1.0, -3.0]),
        ({"min_tokens": 4}, [1.0, -1.0, 0.5, 2.0, -math.inf]),
        ({"min_tokens": 3}, LOGITS),  # three were generated already
        ({"min_tokens": 4, "stop_token_ids": (0,)}, [-math.inf, -1.0, 0.5, 2.0, -math.inf]),
        ({"min_tokens": 4, "logit_bias": {4: 50.0}}, [1.0, -1.0, 0.5, 2.0, -math.inf]),
        ({"allowed_token_ids": [3, 0]}, [1.0, -math.inf, -math.inf, 2.0, -math.inf]),
        # A bias and a penalty work on what is allowed, and bring nothing back.
        (
            {"allowed_token_ids": (1, 3), "logit_bias": {3: 1.0, 0: 9.0}, "presence_penalty": 0.5},
            [-math.inf, -1.5, -math.inf, 2.5, -math.inf],
        ),
    ],
    ids=str,
)
def test_bias_and_penalties_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    logits = torch.tensor([LOGITS, LOGITS])
    asked, plain = SamplingParams(**options), SamplingParams()
    adjusted = adjust(logits, [Row(asked, [0, 1], [3, 1, 3]), Row(plain, [0, 1], [3, 1, 3])], stop_ids=[4])
    assert adjusted[0].tolist() == pytest.approx(expected)
    assert adjusted[1].tolist() == LOGITS
    assert adjusted is logits


def test_nothing_generated_is_nothing_penalised_but_the_prompt() -> None:
    logits = torch.tensor([LOGITS])
    frequency = SamplingParams(frequency_penalty=1.0, presence_penalty=1.0)
    assert adjust(logits, [Row(frequency, [0, 3], [])]).tolist() == [LOGITS]
    repetition = adjust(logits, [Row(SamplingParams(repetition_penalty=2.0), [3], [])])
    assert repetition.tolist() == [[1.0, -1.0, 0.5, 1.0, -3.0]]


@pytest.mark.parametrize(
    ("output", "banned"),
    [([], [2]), ([3], [2, 0]), ([3, 0], [2]), ([4, 1], [2]), ([1, 3], [2, 4, 0]), ([0, 1, 3], [2, 4, 0])],
    ids=str,
)
def test_the_token_that_would_complete_a_bad_word_is_banned(output: list[int], banned: list[int]) -> None:
    """The prompt's own tokens begin no word: as in vLLM, the output alone is looked at."""
    bad = [(2,), (3, 0), (1, 3, 4)]
    for split in range(len(output) + 1):  # the same with some of the output only supposed
        row = Row(SamplingParams(), [3, 1], output[:split], bad).ahead(output[split:])
        (adjusted,) = adjust(torch.tensor([LOGITS]), [row]).tolist()
        assert [token for token, value in enumerate(adjusted) if value == -math.inf] == sorted(banned)


PENALTIES = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5, 0.75]),
    presence_penalty=st.sampled_from([0.0, 0.25]),
    min_tokens=st.integers(0, 9),
    logit_bias=st.sampled_from([None, {2: 1.0, 5: -2.0}]),
    allowed_token_ids=st.sampled_from([None, (0, 2, 5, 7)]),
)
IDS = st.lists(st.integers(0, 7), max_size=9)


def penalised(logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """`adjust` of one row in plain Python, counting everything anew."""
    made = []
    for token, value in enumerate(logits):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            value = -math.inf
        if len(output) < params.min_tokens and token == 6:
            value = -math.inf
        value += (params.logit_bias or {}).get(token, 0.0)
        if token in prompt or token in output:
            penalty = params.repetition_penalty
            value = value / penalty if value > 0 else value * penalty
        times = output.count(token)
        made.append(value - params.frequency_penalty * times - params.presence_penalty * (times > 0))
    return made


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(PENALTIES, IDS, IDS, IDS), min_size=1, max_size=4))
def test_penalties_count_as_the_output_grows_and_as_if_it_did(
    batch: list[tuple[SamplingParams, list[int], list[int], list[int]]],
) -> None:
    logits = torch.randn(len(batch), 8, generator=torch.Generator().manual_seed(4))
    outputs: list[list[int]] = [[] for _ in batch]
    rows = [Row(params, prompt, output) for (params, prompt, *_), output in zip(batch, outputs, strict=True)]
    for length in range(10):
        for output, (_, _, whole, _) in zip(outputs, batch, strict=True):
            output[:] = whole[:length]
        for ahead in (0, 2):
            more = [draft[:ahead] for *_, draft in batch]
            adjusted = adjust(logits.clone(), [row.ahead(m) for row, m in zip(rows, more, strict=True)], stop_ids=[6])
            for line, found, (params, prompt, *_), output, m in zip(
                logits.tolist(), adjusted.tolist(), batch, outputs, more, strict=True
            ):
                assert found == pytest.approx(penalised(line, params, prompt, output + m), abs=1e-5)


# ------------------------------------------------------------ what a request may ask


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n": 0}, "n must be at least 1, got 0."),
        ({"n": 2, "temperature": 0.0}, "n must be 1 when using greedy sampling, got 2."),
        ({"temperature": -0.1}, "temperature must be in [0, 2], got -0.1."),
        ({"temperature": 2.1}, "temperature must be in [0, 2], got 2.1."),
        ({"temperature": math.nan}, "temperature must be a finite number, got nan."),
        ({"temperature": math.inf}, "temperature must be a finite number, got inf."),
        ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0."),
        ({"top_p": 1.1}, "top_p must be in (0, 1], got 1.1."),
        ({"top_p": math.nan}, "top_p must be in (0, 1], got nan."),
        ({"top_k": -2}, "top_k must be 0 (disable), or at least 1, got -2."),
        ({"min_p": -0.1}, "min_p must be in [0, 1], got -0.1."),
        ({"min_p": 1.5}, "min_p must be in [0, 1], got 1.5."),
        ({"presence_penalty": 2.5}, "presence_penalty must be in [-2, 2], got 2.5."),
        ({"frequency_penalty": -3.0}, "frequency_penalty must be in [-2, 2], got -3.0."),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number greater than zero, got 0.0."),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be a finite number greater than zero, got inf."),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0."),
        ({"min_tokens": -1}, "min_tokens must be greater than or equal to 0, got -1."),
        ({"min_tokens": 17}, "min_tokens must be less than or equal to max_tokens=16, got 17."),
        ({"stop": ("a", "")}, "stop cannot contain an empty string."),
        ({"logprobs": -2}, "logprobs must be non-negative or -1, got -2."),
        ({"prompt_logprobs": -2}, "prompt_logprobs must be non-negative or -1, got -2."),
        ({"allowed_token_ids": []}, "allowed_token_ids cannot be empty; None allows all."),
        ({"bad_words": ["a", ""]}, "bad_words cannot contain an empty string."),
        ({"stop": "a", "detokenize": False}, "stop strings need detokenize, which is False."),
        (
            {"logprob_token_ids": [1, 2], "logprobs": 1},
            "logprobs must be 2, the number of logprob_token_ids, got 1.",
        ),
        (
            {"logprob_token_ids": range(129), "logprobs": 129},
            "logprob_token_ids must have 1 to 128 ids, got 129.",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        SamplingParams(**options)
    assert str(refused.value) == sentence


def test_the_edges_may_be_asked() -> None:
    SamplingParams(n=3, temperature=2.0, top_p=1.0, top_k=-1, min_p=1.0, presence_penalty=-2.0, frequency_penalty=2.0)
    SamplingParams(max_tokens=None, min_tokens=10**6, logprobs=-1, prompt_logprobs=0, seed=-1, stop=("a",))
    assert replace(SamplingParams(top_k=-1)).filters is False


def test_values_may_be_given_as_vllm_takes_them() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[3, 4, 3], bad_words=["a", "a"], logit_bias={"7": 1.0})
    assert (params.stop, params.stop_token_ids, params.bad_words) == (("end",), (3, 4), ("a",))
    assert params.logit_bias == {7: 1.0}
    assert SamplingParams(stop=None, stop_token_ids=None, bad_words=None) == SamplingParams()
    params.max_tokens = 0  # set later, it is looked at when it is used
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        replace(params)


def test_a_loop_is_found_where_it_is_one() -> None:
    def found(output: list[int], low: int, high: int, count: int) -> bool:
        asked = RepetitionDetectionParams(min_pattern_size=low, max_pattern_size=high, min_count=count)
        return asked.found(output)

    assert found([9, 1, 2, 1, 2, 1, 2], 0, 2, 3)
    assert not found([9, 1, 2, 1, 2, 1, 2], 0, 2, 4)
    assert not found([1, 2, 1, 2, 1], 1, 1, 2)
    assert found([5, 5], 0, 1, 2)
    assert found([1, 2, 3, 1, 2, 3], 3, 8, 2)
    assert not found([1, 2, 3, 1, 2, 3], 4, 8, 2)
    assert not found([1, 1, 1], 0, 0, 0)
    for values in ((2, 1, 2), (-1, 1, 2), (0, 1, 1)):
        with pytest.raises(ValueError, match="repetition_detection needs"):
            found([], *values)
