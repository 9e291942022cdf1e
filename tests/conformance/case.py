"""One request of the conformance suite, and what a server answered to it.

How to add requests: write a module beside this one with a list `CASES` of `Case`s, and name it in `cases.py`. A case is
a name that is its own ("completions/echo with logprobs"; the part before the slash is the subject), the path, and a
body. The two servers are asked the same, with a valid key, and their answers are compared (`compare.py` says how).
Where ours is to differ, `differences.py` gets one line with the reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx

MODEL = "smollm2"
KEYS = ("heed-key", "second-key")  # of both servers
PATIENCE = 300.0  # seconds for one answer: the two servers share a slow machine with whatever else runs on it


@dataclass(frozen=True)
class Case:
    """A request. `body` is sent as JSON; `raw` as it is, in its place."""

    name: str
    path: str
    body: Any = None
    raw: bytes | None = None
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)
    key: str | None = KEYS[0]
    shape: bool = False  # what is drawn at random is compared by its shape alone
    parsers: bool = False  # asked of servers that read tool calls and thoughts (calls.py)
    alone: bool = False  # asked when nothing else is, so that how a stream is cut into chunks can be compared

    def __str__(self) -> str:
        sent = self.raw if self.raw is not None else json.dumps(self.body, ensure_ascii=False)
        return f"{self.method} {self.path} {self.headers or ''}\n{str(sent)[:2000]}"


@dataclass(frozen=True)
class Answer:
    """What came back. `body` is JSON where it is some, else text; of a stream, its events."""

    status: int
    headers: dict[str, str]
    body: Any
    stream: bool = False

    def __str__(self) -> str:
        return f"{self.status} {json.dumps(self.body, ensure_ascii=False)[:3000]}"


def ask(client: httpx.Client, case: Case) -> Answer:
    """Sends one request. A server that drops the connection has answered with status 0."""
    headers = dict(case.headers)
    if case.key is not None:
        headers.setdefault("Authorization", f"Bearer {case.key}")
    content = case.raw
    if content is None and case.body is not None:
        content = json.dumps(case.body).encode()
        headers.setdefault("Content-Type", "application/json")
    try:
        response = client.request(case.method, case.path, content=content, headers=headers)
    except httpx.HTTPError as error:
        return Answer(0, {}, f"no answer: {error!r}")
    kind = response.headers.get("content-type", "")
    if kind.startswith("text/event-stream"):
        return Answer(response.status_code, dict(response.headers), events(response.text), stream=True)
    try:
        body = response.json()
    except ValueError:
        body = response.text
    return Answer(response.status_code, dict(response.headers), body)


def events(text: str) -> list[Any]:
    """The events of a stream in order; [DONE] as that text, named events as {"event", "data"}."""
    found: list[Any] = []
    for block in text.split("\n\n"):
        name, data = None, []
        for line in block.splitlines():
            if line.startswith("event:"):
                name = line[6:].strip()
            elif line.startswith("data:"):
                data.append(line[5:].strip())
        if not data:
            continue
        joined = "\n".join(data)
        value = joined if joined == "[DONE]" else json.loads(joined)
        found.append(value if name is None else {"event": name, "data": value})
    return found
