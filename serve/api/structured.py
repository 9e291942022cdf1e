"""What a request asks of the form of its answer (response_format, structured_outputs), as a grammar."""

from __future__ import annotations

import json
from typing import Any

from serve.api.model import Model
from serve.api.protocol import GenerationRequest
from serve.engine.messages import Grammar
from serve.errors import InvalidRequest

KINDS: dict[str, type | tuple[type, ...]] = {
    "json": (str, dict),
    "regex": str,
    "choice": list,
    "grammar": str,
    "json_object": bool,
    "structural_tag": str,
}
FLAGS = ("disable_any_whitespace", "disable_additional_properties")
DEEPEST = 64  # objects and arrays in a schema, one in another
WRAPPED = 16  # more of them, around the schemas of a structural tag
MOST_CHOICES = 20_000


async def grammar(body: GenerationRequest, model: Model) -> Grammar | None:
    """None where the answer may be anything. Raises InvalidRequest, or Overloaded where too many are being compiled."""
    asked, param = _asked(body), "structured_outputs"
    given = _of_format(body.response_format)
    if given is not None:
        param = "response_format"
        asked = {**asked, **given} if asked is not None else given
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
    options: dict[str, Any] = {}
    if asked.get("disable_any_whitespace"):
        options["whitespace"] = False
    elif asked.get("whitespace_pattern") is not None:
        options["whitespace_pattern"] = asked["whitespace_pattern"]
    if asked.get("disable_additional_properties"):
        options["additional"] = False
    _check_use(body, model, param)
    return await model.grammars.grammar(kind, value, options, param)


def _asked(body: GenerationRequest) -> dict[str, Any] | None:
    """structured_outputs, its types checked."""
    asked = body.structured_outputs
    for name, kind in KINDS.items() if asked else ():
        value = (asked or {}).get(name)
        if value is not None and not isinstance(value, kind):
            raise InvalidRequest(f"structured_outputs.{name} is of a type that it cannot have.", "structured_outputs")
    if asked is None:
        return None
    choices = asked.get("choice")
    if choices is not None and not all(isinstance(choice, str) for choice in choices):
        raise InvalidRequest("structured_outputs.choice must be a list of texts.", "structured_outputs")
    for name in FLAGS:
        if not isinstance(asked.get(name, False), (bool, type(None))):
            raise InvalidRequest(f"structured_outputs.{name} must be true or false.", "structured_outputs")
    if not isinstance(asked.get("whitespace_pattern"), (str, type(None))):
        raise InvalidRequest("structured_outputs.whitespace_pattern must be a text.", "structured_outputs")
    return asked


def _of_format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """response_format in the words of structured_outputs."""
    if given is None:
        return None
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        described = given.get("json_schema")
        if described is None:
            raise InvalidRequest(
                "When response_format type is 'json_schema', the 'json_schema' field must be provided.",
                "response_format",
            )
        if not isinstance(described, dict) or not isinstance(described.get("name"), str):
            raise InvalidRequest(
                "response_format.json_schema must be an object with a name and a schema.", "response_format"
            )
        schema = described.get("schema")
        if not isinstance(schema, (dict, type(None))):
            raise InvalidRequest("response_format.json_schema.schema must be an object.", "response_format")
        return {"json": schema}
    if kind == "structural_tag":
        if not isinstance(given.get("structures"), list) or not isinstance(given.get("triggers"), list):
            raise InvalidRequest("Invalid response_format structural_tag specification.", "response_format")
        return {"structural_tag": json.dumps(given)}
    raise InvalidRequest(
        f"response_format.type is {str(kind)[:50]!r}; it must be 'text', 'json_object', 'json_schema' or "
        "'structural_tag'.",
        "response_format",
    )


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


def _check_use(body: GenerationRequest, model: Model, param: str) -> None:
    if body.use_beam_search:
        raise InvalidRequest(f"{param} is not available with use_beam_search: a search follows no grammar.", param)
