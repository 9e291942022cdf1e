"""From a YAML mapping to typed values: every unknown key and every wrong type in one pass, each as a sentence.

A section is a frozen dataclass whose field types say what is allowed: `int`, `float`, `bool`, `str`, `Literal`,
`tuple`, `dict`, unions of these, and `Annotated[..., Range(...)]` for bounds. Reading is strict about meaning and easy
about spelling: YAML 1.1 takes `1e-3` for text, so text that spells a number is a number where one is wanted, `1e9` is
a whole number, and one text stands for a list of one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


class RecipeError(ValueError):
    """A recipe that cannot run. `problems` holds one sentence for each thing that is wrong."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclasses.dataclass(frozen=True)
class Range:
    """The bounds of a number: `least` <= value, `above` < value, value <= `most`, value < `below`."""

    least: int | None = None
    above: int | None = None
    most: int | None = None
    below: int | None = None

    def admits(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = (("of at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        return " and ".join(f"{word} {bound}" for word, bound in words if bound is not None)


def key_of(field: dataclasses.Field[Any]) -> str:
    """A field's name as YAML has it: `from_` is `from`, which Python keeps for itself."""
    return field.name.removesuffix("_")


class Mismatch(Exception):
    """The value is not what its type says."""


def show(value: Any) -> str:
    """A value as the recipe spells it: null, true, [1, 2] and not None, True, (1, 2)."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)


def flatten(sections: Mapping[str, type], document: Mapping[Any, Any], problems: list[str]) -> dict[str, Any]:
    """The `section.key: value` pairs of a recipe's mapping that are known; what is unknown is added to `problems`."""
    flat: dict[str, Any] = {}
    for section, content in document.items():
        if section not in sections:
            problems.append(unknown_key(sections, str(section)))
        elif content is None:  # `eval:` with nothing below it: an empty section
            continue
        elif not isinstance(content, Mapping):
            problems.append(
                f"{section} is {show(content)}; it is a section, with keys such as {example(sections, section)}."
            )
        else:
            known = {key_of(field) for field in dataclasses.fields(sections[section])}
            for key, value in content.items():
                if key in known:
                    flat[f"{section}.{key}"] = value
                else:
                    problems.append(unknown_key(sections, f"{section}.{key}"))
    return flat


def unknown_key(sections: Mapping[str, type], key: str) -> str:
    """The sentence for a key that no section has, with what was probably meant."""
    known = {f"{section}.{key_of(field)}" for section, cls in sections.items() for field in dataclasses.fields(cls)}
    last = key.rpartition(".")[2]
    near = [name for name in sorted(known) if name.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(key, sorted(known | set(sections)), n=1, cutoff=0.75)
    near = near or [
        name for name in sorted(known) if difflib.get_close_matches(last, [name.rpartition(".")[2]], cutoff=0.75)
    ]
    if near:
        return f"{key} is not a key; did you mean {' or '.join(near[:3])}?"
    section = key.partition(".")[0]
    if section in sections and "." in key:
        keys = ", ".join(key_of(field) for field in dataclasses.fields(sections[section]))
        return f"{key} is not a key; {section} has {keys}."
    return f"{key} is not a key; the sections are {', '.join(sections)}."


def example(sections: Mapping[str, type], section: str) -> str:
    return f"{section}.{key_of(dataclasses.fields(sections[section])[0])}"


def read(
    sections: Mapping[str, type], flat: Mapping[str, Any], problems: list[str], excused: str | None = None
) -> tuple[dict[str, Any], set[str]]:
    """Every key of every section with its typed value, or its default, and the keys that have neither.

    A wrong type, a value out of bounds and a missing key that has no default each add a sentence to `problems`; but
    what is missing in the section `excused` has its sentence already.
    """
    values: dict[str, Any] = {}
    bad: set[str] = set()
    for section, cls in sections.items():
        hints = get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            key = f"{section}.{key_of(field)}"
            if key in flat:
                try:
                    values[key] = convert(flat[key], hints[field.name])
                except Mismatch:
                    problems.append(f"{key} is {show(flat[key])}; it must be {describe(hints[field.name])}.")
                    bad.add(key)
            elif field.default is not dataclasses.MISSING:
                values[key] = field.default
            else:
                if section != excused:
                    problems.append(f"{key} is missing; it must be {describe(hints[field.name])}.")
                bad.add(key)
    return values, bad


def convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint` says; raises Mismatch."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        converted = convert(value, arguments[0])
        if converted is not None and not all(bound.admits(converted) for bound in arguments[1:]):
            raise Mismatch
        return converted
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return convert(value, option)
            except Mismatch:
                continue
        raise Mismatch
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
        raise Mismatch
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        if arguments[-1] is Ellipsis:
            return tuple(convert(item, arguments[0]) for item in items)
        if len(items) != len(arguments):
            raise Mismatch
        return tuple(convert(item, kind) for item, kind in zip(items, arguments, strict=True))
    if origin is dict:  # whose keys are checked where they are understood
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: _spelled(item) for key, item in value.items()}
        raise Mismatch
    if hint is type(None):
        if value is None:
            return None
    elif hint is bool or hint is str:
        if isinstance(value, hint):
            return value
    elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _number(value, hint)
    raise Mismatch


def _number(value: float | str, kind: type) -> float | int:
    if isinstance(value, int) and kind is int:
        return value  # not through float, which would round what is above 2**53
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise Mismatch from None
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise Mismatch
    return int(number) if kind is int else number


def _spelled(value: Any) -> Any:
    """A number that YAML 1.1 takes for text, such as 1e-3, as the number."""
    if isinstance(value, str):
        try:
            return _number(value, float)
        except Mismatch:
            return value
    return value


def describe(hint: Any) -> str:
    """What a type allows, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{describe(arguments[0])} {' and '.join(str(bound) for bound in arguments[1:])}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in arguments)
    if origin is Literal:
        return f"one of {', '.join(arguments)}" if len(arguments) > 1 else str(arguments[0])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list of which each is {describe(arguments[0])}"
        return f"a list of {len(arguments)}, each {describe(arguments[0])}"
    if origin is dict:
        return "keys with their values"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[hint]
