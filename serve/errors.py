"""Every error that a request can end in. `serve/api/errors.py` maps each class to an HTTP status, in that one place.

A message is one sentence (or two) that a person can act on: it names the field, the value and what would be right.
"""

from __future__ import annotations


class ServeError(Exception):
    """Base class. `param` names the field of the request that is at fault, where one is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(ServeError):
    """The request asks for something impossible, out of range, or not supported: the client's to change."""


class InvalidResponsesRequest(InvalidRequest):
    """What OpenAI's Responses API calls an invalid_request_error."""


class NotFound(ServeError):
    """The model (or the route) that was asked for does not exist."""


class UnknownResponse(ServeError):
    """No response is kept under the id that was asked for."""


class Unauthorized(ServeError):
    """No API key, or a wrong one."""


class Forbidden(ServeError):
    """The request was made to a name that this server is not known by (--allowed-hosts), or to a route that is off."""


class RequestTimeout(ServeError):
    """The request did not come as a whole in time."""


class BodyTooLarge(ServeError):
    """The body exceeds --max-body-bytes."""


class HeadTooLarge(ServeError):
    """The request's line and headers exceed what a head may be."""


class NotBuilt(ServeError):
    """A route of the contract that this server does not have."""


class Overloaded(ServeError):
    """The queue is full, or the server is shutting down; `retry_after` is in seconds. `limit`: the setting of the queue
    that was met, if it was one.
    """

    def __init__(self, message: str, retry_after: int = 1, limit: str | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.limit = limit


class GenerationFailed(ServeError):
    """The engine could not finish this request; others go on."""


class EngineDead(ServeError):
    """The engine process has ended; the server is about to."""


class StartError(Exception):
    """The server cannot start, which no request sees: one sentence, and the status to exit with."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
