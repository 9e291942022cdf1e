"""What a request may ask of a beam search (`use_beam_search`), whose width is n."""

from __future__ import annotations

from typing import Any

from serve.api import sampling
from serve.api.model import Model
from serve.api.protocol import GenerationRequest
from serve.engine.messages import BeamSearchParams
from serve.engine.requests import beam_tokens
from serve.errors import InvalidRequest

# Fields that would have changed a sample and that a search does not look at, with the values that ask for nothing.
# (temperature, top_p, top_k, min_p and seed say how to draw; nothing is drawn, and they are passed over, as in vLLM.)
NOT_SEARCHED: dict[str, tuple[Any, ...]] = {
    "stop": (None, "", []),
    "stop_token_ids": (None, []),
    "min_tokens": (0,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "logprob_token_ids": (None,),
    "repetition_detection": (None,),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "prompt_logprobs": (None,),
}


def params(
    body: GenerationRequest,
    model: Model,
    prompt: int,
    *,
    max_tokens: int,
    logprobs: int | None,
) -> BeamSearchParams:
    """The search that is asked for, over a prompt of `prompt` tokens.

    Raises InvalidRequest.
    """
    if body.stream:
        raise InvalidRequest("Streaming is not currently supported with beam search", "stream")
    for name, silent in NOT_SEARCHED.items():
        value = getattr(body, name)
        if value not in silent:
            raise InvalidRequest(f"{name} is {str(value)[:50]}; a beam search does not look at it.", name)
    sampling.check_logprobs(logprobs, "sample", model)
    try:
        made = BeamSearchParams(
            beam_width=sampling.count(body),
            max_tokens=max_tokens,
            length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
            ignore_eos=body.ignore_eos,
            include_stop_str_in_output=body.include_stop_str_in_output,
            skip_special_tokens=body.skip_special_tokens,
            logprobs=logprobs,
        )
    except ValueError as error:
        sentence = str(error).replace("beam_width", "n")
        raise InvalidRequest(sentence, sentence.split()[0]) from None
    _check_size(made, model, prompt)
    return made


def _check_size(params: BeamSearchParams, model: Model, prompt: int) -> None:
    """Raises InvalidRequest for a search that could not run even alone."""
    width, ready = params.beam_width, model.ready
    most = min(ready.max_num_seqs, ready.max_num_batched_tokens, ready.vocab_size // 2)
    if width > most:
        raise InvalidRequest(f"n is {width}; this server searches with a beam of {most} at most.", "n")
    if prompt > ready.max_num_batched_tokens:
        raise InvalidRequest(
            f"A beam search reads its prompt in one step, of at most {ready.max_num_batched_tokens} tokens; "
            f"this one has {prompt}.",
            "prompt",
        )
    needed, capacity = beam_tokens(prompt, params.max_tokens, params), (ready.blocks - 1) * ready.block_size
    if needed > capacity:
        raise InvalidRequest(
            f"A beam of {width} over {prompt} tokens and {params.max_tokens} more needs {needed} tokens of the cache, "
            f"which holds {capacity}; ask for a smaller n or max_tokens.",
            "n",
        )
