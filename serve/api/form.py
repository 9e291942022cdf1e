"""What the answers to a prompt are bound to, and how they are read: grammar, thoughts and calls of tools together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serve.api.model import Model
from serve.api.protocol import ChatRequest, CompletionRequest, GenerationRequest
from serve.api.reading import Reading
from serve.api.tools import ToolUse
from serve.engine.messages import Constraint, Grammar
from serve.errors import InvalidRequest

LONGEST_BUDGET = 2**31  # tokens of thinking: more than any context has


@dataclass(frozen=True)
class Form:
    """`constraint` is what the engine holds an answer to, and names the `grammar`; `reading` is how it is shown, where
    that is not simply as text.
    """

    grammar: Grammar | None = None
    constraint: Constraint | None = None
    reading: Reading | None = None


def of_completion(body: CompletionRequest, model: Model, grammar: Grammar | None, prompt: Sequence[int]) -> Form:
    """A completion is text: a model that thinks is let do so before its grammar, and all of it is shown."""
    reasoning = model.flags.reasoning
    over = reasoning is None or reasoning.over(prompt)
    return Form(grammar, _constraint(body, model, grammar, prompt, over=over))


def of_chat(
    body: ChatRequest, model: Model, grammar: Grammar | None, prompt: Sequence[int], use: ToolUse | None
) -> Form:
    """As in vLLM the grammar begins after the thoughts, unless these are not asked for: then there are none."""
    reasoning = model.flags.reasoning
    over = reasoning is None or reasoning.over(prompt) or _thoughtless(body, model)
    if grammar is not None and not body.include_reasoning:
        over = True
    reading = None
    if reasoning is not None or use is not None:
        reading = Reading(reasoning=reasoning, over=over, shows_thoughts=body.include_reasoning, tools=use)
    return Form(grammar, _constraint(body, model, grammar, prompt, over=over), reading)


def show_marks(body: ChatRequest, model: Model, use: ToolUse | None) -> None:
    """Marks by which an answer is read stay in its text, where they are special tokens."""
    reasoning = model.flags.reasoning
    if (use is not None and use.parser.shows_special) or (reasoning is not None and reasoning.special):
        body.skip_special_tokens = False


def _constraint(
    body: GenerationRequest, model: Model, grammar: Grammar | None, prompt: Sequence[int], *, over: bool
) -> Constraint | None:
    reasoning, budget = model.flags.reasoning, body.thinking_token_budget
    if budget == -1:
        budget = None
    if budget is not None and not 0 <= budget <= LONGEST_BUDGET:
        raise InvalidRequest(
            "`thinking_token_budget` must be a non-negative integer or -1 for unlimited.", "thinking_token_budget"
        )
    if budget is not None and reasoning is None:
        raise InvalidRequest(
            "thinking_token_budget is set but reasoning_config is not configured. Please set --reasoning-parser and/or "
            "--reasoning-config to use thinking_token_budget.",
            "thinking_token_budget",
        )
    if budget is not None and body.use_beam_search:
        raise InvalidRequest("A beam search has no thinking_token_budget; leave it out.", "thinking_token_budget")
    key = None if grammar is None else grammar.key
    if over or reasoning is None:
        return None if key is None else Constraint(key)
    if key is None and budget is None:
        return None
    return Constraint(key, reasoning.end, reasoning.start, budget, reasoning.open(prompt))


def _thoughtless(body: ChatRequest, model: Model) -> bool:
    """Whether the template was told to have the model answer at once, which Qwen 3 does."""
    if model.flags.reasoning is None or model.flags.reasoning.name != "qwen3":
        return False
    asked = {**model.flags.template_kwargs, **(body.chat_template_kwargs or {})}
    thinks = asked.get("enable_thinking", body.reasoning_effort != "none")
    return thinks is False
