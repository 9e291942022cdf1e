"""What a request may ask, decided in one place, before the engine: whatever passes here can be carried out.

`completion` and `chat` turn a body into the sequences to run, or raise InvalidRequest or NotFound with one sentence;
what they have in common is in prompts.py and sampling.py, what chats alone have in conversation.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lm.params import SamplingParams
from serve.api import beam, conversation, form, prompts, sampling, structured, tools
from serve.api.form import Form
from serve.api.model import Model
from serve.api.prompts import MAX_PROMPTS, Prompt
from serve.api.protocol import ChatRequest, CompletionRequest, GenerationRequest
from serve.api.sampling import MAX_N
from serve.engine.messages import BeamSearchParams, Constraint, Grammar
from serve.engine.requests import children
from serve.errors import InvalidRequest

Params = SamplingParams | BeamSearchParams


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request that can be carried out: n sequences of each prompt."""

    prompts: list[Prompt]
    params: list[Params]  # one for each prompt: they differ in max_tokens
    n: int  # of a beam search, its width
    logprobs: int | None
    prompt_logprobs: bool  # whether the body has them: where they were asked for, or echo with logprobs needed them
    generate: bool = True  # False: echo with max_tokens 0
    role: str = "assistant"  # of a chat: who speaks the answer,
    opening: str = ""  # and what of it stands in the prompt already and is shown again (echo)
    forms: list[Form] = field(default_factory=list)  # one for each prompt: how its answers are bound, and read

    def work(self) -> list[tuple[list[int], Params]]:
        """What the engine is given: each sequence, with a seed of its own, or each beam search."""
        made: list[tuple[list[int], Params]] = []
        for prompt, params in zip(self.prompts, self.params, strict=True):
            if isinstance(params, BeamSearchParams):
                made.append((prompt.ids, params))
            else:
                made += [(prompt.ids, child) for child in children(params, self.n)]
        return made

    @property
    def grammar(self) -> Grammar | None:
        """What all answers have to obey."""
        return self.forms[0].grammar if self.forms else None

    def constraints(self) -> list[Constraint | None]:
        """One for each sequence of `work`, where there are any."""
        made: list[Constraint | None] = [one.constraint for one in self.forms for _ in range(self.n)]
        return made if any(made) else []


def sequences(body: GenerationRequest) -> int:
    """How many sequences a request would be in the engine, as far as that can be told before it is looked at."""
    prompt = body.prompt if isinstance(body, CompletionRequest) else None
    several = isinstance(prompt, list) and len(prompt) > 0 and not isinstance(prompt[0], int)
    count = len(prompt) if several and isinstance(prompt, list) else 1
    return count * body.n if body.n is not None and 0 < body.n <= MAX_N and count <= MAX_PROMPTS else 1


async def completion(body: CompletionRequest, model: Model) -> Job:
    """Raises InvalidRequest (400) or NotFound (404)."""
    _check(body, model)
    only_prompt = bool(body.echo) and body.max_tokens == 0
    if body.use_beam_search and body.echo and (only_prompt or body.logprobs is not None):
        raise InvalidRequest("A beam search gives a prompt no logprobs; use echo without them.", "echo")
    made = await prompts.prompts(body, model)
    wanted = 16 if body.max_tokens is None else body.max_tokens
    prompt_logprobs = body.prompt_logprobs
    if prompt_logprobs is None and body.echo:
        prompt_logprobs = body.logprobs
    params: list[Params] = []
    for prompt in made:
        length = len(prompt.ids)
        longest = None if only_prompt else sampling.max_tokens(wanted, length, model)
        if body.use_beam_search and longest is not None:
            params.append(beam.params(body, model, length, max_tokens=longest, logprobs=body.logprobs))
        else:
            params.append(
                sampling.params(
                    body, model, max_tokens=longest, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs
                )
            )
    grammar = None if only_prompt else await structured.grammar(body, model)
    return Job(
        prompts=made,
        params=params,
        forms=[form.of_completion(body, model, grammar, prompt.ids) for prompt in made],
        n=1 if body.n is None else body.n,
        generate=not only_prompt,
        logprobs=sampling.alternatives(body, body.logprobs),
        prompt_logprobs=prompt_logprobs is not None,
    )


async def chat(body: ChatRequest, model: Model) -> Job:
    """Raises InvalidRequest (400), NotFound (404) or Overloaded (503)."""
    _check(body, model)
    use = tools.check(body, model)
    form.show_marks(body, model, use)
    logprobs = conversation.logprobs(body)
    prompt_logprobs = body.prompt_logprobs
    if prompt_logprobs is None and body.echo and not body.stream:  # a stream has no place for them
        prompt_logprobs = body.top_logprobs
    text = await conversation.render(body, model)
    prompt = await prompts.of_text(text, body, model, special=body.add_special_tokens, param="messages")
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    length = len(prompt.ids)
    longest = sampling.max_tokens(getattr(body, name), length, model, name)
    params: Params
    if body.use_beam_search:
        params = beam.params(body, model, length, max_tokens=longest, logprobs=logprobs)
        prompt_logprobs = None
    else:
        params = sampling.params(
            body,
            model,
            max_tokens=longest,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            logprobs_field="top_logprobs",
        )
    role = conversation.role(body, model)
    forced = None if use is None else await tools.grammar(body, use, model)
    grammar = forced or await structured.grammar(body, model)
    return Job(
        prompts=[prompt],
        params=[params],
        forms=[form.of_chat(body, model, grammar, prompt.ids, use)],
        n=1 if body.n is None else body.n,
        logprobs=sampling.alternatives(body, logprobs),
        prompt_logprobs=prompt_logprobs is not None,
        role=role,
        opening=conversation.opening(body, role) if body.echo else "",
    )


def _check(body: GenerationRequest, model: Model) -> None:
    model.check_name(body.model)
    sampling.refuse(body)
    sampling.widen(body, model)
    if model.ready.source:
        _check_source(body)


def _check_source(body: GenerationRequest) -> None:
    """What cannot be asked of a model that reads its prompt as a source, all at once."""
    if body.prompt_logprobs is not None:
        raise InvalidRequest(
            "prompt_logprobs are not available: this model reads the prompt as a source and gives its tokens no "
            "probabilities.",
            "prompt_logprobs",
        )
    if getattr(body, "echo", False):
        raise InvalidRequest(
            "echo is not available: this model reads the prompt as a source, and its answer does not continue it.",
            "echo",
        )
