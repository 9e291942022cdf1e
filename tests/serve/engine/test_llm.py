"""Offline use with vLLM's names."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm import DecoderLM
from lm.search import generate
from lm.tokenizer import Tokenizer
from serve import LLM, SamplingParams


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, kv_cache_memory_bytes=1 << 24)


def test_generate(llm: LLM, model: DecoderLM, tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=1, prompt_logprobs=0)
    first, second, third = llm.generate(["the fox", {"prompt_token_ids": [5, 6]}, [7]], params)
    assert first.prompt == "the fox"
    for output in (first, second, third):
        (completion,) = output.outputs
        expected = generate(model, [output.prompt_token_ids], params, [tokenizer.eos_id])[0]
        assert completion.token_ids == expected
        assert completion.text == tokenizer.decode(expected)
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(expected)
        assert completion.cumulative_logprob == pytest.approx(
            sum(entry[id].logprob for id, entry in zip(expected, completion.logprobs, strict=True))
        )
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_n_and_a_setting_for_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(n=3, seed=1, max_tokens=5), SamplingParams(max_tokens=None, ignore_eos=True)]
    three, full = llm.generate(["a", "b"], params)
    assert [completion.index for completion in three.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in three.outputs}) == 3
    assert len(full.outputs[0].token_ids) == 255
    assert llm.generate("a", params[0])[0].outputs == three.outputs
    assert len(llm.generate("a")[0].outputs[0].token_ids) <= 16


def test_what_cannot_be(llm: LLM, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="300 tokens; it must have 1 to 255"):
        llm.generate([[1] * 300])
    with pytest.raises(ValueError, match="0 tokens"):
        llm.generate([""])
    with pytest.raises(ValueError, match="token id 999 is out of vocabulary"):
        llm.generate([[999]])
    with pytest.raises(ValueError, match="1 prompts and 2 sampling_params"):
        llm.generate(["a"], [SamplingParams(), SamplingParams()])
    with pytest.raises(ValueError, match="colour"):
        LLM(folder, colour="red")
    with pytest.raises(ValueError, match=r"config\.json"):
        LLM(tmp_path)
    assert not llm.engine.has_work
