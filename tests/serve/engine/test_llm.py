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


def test_a_script_written_for_vllm_runs(folder: Path) -> None:
    """Settings and arguments that concern devices which are not here are taken."""
    llm = LLM(
        model=str(folder),
        dtype="float32",
        tensor_parallel_size=1,
        gpu_memory_utilization=0.9,
        trust_remote_code=True,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 24,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    )
    assert llm.get_default_sampling_params() == SamplingParams()
    params = SamplingParams(temperature=0, max_tokens=4, stop=["never"], logprobs=2, logprob_token_ids=[5, 6])
    (output,) = llm.generate("fox", params, use_tqdm=False, priority=[1])
    assert [set(entry) - {5, 6} for entry in output.outputs[0].logprobs or []] == [
        {id} - {5, 6} for id in output.outputs[0].token_ids
    ]
    assert (
        llm.generate("a fox", params, tokenization_kwargs={"truncate_prompt_tokens": 1})[0].prompt_token_ids
        == (llm.get_tokenizer().encode("a fox")[-1:])
    )
    again = llm.generate({"prompt_token_ids": list(range(40)), "cache_salt": "mine"}, params)[0]
    assert again.num_cached_tokens == 0
    assert llm.generate({"prompt_token_ids": list(range(40)), "cache_salt": "mine"}, params)[0].num_cached_tokens == 32
    assert llm.generate([list(range(40))], params)[0].num_cached_tokens == 0


def test_chat(llm: LLM) -> None:
    chat = [{"role": "user", "content": "the fox"}]
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "u: the fox<|endoftext|>a: "
    params = SamplingParams(temperature=0, max_tokens=6)
    (expected,) = llm.generate({"prompt_token_ids": ids}, params)
    for output in (*llm.chat(chat, params), *llm.chat([chat, chat], params)):
        assert (output.prompt, output.prompt_token_ids) == (text, ids)
        assert output.outputs == expected.outputs
    with pytest.raises(ValueError, match="No strangers, please"):
        llm.chat([{"role": "stranger", "content": "x"}], params)
    (own,) = llm.chat(chat, params, chat_template="{{ messages[0].content }}!")
    assert own.prompt == "the fox!"


def test_what_cannot_be(llm: LLM, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="300 tokens; it must have 1 to 255"):
        llm.generate([[1] * 300])
    with pytest.raises(ValueError, match="0 tokens"):
        llm.generate([""])
    with pytest.raises(ValueError, match="token id 999 is out of vocabulary"):
        llm.generate([[999]])
    with pytest.raises(ValueError, match="1 prompts and 2 sampling_params"):
        llm.generate(["a"], [SamplingParams(), SamplingParams()])
    with pytest.raises(ValueError, match="2 prompts and 1 priority"):
        llm.generate(["a", "b"], priority=[1])
    with pytest.raises(ValueError, match="lora_request is given"):
        llm.generate("a", lora_request="adapter")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has 'padding', which nothing here knows"):
        llm.generate("a", tokenization_kwargs={"padding": True})
    with pytest.raises(ValueError, match="colour is no setting; the settings are tokenizer, dtype"):
        LLM(folder, colour="red")
    with pytest.raises(ValueError, match="tensor_parallel_size is 2"):
        LLM(folder, tensor_parallel_size=2)
    with pytest.raises(ValueError, match="speculative_config must be like"):
        LLM(folder, speculative_config={"method": "eagle"})
    with pytest.raises(ValueError, match=r"config\.json"):
        LLM(tmp_path)
    assert not llm.engine.has_work
