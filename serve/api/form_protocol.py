"""Bodies' parts that ask for a form of the answer, with vLLM's field names. Types alone are checked here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class StructuredOutputs(Part):
    """Exactly one of the first six is to be given: structured.py sees to it."""

    schema_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None


class JsonSchema(Part):
    """A schema, with the name that OpenAI wants it to have."""

    name: str
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: list[dict[str, Any]] | None = None  # of a structural tag,
    triggers: list[str] | None = None  # and what these begin with


class Function(Part):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class Tool(Part):
    type: Literal["function"] = "function"
    function: Function

    def shown(self) -> dict[str, Any]:
        """As templates get it from vLLM: these keys in this order."""
        function = self.function
        made = {"name": function.name, "description": function.description, "parameters": function.parameters}
        more = {"strict": function.strict, "defer_loading": function.defer_loading}
        return {
            "type": self.type,
            "function": made | {name: value for name, value in more.items() if value is not None},
        }
