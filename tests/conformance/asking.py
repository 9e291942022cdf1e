"""All requests sent to both servers, and what came of each: equal, an agreed difference, a near tie, or a failure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from tests.conformance.case import PATIENCE, Answer, Case, ask
from tests.conformance.compare import CLOSE, Difference, compare
from tests.conformance.differences import DIFFERENCES, Deliberate

AT_ONCE = 16  # requests to each server
METRIC = re.compile(r"# TYPE (\S+) (\S+)")


@dataclass
class Outcome:
    """One case: both answers, how they differ beyond what is agreed, and which agreements were needed."""

    case: Case
    ours: Answer
    theirs: Answer
    failures: list[Difference]
    agreed: set[Deliberate] = field(default_factory=set)
    near_tie: bool = False

    def __str__(self) -> str:
        first = self.failures[0] if self.failures else "equal"
        parts = (f"{self.case.name}\n{self.case}", f"ours:   {self.ours}", f"vLLM's: {self.theirs}")
        return "\n\n".join((*parts, f"first difference: {first}"))


class Asking:
    """Both servers' clients."""

    def __init__(self, heed: str, vllm: str) -> None:
        # A connection each: one that is kept may be closed by the server at the moment of the next request.
        limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=0)
        shared: dict[str, Any] = {"timeout": PATIENCE, "limits": limits, "trust_env": False}
        self._heed = httpx.Client(base_url=heed, **shared)
        self._vllm = httpx.Client(base_url=vllm, **shared)

    def all(self, cases: Sequence[Case]) -> dict[str, Outcome]:
        """By name. Both servers work on many requests at once; then on those that want to be alone."""
        together = [case for case in cases if not case.alone]
        with ThreadPoolExecutor(AT_ONCE) as ours, ThreadPoolExecutor(AT_ONCE) as theirs:
            mine = [ours.submit(ask, self._heed, case) for case in together]
            other = [theirs.submit(ask, self._vllm, case) for case in together]
            pairs = [(one.result(), two.result()) for one, two in zip(mine, other, strict=True)]
        # In vLLM a request with logprob_token_ids changes the top_logprobs of those after it: such come last.
        lone = sorted((case for case in cases if case.alone), key=lambda case: bool(_named_tokens(case)))
        pairs += [(ask(self._heed, case), ask(self._vllm, case)) for case in lone]
        return {case.name: self._judge(case, *pair) for case, pair in zip(together + lone, pairs, strict=True)}

    def _judge(self, case: Case, ours: Answer, theirs: Answer) -> Outcome:
        ours, theirs = readable(case, ours), readable(case, theirs)
        outcome = judged(case, ours, theirs, shape=case.shape)
        if outcome.failures and not case.shape and ours.status == theirs.status == 200 and self._tied(case):
            outcome = replace(judged(case, ours, theirs, shape=True), near_tie=True)
        return outcome

    def _tied(self, case: Case) -> bool:
        """Whether greedy tokens differ first where the two likeliest of either engine are as good as equal: asked once
        more, with the tokens and their log-probabilities.
        """
        if not isinstance(case.body, dict) or "max_tokens" not in case.body or case.body.get("use_beam_search"):
            return False
        chat = case.path.endswith("chat/completions")
        if not chat and not case.path.endswith("completions"):
            return False
        more: dict[str, Any] = {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
        body = case.body | more | {"return_token_ids": True, "stream": False, "echo": False}
        body = {key: value for key, value in body.items() if key not in ("stream_options", "logprob_token_ids")}
        again = replace(case, body=body)
        answers = [ask(client, again) for client in (self._heed, self._vllm)]
        if any(answer.status != 200 for answer in answers):
            return False
        for ours, theirs in zip(*(answer.body["choices"] for answer in answers), strict=True):
            if None in (ours.get("token_ids"), theirs.get("token_ids")):
                return False
            pairs = zip(ours["token_ids"], theirs["token_ids"], strict=False)
            place = next((i for i, (one, two) in enumerate(pairs) if one != two), None)
            if place is not None:
                return min(_gap(choice["logprobs"], place) for choice in (ours, theirs)) <= CLOSE
        return False


def _named_tokens(case: Case) -> Any:
    return case.body.get("logprob_token_ids") if isinstance(case.body, dict) else None


def _gap(logprobs: dict[str, Any], place: int) -> float:
    """Between the two likeliest tokens of a position."""
    if "content" in logprobs:
        values = [one["logprob"] for one in logprobs["content"][place]["top_logprobs"]]
    else:
        values = list(logprobs["top_logprobs"][place].values())
    first, second = sorted(values, reverse=True)[:2]
    return float(first - second)


def judged(case: Case, ours: Answer, theirs: Answer, *, shape: bool) -> Outcome:
    """The outcome, with the agreed differences taken out."""
    failures: list[Difference] = []
    agreed: set[Deliberate] = set()
    for difference in compare(ours, theirs, shape=shape, chunks=case.alone):
        entry = next((one for one in DIFFERENCES if one.allows(case.name, difference)), None)
        if entry is None:
            failures.append(difference)
        else:
            agreed.add(entry)
    return Outcome(case, ours, theirs, failures, agreed)


def readable(case: Case, answer: Answer) -> Answer:
    """/metrics as an object of names and types: values are a run's own."""
    if case.path != "/metrics" or not isinstance(answer.body, str):
        return answer
    return replace(answer, body=dict(METRIC.findall(answer.body)))
