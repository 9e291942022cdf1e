"""The engine against the model alone: the same tokens and probabilities whoever shares the batch; faults stay apart."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from lm import DecoderConfig, DecoderLM, SamplingParams
from lm.params import RepetitionDetectionParams
from lm.search import generate
from lm.tokenizer import Tokenizer
from serve.engine.engine import Engine
from serve.engine.messages import Add, Output
from serve.engine.runner import Forward
from serve.engine.scheduler import Share

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


def prompts(vocab: int, lengths: Sequence[int] = (1, 3, 17, 40, 64, 5, 9, 33, 2)) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(vocab) for _ in range(length)] for length in lengths]


def run(engine: Engine, adds: Sequence[Add]) -> dict[str, list[Output]]:
    """All outputs by id; the block manager's invariant is checked after every step."""
    for add in adds:
        engine.add(add)
    outputs: dict[str, list[Output]] = {id: [] for id in [add.id for add in adds] or engine._requests}
    while engine.has_work:
        for output in engine.step().outputs:
            outputs[output.id].append(output)
        engine.blocks.check([request.table for request in engine.scheduler])
    assert engine.blocks.free == engine.blocks.count - 1
    return outputs


def tokens(outputs: Sequence[Output]) -> list[int]:
    assert all(output.error is None for output in outputs)
    return [token for output in outputs for token in output.tokens]


@pytest.mark.parametrize(
    ("budget", "blocks", "size", "seats"),
    [(2048, 200, 16, 9), (2048, 200, 16, 1), (7, 200, 16, 6), (16, 12, 16, 6), (64, 70, 3, 4), (1, 200, 64, 9)],
)
def test_greedy_is_the_models_own_however_it_is_batched(
    model: DecoderLM, tokenizer: Tokenizer, budget: int, blocks: int, size: int, seats: int
) -> None:
    engine = Engine(
        model,
        tokenizer,
        max_model_len=100,
        max_num_seqs=seats,
        max_num_batched_tokens=budget,
        blocks=blocks,
        block_size=size,
    )
    given = prompts(tokenizer.vocab_size)
    outputs = run(engine, [Add(str(i), prompt, GREEDY, 0.0) for i, prompt in enumerate(given)])
    for i, prompt in enumerate(given):
        assert tokens(outputs[str(i)]) == generate(model, [prompt], GREEDY)[0]
        assert outputs[str(i)][-1].finish_reason == "length"


def test_a_tight_cache_preempts_and_says_how_often(model: DecoderLM, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, max_model_len=100, blocks=9, block_size=16, max_num_seqs=8)
    outputs = run(engine, [Add(str(i), [i + 1] * 15, replace(GREEDY, max_tokens=60), 0.0) for i in range(5)])
    assert engine.scheduler.preemptions > 0
    ends = [output[-1].timings for output in outputs.values()]
    assert sum(timings.preemptions for timings in ends if timings) == engine.scheduler.preemptions


def test_a_seeded_sample_is_the_same_alone_and_in_company(model: DecoderLM, tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.9, top_k=40, seed=11, max_tokens=24, ignore_eos=True)
    given = prompts(tokenizer.vocab_size)
    alone = Engine(model, tokenizer, blocks=200)
    expected = tokens(run(alone, [Add("x", given[3], params, 0.0)])["x"])
    assert expected == generate(model, [given[3]], params)[0]
    company = [Add(str(i), prompt, replace(params, seed=None), 0.0) for i, prompt in enumerate(given)]
    crowded = Engine(model, tokenizer, blocks=200, max_num_batched_tokens=50, seed=5)
    assert tokens(run(crowded, [*company, Add("x", given[3], params, 0.0)])["x"]) == expected


def test_without_a_seed_the_engines_own_decides(model: DecoderLM, tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True)

    def sample(seed: int) -> list[list[int]]:
        engine = Engine(model, tokenizer, blocks=200, seed=seed)
        outputs = run(engine, [Add(str(i), [1, 2], params, 0.0) for i in range(3)])
        return [tokens(outputs[str(i)]) for i in range(3)]

    one, again, other = sample(1), sample(1), sample(2)
    assert one == again
    assert one != other
    assert one[0] != one[1]


def logits(model: DecoderLM, ids: list[int]) -> torch.Tensor:
    """[T, V]: what each token leaves for the next, by the model's contiguous cache."""
    with torch.inference_mode():
        state = model.start(torch.tensor([ids]))
        whole = [model.step(torch.tensor([ids[-1:]]), state)[0][0, -1]]
        for end in range(len(ids) - 1, 0, -1):
            state = model.start(torch.tensor([ids[:end]]))
            whole.append(model.step(torch.tensor([[ids[end - 1]]]), state)[0][0, -1])
    return torch.stack(whole[::-1])


@pytest.mark.parametrize("budget", [2048, 5])
def test_logprobs_are_the_log_softmax(model: DecoderLM, tokenizer: Tokenizer, budget: int) -> None:
    prompt = prompts(tokenizer.vocab_size)[2]
    params = replace(GREEDY, temperature=0.7, seed=3, max_tokens=6, logprobs=3, prompt_logprobs=2)
    engine = Engine(model, tokenizer, blocks=200, max_num_batched_tokens=budget)
    # A companion that asks for none, so that rows are picked out of the batch.
    outputs = run(engine, [Add("other", [5, 6, 7], GREEDY, 0.0), Add("x", prompt, params, 0.0)])["x"]
    ids = prompt + tokens(outputs)
    expected = torch.log_softmax(logits(model, ids[:-1]), dim=-1)

    entries = [entry for output in outputs for entry in output.logprobs or []]
    shown = [entry for output in outputs for entry in output.prompt_logprobs or []]
    assert shown[0] is None
    assert len(shown) == len(prompt)
    for position, entry in enumerate([*shown[1:], *entries]):
        assert entry is not None
        row, k = expected[position], 2 if position < len(prompt) - 1 else 3
        assert entry.token == ids[position + 1]
        assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-4)
        assert entry.rank == int((row > row[entry.token]).sum()) + 1
        best = row.topk(k)
        assert [id for id, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_the_prompt_alone_is_scored_and_nothing_drawn(model: DecoderLM, tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=None, prompt_logprobs=1)
    engine = Engine(model, tokenizer, max_model_len=40, blocks=200)
    (output,) = run(engine, [Add("x", [1] * 40, params, 0.0, generate=False)])["x"]
    assert (output.tokens, output.text, output.finish_reason) == ([], "", "length")
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 40


def test_prompt_logprobs_survive_preemption(model: DecoderLM, tokenizer: Tokenizer) -> None:
    params = replace(GREEDY, max_tokens=40, prompt_logprobs=0)
    engine = Engine(model, tokenizer, max_model_len=100, blocks=8, block_size=16, max_num_batched_tokens=20)
    outputs = run(engine, [Add(str(i), [i + 1] * 30, params, 0.0) for i in range(3)])
    assert engine.scheduler.preemptions > 0
    for output in outputs.values():
        assert [len(o.prompt_logprobs) for o in output if o.prompt_logprobs is not None] == [30]


def test_ends(model: DecoderLM, tokenizer: Tokenizer) -> None:
    prompt = prompts(tokenizer.vocab_size)[4]
    free = generate(model, [prompt], GREEDY)[0]
    third = free[2]
    first_at = free.index(third)

    def end(eos: Sequence[int] = (), **changes: object) -> tuple[list[int], str | None, int | str | None]:
        engine = Engine(model, tokenizer, eos=eos, blocks=200)
        outputs = run(engine, [Add("x", prompt, replace(GREEDY, **changes), 0.0)])["x"]
        return tokens(outputs), outputs[-1].finish_reason, outputs[-1].stop_reason

    assert end() == (free, "length", None)
    assert end(stop_token_ids=(third,)) == (free[: first_at + 1], "stop", third)
    assert end(eos=(third,), ignore_eos=False) == (free[: first_at + 1], "stop", None)
    assert end(eos=(third,), ignore_eos=True) == (free, "length", None)
    assert end(eos=(9999, third), ignore_eos=False) == (free[: first_at + 1], "stop", third)
    # Until min_tokens are there, tokens that would end it cannot be drawn at all.
    later, reason, _ = end(eos=(third,), ignore_eos=False, min_tokens=10)
    assert third not in later[:10]
    assert reason in ("stop", "length")
    assert len(later) >= 10


def test_a_stop_string_ends_the_request_inside_the_step(model: DecoderLM, tokenizer: Tokenizer) -> None:
    prompt = prompts(tokenizer.vocab_size)[3]

    def outputs(**changes: object) -> list[Output]:
        engine = Engine(model, tokenizer, blocks=200)
        return run(engine, [Add("x", prompt, replace(GREEDY, max_tokens=60, **changes), 0.0)])["x"]

    text = "".join(output.text for output in outputs())
    assert len(text) > 12
    for begin in range(4, 9):
        stop = text[begin : begin + 3]
        at = text.find(stop)
        stopped = outputs(stop=(stop, "never this"))
        assert "".join(output.text for output in stopped) == text[:at]
        assert (stopped[-1].finish_reason, stopped[-1].stop_reason) == ("stop", stop)
        including = outputs(stop=(stop,), include_stop_str_in_output=True)
        assert "".join(output.text for output in including) == text[: at + len(stop)]
        assert len(tokens(stopped)) == len(tokens(including)) <= 60


def test_an_abort_frees_everything_at_once(model: DecoderLM, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, blocks=200, max_num_seqs=2)
    for i in range(4):
        engine.add(Add(str(i), [1, 2, 3], replace(GREEDY, max_tokens=200), 0.0))
    engine.step()
    engine.abort(["0", "1", "2", "3", "unknown"])
    assert not engine.has_work
    assert engine.blocks.usage == 0
    assert engine.step().outputs == []


class Poison(torch.nn.Module):
    """An embedding that gives what is no number for one token."""

    def __init__(self, inner: torch.nn.Module, token: int) -> None:
        super().__init__()
        self.inner, self.token = inner, token

    @property
    def weight(self) -> torch.Tensor:
        return self.inner.weight  # type: ignore[return-value]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids).masked_fill((ids == self.token).unsqueeze(-1), torch.nan)


def test_a_request_that_fails_fails_alone(
    model: DecoderLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [[id for id in prompt if id != 7] or [1] for prompt in prompts(tokenizer.vocab_size)]
    expected = [generate(model, [prompt], replace(GREEDY, logit_bias={7: -100.0}))[0] for prompt in given]
    monkeypatch.setitem(model._modules, "embed_tokens", Poison(model.embed_tokens, 7))
    engine = Engine(model, tokenizer, blocks=40, block_size=4, max_model_len=100, max_num_seqs=4)
    adds = []
    for i, prompt in enumerate(given):
        adds.append(Add(str(i), prompt, replace(GREEDY, logit_bias={7: -100.0}), 0.0))
        adds.append(Add(f"bad-{i}", [1, 7, 3], GREEDY, 0.0))
    outputs = run(engine, adds)
    for i in range(len(given)):
        (bad,) = outputs[f"bad-{i}"]
        assert bad.finish_reason == "error"
        assert bad.error is not None
        assert "not a number" in bad.error
        assert tokens(outputs[str(i)]) == expected[i]


def test_an_exception_in_a_step_ends_its_requests_and_the_engine_goes_on(
    model: DecoderLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, tokenizer, blocks=200)
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", lambda shares: 1 / 0)
        (output,) = run(engine, [Add("x", [1], GREEDY, 0.0)])["x"]
        assert (output.finish_reason, output.error) == ("error", "ZeroDivisionError: division by zero")
    assert len(tokens(run(engine, [Add("x", [1], GREEDY, 0.0)])["x"])) == 20


def test_what_is_no_number_in_the_middle_of_a_prompt_is_found_by_nobody(
    model: DecoderLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read in chunks, and the windows of the layers do not reach from its end to where it went wrong."""
    monkeypatch.setitem(model._modules, "embed_tokens", Poison(model.embed_tokens, 7))
    engine = Engine(model, tokenizer, blocks=40, block_size=4, max_num_batched_tokens=8)
    bad = [*range(10, 26), 7, *[3] * 100]
    for _ in range(2):
        (output,) = run(engine, [Add("bad", bad, GREEDY, 0.0)])["bad"]
        assert "not a number" in (output.error or "")
        assert engine.scheduler.prefixes.hits == 0
    for tensor in engine.runner.pages.keys + engine.runner.pages.values:
        assert bool(torch.isfinite(tensor).all())
    assert len(tokens(run(engine, [Add("good", bad[:16], replace(GREEDY, logit_bias={7: -100}), 0.0)])["good"])) == 20


def lacking(most: int) -> Callable[[Callable], Callable]:
    """Makes `run` of a runner that has memory for so many tokens a step."""

    def wrap(run: Callable) -> Callable:
        def limited(shares: Sequence[Share]) -> Forward:
            if sum(share.length for share in shares) > most:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
            return run(shares)

        return limited

    return wrap


def test_lack_of_memory_makes_steps_smaller_and_ends_nobody(
    model: DecoderLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, tokenizer, blocks=200)
    monkeypatch.setattr(engine.runner, "run", lacking(64)(engine.runner.run))
    given = prompts(tokenizer.vocab_size)
    outputs = run(engine, [Add(str(i), prompt, GREEDY, 0.0) for i, prompt in enumerate(given)])
    assert engine.scheduler.preemptions > 0
    for i, prompt in enumerate(given):
        assert tokens(outputs[str(i)]) == generate(model, [prompt], GREEDY)[0]


def test_a_request_for_which_memory_lacks_even_alone_ends(
    model: DecoderLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, tokenizer, blocks=200)
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", lacking(0)(engine.runner.run))
        outputs = run(engine, [Add(str(i), [1, 2, 3], GREEDY, 0.0) for i in range(3)])
        assert all("not enough memory" in (output.error or "") for (output,) in outputs.values())
    assert len(tokens(run(engine, [Add("x", [1], GREEDY, 0.0)])["x"])) == 20


def test_a_fault_in_one_requests_text_ends_that_one(model: DecoderLM, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, blocks=200)
    for id in ("good", "bad"):
        engine.add(Add(id, [1, 2, 3], GREEDY, 0.0))
    engine._requests["bad"].detokenizer = None
    outputs = run(engine, [])
    assert "AttributeError" in (outputs["bad"][-1].error or "")
    assert tokens(outputs["good"]) == generate(model, [[1, 2, 3]], GREEDY)[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}], ids=str)
def test_a_request_that_leaves_itself_no_token_ends_alone(
    model: DecoderLM, tokenizer: Tokenizer, temperature: float, filters: dict[str, float]
) -> None:
    engine = Engine(model, tokenizer, blocks=200)
    none = {"allowed_token_ids": (5,), "stop_token_ids": (5,), "min_tokens": 3, "temperature": temperature, **filters}
    outputs = run(engine, [Add("bad", [1, 2], replace(GREEDY, **none), 0.0), Add("good", [1, 2, 3], GREEDY, 0.0)])
    assert "leave no token to go on with" in (outputs["bad"][0].error or "")
    assert tokens(outputs["good"]) == generate(model, [[1, 2, 3]], GREEDY)[0]


def test_a_step_says_what_it_took(model: DecoderLM, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, blocks=200)
    engine.add(Add("x", [1, 2, 3], GREEDY, 0.0))
    stats = engine.step().stats
    assert 0 < stats.model_seconds < stats.seconds
    assert (stats.tokens, stats.prompt_tokens, stats.generated) == (3, 3, 1)


def test_bad_words_and_allowed_tokens(model: DecoderLM, tokenizer: Tokenizer) -> None:
    prompt = prompts(tokenizer.vocab_size)[3]

    def text(**changes: object) -> str:
        params = replace(GREEDY, max_tokens=60, **changes)
        return "".join(output.text for output in run(Engine(model, tokenizer), [Add("x", prompt, params, 0.0)])["x"])

    free = text()
    word = free[6:9]
    assert word not in text(bad_words=[word, *(word[:end] for end in (1, 2))])
    assert set(text(allowed_token_ids=tokenizer.encode("fox"))) <= set("fox")


def test_logprobs_of_named_tokens_and_of_all(model: DecoderLM, tokenizer: Tokenizer) -> None:
    vocab, ids = tokenizer.vocab_size, (9, 3)
    named = replace(GREEDY, max_tokens=5, logprobs=2, logprob_token_ids=ids)
    every = replace(GREEDY, max_tokens=5, logprobs=-1)
    outputs = run(Engine(model, tokenizer), [Add("named", [1, 2], named, 0.0), Add("all", [1, 2], every, 0.0)])
    entries = {id: [entry for output in each for entry in output.logprobs or []] for id, each in outputs.items()}
    for some, whole in zip(entries["named"], entries["all"], strict=True):
        assert len(whole.top) == vocab
        assert (some.token, some.rank, whole.rank) == (whole.token, 1, 1)
        assert some.logprob == pytest.approx(whole.logprob)
        assert dict(some.top) == pytest.approx({id: value for id, value in whole.top if id in ids})
        assert [id for id, _ in some.top] == list(ids)


def test_a_loop_ends_a_request(model: DecoderLM, tokenizer: Tokenizer) -> None:
    loop = RepetitionDetectionParams(max_pattern_size=2, min_count=3)
    params = replace(GREEDY, allowed_token_ids=(5,), repetition_detection=loop)
    outputs = run(Engine(model, tokenizer), [Add("x", [1], params, 0.0)])["x"]
    last = outputs[-1]
    assert (tokens(outputs), last.finish_reason, last.stop_reason) == ([5, 5, 5], "repetition", "repetition_detected")


def test_what_cannot_be_ends_with_an_error_and_not_an_exception(model: DecoderLM, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, max_model_len=50, blocks=200)
    for prompt, params in (
        ([], GREEDY),
        ([1] * 50, GREEDY),
        ([tokenizer.vocab_size], GREEDY),
        ([1], replace(GREEDY, logit_bias={-1: 1.0})),
        ([1], replace(GREEDY, allowed_token_ids=[tokenizer.vocab_size])),
    ):
        (output,) = run(engine, [Add("x", prompt, params, 0.0)])["x"]
        assert output.finish_reason == "error"
    engine.add(Add("twice", [1], GREEDY, 0.0))
    engine.add(Add("twice", [1], GREEDY, 0.0))
    assert [o.error for o in engine.step().outputs if o.error] == ["a request with the id 'twice' is already running."]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"positions": "learned", "norm": "layer", "activation": "gelu_tanh", "bias": True},
        {"positions": "sinusoidal", "kv_heads": 1, "softcap": 5.0, "activation": "relu2"},
        {"positions": "none", "qk_norm": True, "head_dim": 8, "tie_embeddings": False},
        {"window": 5, "window_pattern": "SSL", "layers": 3},
    ],
    ids=str,
)
def test_every_shape_of_decoder(tokenizer: Tokenizer, shape: dict) -> None:
    torch.manual_seed(1)
    config = DecoderConfig(**{"vocab_size": 337, "context": 64, "layers": 2, "width": 32, "heads": 4, **shape})
    shaped = DecoderLM(config).eval()
    with torch.no_grad():
        for parameter in shaped.parameters():
            parameter.mul_(3)
    given = prompts(337, (1, 20, 7))
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(shaped.to(dtype), tokenizer, blocks=100, block_size=4, max_num_batched_tokens=8)
        outputs = run(engine, [Add(str(i), prompt, GREEDY, 0.0) for i, prompt in enumerate(given)])
        found = [tokens(outputs[str(i)]) for i in range(len(given))]
        assert [len(each) for each in found] == [20, 20, 20]
        if dtype == torch.float32:  # in bfloat16 two paths may round to different winners
            assert found == generate(shaped, given, GREEDY)
