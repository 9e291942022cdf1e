"""The runner of a GPU, on a CPU: the kernels written out, and a forward pass run again for a graph replayed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lm import DecoderConfig, DecoderLM, SamplingParams
from lm.tokenizer import Tokenizer
from serve.engine import gpu_batch, gpu_explicit
from serve.engine.engine import Engine
from serve.engine.gpu_batch import Decoding, Shape, Single
from serve.engine.gpu_graphs import Graphs, sizes
from serve.engine.gpu_runner import GpuRunner, paged_runner
from serve.engine.messages import Add
from serve.engine.pages import Pages
from serve.engine.requests import Request
from serve.engine.runner import PagedRunner
from serve.engine.sampler import NOTHING, Drawn
from serve.engine.scheduler import Share

CPU = torch.device("cpu")
VOCABULARY = 60
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
MODELS: dict[str, dict[str, Any]] = {
    "grouped, windows": {"heads": 4, "kv_heads": 2, "window": 24, "window_pattern": "SL"},
    "three to a group, norms of heads": {"width": 48, "heads": 3, "kv_heads": 1, "qk_norm": True},
    "layers that do not rotate": {"heads": 4, "kv_heads": 4, "rope_pattern": "RN"},
    "GPT-2": {"heads": 4, "positions": "learned", "norm": "layer", "activation": "gelu_tanh", "bias": True},
    "sinusoids, squared ReLU": {"heads": 2, "positions": "sinusoidal", "activation": "relu2"},
}


def run_again(forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What a capture promises, without a graph: each replay computes from the same memory into the same memory."""
    result = forward()

    def replay() -> None:
        result.copy_(forward())

    return replay, result


def make_model(**config: Any) -> DecoderLM:
    torch.manual_seed(0)
    made = DecoderLM(
        DecoderConfig(**{"vocab_size": VOCABULARY, "context": 96, "layers": 2, "width": 64, "heads": 4} | config)
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made.eval()


def gpu_runner(model: DecoderLM, device: str, *, blocks: int = 3, seats: int = 1, longest: int = 16) -> GpuRunner:
    """On a GPU the real one. On a CPU with pages as they lie on a GPU, operations written out, and no graphs."""
    pages = pages_for(model, blocks, device)
    if device == "cuda":
        runner = paged_runner(model, pages, seats=seats, longest=longest)
        assert isinstance(runner, GpuRunner)
        return runner
    limits = {"seats": seats, "longest": longest, "processors": 8}
    return GpuRunner(model, pages, operations=gpu_explicit, capture=run_again, **limits)


def pages_for(model: DecoderLM, blocks: int, device: str) -> Pages:
    config = model.config
    return Pages(
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv,
        dim=config.dim,
        blocks=blocks,
        size=16,
        dtype=torch.float32,
        device=device,
        kernels=None,
    )


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_it_computes_what_the_runner_of_a_cpu_does(config: dict[str, Any], device: str) -> None:
    model, dice = make_model(**config), random.Random(1)
    expected = PagedRunner(model, pages_for(model, 80, "cpu"))
    runner = gpu_runner(copy.deepcopy(model).to(device), device, blocks=80, seats=6, longest=96)
    fresh, count = runner._fresh, [0]

    def counting(shares: Sequence[Share]) -> Tensor:
        count[0] += len(shares)
        return fresh(shares)

    runner._fresh = counting  # type: ignore[method-assign]
    world, alone, total = World(16, 1), 0, 0
    for length in (1, 2, 16, 17, 40):
        prompt = [dice.randrange(VOCABULARY) for _ in range(length)]
        world.running.append(Request(id=str(length), prompt=prompt, params=SamplingParams(), limit=20))
    for _ in range(16):
        shares = []
        for request in world.running:
            if not dice.randrange(16):
                world.preempt(request)
            left = request.known - request.computed
            if left and dice.randrange(7):  # the others wait
                world.grow(request.table, request.known)
                shares.append(Share(request, request.computed, left if left == 1 else dice.randrange(1, left + 1)))
        if not shares:
            continue
        alone += all(share.length == 1 for share in shares)
        total += len(shares)
        theirs, ours = expected.run(shares), runner.run(shares)
        assert ours.shares == theirs.shares
        assert torch.allclose(ours.logits.cpu(), theirs.logits, rtol=1e-3, atol=1e-3)
        assert not ours.broken
        for share in shares:
            share.request.computed = share.start + share.length
        drawn = {
            share.request: [Drawn(int(row.argmax()), None)]
            for share, row in zip(theirs.shares, theirs.logits, strict=True)
        }
        runner.ahead(drawn, world.grow)
        for request, (token,) in drawn.items():
            request.output.append(token.token)
    assert 2 < alone < 16  # graphs, and mixed steps
    assert total / 3 < count[0] < total  # rows that were begun with, and rows that were not


@pytest.mark.parametrize(
    ("tokens", "limit", "room"), [((NOTHING,), 9, True), ((1, 2), 9, True), ((1,), 1, True), ((1,), 9, False)]
)
def test_nothing_is_begun_for_who_does_not_go_on(tokens: tuple[int, ...], limit: int, room: bool) -> None:
    runner = gpu_runner(make_model(), "cpu")
    request = Request(id="", prompt=[1], params=SamplingParams(), table=[1], limit=limit)
    runner.ahead({request: [Drawn(token, None) for token in tokens]}, lambda table, tokens: room)
    assert not runner._begun


def answers(engine: Engine) -> dict[str, tuple[list[int], str | None]]:
    """Prompts of all lengths, more than a step, the cache and the seats hold at once; some are aborted."""
    dice = random.Random(2)
    for n in range(12):
        prompt = [dice.randrange(300) for _ in range(dice.choice((1, 2, 15, 16, 17, 40)))]
        params = SamplingParams(temperature=n % 3 / 2, seed=n, max_tokens=dice.randrange(1, 30), stop=["e", "fo"])
        engine.add(Add(str(n), prompt, params, 0.0))
    found: dict[str, tuple[list[int], str | None]] = {}
    steps = 0
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None
            tokens, _ = found.setdefault(output.id, ([], None))
            found[output.id] = tokens + output.tokens, output.finish_reason
        steps += 1
        if steps == 9:
            engine.abort(["3", "7"])
    engine.blocks.check([])  # nothing is left of what was begun for those who ended
    return {id: answer for id, answer in found.items() if id not in ("3", "7")}


def test_an_engine_that_begins_ahead_answers_the_same(model: DecoderLM, tokenizer: Tokenizer) -> None:
    limits: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 30, "blocks": 12}
    plain, ahead = (Engine(copy.deepcopy(model), tokenizer, eos=[3], **limits) for _ in range(2))
    plain.runner = PagedRunner(model, pages_for(model, 12, "cpu"))
    ahead.runner = gpu_runner(copy.deepcopy(model), "cpu", blocks=12, seats=5, longest=model.config.context)
    assert answers(ahead) == answers(plain)


def test_weights_are_not_held_twice() -> None:
    model = make_model(heads=4)
    before = sum(p.numel() for p in model.parameters())
    gpu_runner(model, "cpu")
    attention = model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()
    assert sum(p.numel() for p in model.parameters()) == before


@given(st.integers(1, 300))
@settings(max_examples=50, deadline=None)
def test_there_is_a_graph_for_any_number_of_rows_up_to_the_most(most: int) -> None:
    assert sizes(most)[-1] == most
    assert sizes(most) == sorted(set(sizes(most)))
    for rows in range(1, most + 1):
        assert next(size for size in sizes(most) if size >= rows) < 2 * rows


class World:
    """Requests that decode, come, go and are preempted, as the scheduler does it to them."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.dice, self.next_block = size, random.Random(seed), 1
        self.running: list[Request] = []

    def grow(self, table: list[int], tokens: int) -> bool:
        while len(table) * self.size < tokens:
            table.append(self.next_block)
            self.next_block += 1
        return True

    def preempt(self, request: Request) -> None:
        request.table.clear()
        request.computed = 0
        request.preemptions += 1

    def shares(self, most: int) -> list[Share]:
        """The next step's, of a token each."""
        for request in self.running:
            if not self.dice.randrange(8):
                self.preempt(request)
        self.running = [request for request in self.running if self.dice.randrange(8)]
        while len(self.running) < self.dice.randrange(1, most + 1):
            prompt = [self.dice.randrange(1, 99) for _ in range(self.dice.randrange(1, 12))]
            self.running.append(Request(id="", prompt=prompt, params=SamplingParams()))
        for request in self.running:
            request.output.append(self.dice.randrange(1, 99))
            self.grow(request.table, request.known)
        return [Share(request, request.known - 1, 1) for request in self.running]


@given(size=st.integers(1, 5), most=st.integers(1, 9), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_what_a_graph_reads_is_the_step_and_padding(size: int, most: int, seed: int) -> None:
    world, decoding = World(size, seed), Decoding(most, 40, size, CPU)
    seen = []

    def forward(inputs: gpu_batch.Inputs) -> Tensor:
        seen.append(inputs)
        return (1000 * inputs.positions + inputs.tokens).unsqueeze(1)

    graphs = Graphs(forward, decoding, run_again, most)
    for _ in range(6):
        shares = world.shares(most)
        result = graphs.run([Single.of(share) for share in shares])
        assert result[:, 0].tolist() == [1000 * s.start + s.request.tokens(s.start, 1)[0] for s in shares]
        given_, count = seen[-1], len(shares)
        expected = gpu_batch.mixed(shares, size, 4, CPU)
        assert given_.singles == len(given_.tokens) == len(given_.tiles)
        for name in ("tokens", "positions", "slots", "tiles"):
            assert torch.equal(getattr(given_, name)[:count], getattr(expected, name)), name
        for n, share in enumerate(shares):
            assert given_.tables[n, : len(share.request.table)].tolist() == share.request.table
        padding = slice(count, None)
        assert not any(x[padding].any() for x in (given_.tokens, given_.positions, given_.slots, given_.tables[:, 0]))
        assert given_.tiles[padding].tolist() == [[n, n, 1, 0] for n in range(count, given_.singles)]


@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=6),
    size=st.integers(1, 8),
    tokens=st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_tiles_cover_each_row_once(lengths: list[tuple[int, int]], size: int, tokens: int) -> None:
    world, shares = World(size, 0), []
    for start, length in lengths:
        request = Request(id="", prompt=list(range(1, start + length + 1)), params=SamplingParams())
        world.grow(request.table, request.known)
        shares.append(Share(request, start, length))
    inputs = gpu_batch.mixed(shares, size, tokens, CPU)
    covered: dict[int, tuple[int, int]] = {}
    for n, (sequence, row, count, position) in enumerate(inputs.tiles.tolist()):
        assert 1 <= count <= (1 if n < inputs.singles else tokens)
        for offset in range(count):
            assert row + offset not in covered
            covered[row + offset] = sequence, position + offset
    expected = [(n, p) for n, share in enumerate(shares) for p in range(share.start, share.start + share.length)]
    assert [covered[row] for row in range(len(inputs.tokens))] == expected
    for row, (sequence, position) in covered.items():
        table = shares[sequence].request.table
        assert inputs.tokens[row] == position + 1
        assert inputs.slots[row] == table[position // size] * size + position % size
        assert inputs.tables[sequence, : position // size + 1].tolist() == table[: position // size + 1]


def test_parts_lie_one_after_the_other() -> None:
    flat = torch.arange(Shape(2, 3, 4, 5).numbers)
    parts = Shape(2, 3, 4, 5).split(flat)
    assert torch.equal(torch.cat([part.flatten() for part in parts]), flat)
    assert [tuple(part.shape) for part in parts] == [(2,), (2,), (2,), (3, 4), (4, 5)]


def test_a_cpu_keeps_its_own_runner(model: DecoderLM) -> None:
    runner = paged_runner(model, pages_for(model, 3, "cpu"), seats=2, longest=16)
    assert type(runner) is PagedRunner
