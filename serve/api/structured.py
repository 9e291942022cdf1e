"""What a request asks of the form of its answer (response_format, structured_outputs), as a grammar."""

from __future__ import annotations

import json
from typing import Any

from serve.api.form_protocol import ResponseFormat, StructuredOutputs
from serve.api.model import Model
from serve.api.protocol import GenerationRequest
from serve.engine.messages import Grammar
from serve.errors import InvalidRequest

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
DEEPEST = 64  # objects and arrays in a schema, one in another
WRAPPED = 16  # more of them, around the schemas of a structural tag
MOST_CHOICES = 20_000


async def grammar(body: GenerationRequest, model: Model) -> Grammar | None:
    """None where the answer may be anything. Raises InvalidRequest, or Overloaded where too many are being compiled."""
    param = "structured_outputs"
    asked = _asked(body.structured_outputs)
    given = _of_format(body.response_format)
    if given is not None:
        param = "response_format"
        asked = given if asked is None else asked | given
    if asked is None:
        return None
    kinds = [kind for kind in KINDS if asked.get(kind) is not None]
    if len(kinds) != 1:
        how = "multiple" if kinds else "none"
        verb = "can only" if kinds else "must"
        raise InvalidRequest(
            f"You {verb} use one kind of structured outputs constraint but {how} are specified: "
            f"{', '.join(kinds) or 'name one of ' + ', '.join(KINDS)}.",
            param,
        )
    (kind,) = kinds
    value = asked[kind]
    _check(kind, value, param)
    _check_use(body, param)
    return await model.grammars.grammar(kind, value, _options(body.structured_outputs), param)


def _options(asked: StructuredOutputs | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if asked is None:
        return options
    if asked.disable_any_whitespace:
        options["whitespace"] = False
    elif asked.whitespace_pattern is not None:
        options["whitespace_pattern"] = asked.whitespace_pattern
    if asked.disable_additional_properties:
        options["additional"] = False
    return options


def _asked(asked: StructuredOutputs | None) -> dict[str, Any] | None:
    """By kind."""
    if asked is None:
        return None
    return {kind: asked.schema_ if kind == "json" else getattr(asked, kind) for kind in KINDS}


def _of_format(given: ResponseFormat | None) -> dict[str, Any] | None:
    """response_format in the words of structured_outputs."""
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return {"json_object": True}
    if given.type == "json_schema":
        if given.json_schema is None:
            raise InvalidRequest(
                "When response_format type is 'json_schema', the 'json_schema' field must be provided.",
                "response_format",
            )
        return {"json": given.json_schema.schema_}
    if "format" in (given.model_extra or {}):
        raise InvalidRequest(
            "response_format has a structural_tag with a 'format'; this server knows the older form, "
            "with 'structures' and 'triggers'.",
            "response_format",
        )
    if given.structures is None or given.triggers is None:
        raise InvalidRequest("Invalid response_format structural_tag specification.", "response_format")
    return {"structural_tag": json.dumps({"structures": given.structures, "triggers": given.triggers})}


def _check(kind: str, value: Any, param: str) -> None:
    """vLLM's bounds."""
    if kind == "choice" and not value:
        raise InvalidRequest("Choice '[]' cannot be an empty list", param)
    if kind == "choice" and len(value) > MOST_CHOICES:
        raise InvalidRequest(f"structured_outputs.choice has {len(value)} texts; it may have {MOST_CHOICES}.", param)
    if kind in ("grammar", "json", "structural_tag") and isinstance(value, str) and not value.strip():
        raise InvalidRequest(f"structured_outputs.{kind} cannot be an empty string", param)
    if kind in ("json", "structural_tag"):
        limit = DEEPEST + (WRAPPED if kind == "structural_tag" else 0)
        if _deeper(value, limit):
            raise InvalidRequest(
                f"The JSON schema is nested too deeply: objects and arrays may nest at most {DEEPEST} levels", param
            )
    if kind == "json_object" and value is False:
        raise InvalidRequest(
            "structured_outputs.json_object must be True if set; omit structured_outputs to disable structured outputs",
            param,
        )
    if kind == "regex" and "\0" in value:
        raise InvalidRequest("structured_outputs.regex must not contain a NUL character ('\\x00')", param)


def _deeper(spec: Any, limit: int) -> bool:
    """Whether objects and arrays are nested in one another more than so many times."""
    if isinstance(spec, str):
        try:
            spec = json.loads(spec)
        except RecursionError:
            return True
        except ValueError:
            return False  # it is told where it is compiled
    level = [spec]
    for _ in range(limit):
        inner = [one for each in level if isinstance(each, (dict, list)) for one in _within(each)]
        level = [one for one in inner if isinstance(one, (dict, list))]
        if not level:
            return False
    return True


def _within(value: dict[str, Any] | list[Any]) -> Any:
    return value.values() if isinstance(value, dict) else value


def _check_use(body: GenerationRequest, param: str) -> None:
    if body.use_beam_search:
        raise InvalidRequest(f"{param} is not available with use_beam_search: a search follows no grammar.", param)
