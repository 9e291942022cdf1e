"""What drawn tokens make of a request: its text, and whether it has come to an end.

A sequence ends by EOS, a stop token, a stop string, its grammar, its length or a loop that it is caught in, looked for
in this order and token by token: of several tokens that a step gave, those after the end are as if they had not been
drawn. The EOS at which a grammar ends is an end for those, too, who ignore EOS or want more tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from serve.engine.detokenizer import Match
from serve.engine.grammar import Impossible
from serve.engine.messages import Output, Timings
from serve.engine.requests import Request
from serve.engine.sampler import NOTHING, Drawn

NO_TOKEN = "allowed_token_ids, bad_words, min_tokens and the grammar leave no token to go on with."


def take(request: Request, drawn: Sequence[Drawn], eos: Sequence[int]) -> Output:
    """Adds tokens to the request's output, up to the one that ends it. `eos`: the ids that end a sequence, of which
    the first is no stop reason. Raises Impossible where no token could be drawn.
    """
    output = Output(id=request.id)
    if not request.first_token:
        request.first_token = time.monotonic()
    if not request.output:
        output.prompt_logprobs, output.cached = request.prompt_logprobs, request.cached
    for token, logprobs in drawn:
        if request.failure is not None or token == NOTHING:
            raise Impossible(request.failure or NO_TOKEN)
        if request.rule is not None:
            request.rule.accept(token)
        request.output.append(token)
        output.tokens.append(token)
        if logprobs is not None:
            output.logprobs = [logprobs] if output.logprobs is None else [*output.logprobs, logprobs]
        _read(request, output, token, eos)
        if output.finish_reason is not None:
            break
    return output


def only_prompt(request: Request) -> Output:
    """The output of a request that wanted no token."""
    output = Output(id=request.id, prompt_logprobs=request.prompt_logprobs, cached=request.cached)
    _end(request, output, "length")
    return output


def _read(request: Request, output: Output, token: int, eos: Sequence[int]) -> None:
    """Adds a token's text; sets finish_reason if the token is the last."""
    params = request.params
    length = len(request.output)
    complete = request.rule is not None and request.rule.ended
    enough = complete or length >= params.min_tokens
    if enough:
        ends = (complete or not params.ignore_eos) and token in eos
        if ends or token in params.stop_token_ids:
            # The token that stops is shown as an id; as text only on request.
            text = request.detokenizer.feed(token) if params.include_stop_str_in_output else ""
            _end(request, output, "stop", None if ends and token == eos[0] else token, text)
            return
    text = request.detokenizer.feed(token)
    if enough and params.stop:
        passed = request.stops.feed(text)
        if isinstance(passed, Match):
            output.text += passed.text
            _close(request, output, "stop", passed.stop)
            return
        text = passed
    output.text += text
    loop = params.repetition_detection
    if complete:  # of a model without EOS
        _end(request, output, "stop")
    elif length >= request.limit:
        _end(request, output, "length")
    elif enough and loop is not None and loop.found(request.output):
        _end(request, output, "repetition", "repetition_detected")


def _end(request: Request, output: Output, reason: str, stop: int | str | None = None, text: str = "") -> None:
    """Ends it where no stop string did: what was held back is text after all."""
    rest = request.stops.feed(text + request.detokenizer.finish())
    if isinstance(rest, Match):  # complete only now that an unfinished character has been given up
        output.text += rest.text
        reason, stop = "stop", rest.stop
    else:
        output.text += rest + request.stops.finish()
    _close(request, output, reason, stop)


def _close(request: Request, output: Output, reason: str, stop: int | str | None) -> None:
    now = time.monotonic()
    output.finish_reason, output.stop_reason = reason, stop
    output.timings = Timings(request.arrival, request.scheduled, request.first_token or now, now, request.preemptions)
