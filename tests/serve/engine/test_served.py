"""The served model against lm's own, whatever a DecoderConfig can say; and that company changes no bit of an answer."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lm import DecoderConfig, DecoderLM
from lm.attention import CausalAttend
from lm.config import ACTIVATIONS, BIASES, NORMS, POSITIONS
from lm.params import SamplingParams
from serve.engine import kernels
from serve.engine.kernels import library
from serve.engine.pages import Pages
from serve.engine.requests import Request
from serve.engine.runner import PagedRunner
from serve.engine.scheduler import Share
from serve.engine.served import ServedLM, serve_model

VARIANTS = [variant for variant in library.NEEDS if library.load(variant)]
CONFIG = DecoderConfig(
    vocab_size=67, context=64, layers=2, width=48, heads=6, kv_heads=2, window=9, window_pattern="SL"
)


@contextmanager
def variant(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEED_KERNELS", name)
        yield


def made(config: DecoderConfig) -> DecoderLM:
    torch.manual_seed(0)
    model = DecoderLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def in_dtype(model: DecoderLM, dtype: torch.dtype) -> DecoderLM:
    """A copy whose weights are rounded; the table of positions stays, as lm.pretrained leaves it."""
    other = copy.deepcopy(model).to(dtype)
    other.positions = model.positions
    return other


@torch.inference_mode()
def answers(model: DecoderLM, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model.logits(model.hidden(tokens, positions, CausalAttend(model.config.windows()))).float()


@st.composite
def configs(draw: st.DrawFn) -> DecoderConfig:
    kv, positions = draw(st.integers(1, 2)), draw(st.sampled_from(POSITIONS))
    window = draw(st.none() | st.integers(1, 8))
    return DecoderConfig(
        vocab_size=draw(st.integers(2, 70)),
        context=32,
        layers=2,
        width=2 * draw(st.integers(1, 40)),
        heads=kv * draw(st.integers(1, 3)),
        kv_heads=kv,
        head_dim=2 * draw(st.integers(1, 24)),
        mlp_width=draw(st.integers(1, 100)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        norm=draw(st.sampled_from(NORMS)),
        positions=positions,
        rope_pattern=draw(st.sampled_from(["R", "RN"])) if positions == "rotary" else "R",
        qk_norm=draw(st.booleans()),
        window=window,
        window_pattern="L" if window is None else "SL",
        tie_embeddings=draw(st.booleans()),
        bias=draw(st.sampled_from(sorted(BIASES))),
        softcap=draw(st.none() | st.floats(1, 30)),
    )


@settings(max_examples=25, deadline=None)
@given(config=configs(), name=st.sampled_from([*VARIANTS, "off"]), batch=st.integers(1, 3), length=st.integers(1, 9))
def test_what_is_served_is_lms_own(config: DecoderConfig, name: str, batch: int, length: int) -> None:
    model = made(config)
    tokens = torch.randint(config.vocab_size, (batch, length))
    right = answers(model, tokens)
    with variant(name):
        served = answers(serve_model(copy.deepcopy(model)), tokens)
        torch.testing.assert_close(served, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))

        rounded = in_dtype(model, torch.bfloat16)
        right = answers(in_dtype(rounded, torch.float32), tokens)
        off = (answers(rounded, tokens) - right).norm()
        assert (answers(serve_model(rounded), tokens) - right).norm() < 1.5 * off + 0.01 * right.norm()
        if name != "off":
            eighth = answers(serve_model(in_dtype(model, torch.bfloat16), "int8"), tokens)
            assert (eighth - right).norm() < 0.2 * right.norm() + 1.5 * off


def logits(model: ServedLM, steps: list[list[tuple[int, int, int]]], prompts: list[list[int]]) -> dict[int, Tensor]:
    """The logits after each prompt: steps of shares (prompt, start, length)."""
    pages = Pages.of(model, blocks=1 + 4 * len(prompts), size=16)
    runner = PagedRunner(model, pages)
    requests = [Request(id=str(i), prompt=prompt, params=SamplingParams()) for i, prompt in enumerate(prompts)]
    for i, request in enumerate(requests):
        request.table = list(range(1 + 4 * i, 5 + 4 * i))
    found = {}
    with torch.inference_mode():
        for step in steps:
            forward = runner.run([Share(requests[i], start, length) for i, start, length in step])
            row = 0
            for share, count in zip(forward.shares, forward.counts, strict=True):
                found[int(share.request.id)] = forward.logits[row + count - 1].clone()
                row += count
    return found


@pytest.mark.skipif(not VARIANTS, reason="the kernels are not compiled")
@settings(max_examples=25, deadline=None)
@given(
    config=configs(),
    name=st.sampled_from(VARIANTS),
    numbers=st.sampled_from([(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8")]),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
)
def test_all_layers_in_one_call_are_the_layers_one_by_one(
    config: DecoderConfig, name: str, numbers: tuple[torch.dtype, str | None], lengths: list[int]
) -> None:
    prompts = [torch.randint(config.vocab_size, (length,)).tolist() for length in lengths]
    # A step that asks for no row, one that asks for some, one that asks for all.
    cut = [(i, 0, length - 1) for i, length in enumerate(lengths) if length > 1]
    some = [(0, lengths[0] - 1, 1), *((i, 0, length - 1) for i, length in enumerate(lengths) if i and length > 1)]
    rest = [(i, length - 1, 1) for i, length in enumerate(lengths)]
    steps = [step for step in (cut, some, rest) if step]
    with variant(name):
        model = serve_model(in_dtype(made(config), numbers[0]), numbers[1])
        together = [logits(model, steps[: i + 1], prompts) for i in range(len(steps))]
        model._layers = None
        one_by_one = [logits(model, steps[: i + 1], prompts) for i in range(len(steps))]
    assert together[-1].keys() == set(range(len(prompts)))
    for found, right in zip(together, one_by_one, strict=True):
        assert found.keys() == right.keys()
        for i in found:
            assert torch.equal(found[i], right[i])


@pytest.mark.skipif(not VARIANTS, reason="the kernels are not compiled")
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("numbers", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8")])
@pytest.mark.parametrize("threads", [2, 3])
def test_a_team_of_threads_finds_what_one_finds(
    name: str, numbers: tuple[torch.dtype, str | None], threads: int
) -> None:
    config = replace(CONFIG, width=192, head_dim=32, mlp_width=512, qk_norm=True)
    prompts = [list(range(i, i + 40)) for i in range(5)]
    steps = [[(i, 0, 39) for i in range(4)], [(0, 39, 1), (1, 39, 1), (4, 0, 40)], [(2, 39, 1)], [(3, 39, 1)]]
    before = torch.get_num_threads()
    with variant(name):
        model = serve_model(in_dtype(made(config), numbers[0]), numbers[1])
        try:
            torch.set_num_threads(1)
            alone = logits(model, steps, prompts)
            torch.set_num_threads(threads)
            together = logits(model, steps, prompts)
        finally:
            torch.set_num_threads(before)
    assert alone.keys() == together.keys() == set(range(5))
    for i, found in together.items():
        assert torch.equal(found, alone[i])


@pytest.mark.skipif(not VARIANTS, reason="the kernels are not compiled")
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_company_changes_no_bit(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(VARIANTS))
    dtype, quantization = data.draw(
        st.sampled_from([(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8")])
    )
    prompts = [
        data.draw(st.lists(st.integers(0, 66), min_size=n, max_size=n))
        for n in data.draw(st.lists(st.integers(1, 60), min_size=2, max_size=6))
    ]
    with variant(name):
        model = serve_model(in_dtype(made(CONFIG), dtype), quantization)
        if not model.invariant:  # bfloat16 without its instructions
            return
        alone = {i: logits(model, [[(i, 0, len(prompts[i]))]], prompts)[i] for i in range(len(prompts))}
        together = logits(model, [[(i, 0, len(prompt)) for i, prompt in enumerate(prompts)]], prompts)
        cuts = [data.draw(st.integers(0, len(prompt) - 1)) for prompt in prompts]
        chunked = logits(
            model,
            [
                [(i, 0, cut) for i, cut in enumerate(cuts) if cut] or [(0, 0, len(prompts[0]))],
                [(i, cut, len(prompts[i]) - cut) for i, cut in enumerate(cuts)],
            ],
            prompts,
        )
    for i in range(len(prompts)):
        assert torch.equal(alone[i], together[i])
        assert torch.equal(alone[i], chunked[i])


@pytest.mark.parametrize("tied", [True, False])
def test_no_weight_is_held_twice(tied: bool) -> None:
    model = made(replace(CONFIG, tie_embeddings=tied))
    kept = {"embed_tokens.weight", "norm.weight"}
    held = {name: weakref.ref(p) for name, p in model.named_parameters() if "layernorm" not in name}
    served = serve_model(model)
    assert {name for name, parameter in held.items() if parameter() is not None} == kept
    assert served.embed_tokens.weight is held["embed_tokens.weight"]()


@pytest.mark.skipif(kernels.available() is None, reason="the kernels are not compiled")
def test_a_draft_has_logits_after_each_of_its_tokens() -> None:
    model = serve_model(made(CONFIG))
    pages = Pages.of(model, blocks=9, size=16)
    runner = PagedRunner(model, pages)
    known, draft = [1, 2, 3, 4, 5], [6, 7, 8]
    request = Request(id="", prompt=known, params=SamplingParams(), draft=draft)
    request.table = [1]
    other = Request(id="other", prompt=known[:2], params=SamplingParams())
    other.table = [2]
    with torch.inference_mode():
        forward = runner.run([Share(request, 0, 8), Share(other, 0, 2)])
    assert forward.counts == [4, 1]
    for drafted in range(4):
        sequence = known + draft[:drafted]
        assert torch.equal(forward.logits[drafted], logits(model, [[(0, 0, len(sequence))]], [sequence])[0])


@pytest.mark.skipif(kernels.available() is None, reason="the kernels are not compiled")
@pytest.mark.parametrize(("layer", "of"), [(0, "mlp.down_proj"), (-1, "mlp.down_proj"), (-1, "self_attn.v_proj")])
def test_what_is_no_number_is_seen_wherever_it_arises(layer: int, of: str) -> None:
    model = made(CONFIG)
    with torch.no_grad():
        model.layers[layer].get_submodule(of).weight.fill_(torch.inf)
    served = serve_model(model)
    runner = PagedRunner(served, Pages.of(served, blocks=6, size=16))
    request = Request(id="a", prompt=list(range(20)), params=SamplingParams())
    request.table = [1, 2]
    with torch.inference_mode():
        assert runner.run([Share(request, 0, 20)]).broken == [request]
        unasked = runner.run([Share(request, 0, 12)]).broken
    # Of rows that nobody asks for, what the last attention has left in the cache is all that is computed.
    assert unasked == ([] if (layer, of) == (-1, "mlp.down_proj") else [request])


@pytest.mark.skipif(kernels.available() is None, reason="the kernels are not compiled")
def test_company_breaks_nobody() -> None:
    model = made(CONFIG)
    with torch.no_grad():  # token 7 alone has something in channel 0, of which the last MLP makes what is no number
        model.embed_tokens.weight[:, 0] = 0
        model.embed_tokens.weight[7, 0] = 100
        for layer in model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        model.layers[-1].post_attention_layernorm.weight[0] = 1e30
    served = serve_model(model)

    def broken(own: list | None, others: list | None) -> list[str]:
        """own, others: the probabilities of their prompts so far, None where they are not asked for."""
        runner = PagedRunner(served, Pages.of(served, blocks=6, size=16))
        requests = []
        for i, (prompt, found) in enumerate([([1, 2, 7, 3, 4, 5], own), ([9, 10, 11], others)]):
            requests.append(Request(id=f"{i}", prompt=prompt, params=SamplingParams(), table=[1 + i]))
            requests[-1].prompt_logprobs = found
        with torch.inference_mode():
            forward = runner.run([Share(request, 0, len(request.prompt)) for request in requests])
            rows = [prompt.logits.shape[0] for prompt in forward.prompts]
        assert rows == [5] * (own is not None) + [2] * (others is not None)
        return [request.id for request in forward.broken]

    assert broken([], None) == ["0"]  # the row is asked for
    assert broken(None, None) == broken(None, []) == []
