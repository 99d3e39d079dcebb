"""Declares what bodies may have, once: requests are checked by it, and told by it to clients, as a
JSON schema. A part of JSON Schema 2020-12 that takes no library and no time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ollm_core.files.untrusted_json import show
from ollm_core.serving.openai.refused import RefusedError, unsupported

Schema = Mapping[str, Any]

ANYTHING: Schema = {}
TEXT: Schema = {"type": "string"}
SWITCH: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
NOTHING: Schema = {"type": "null"}

_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a body. null counts as one that is not there."""

    schema: Schema
    only: tuple[Any, ...] | None = None
    """What it may be where it asks for what happens anyway, and is not supported else."""
    required: bool = False


Fields = Mapping[str, Field]


def ignored(*names: str) -> Fields:
    """Fields that change no answer, whatever they are."""
    return {name: Field(ANYTHING) for name in names}


def only(*values: Any) -> Field:
    """One that asks for what happens anyway, or is refused."""
    return Field(one_of(*values) if values else NOTHING, only=values)


def one_of(*values: Any) -> Schema:
    """One of these values."""
    return {"enum": [*values]}


def whole(least: int, most: int | None = None) -> Schema:
    """A whole number."""
    limits = {"minimum": least} if most is None else {"minimum": least, "maximum": most}
    return {"type": "integer", **limits}


def text(least: int, most: int | None = None, pattern: str | None = None) -> Schema:
    """A text of so many characters. `pattern` is all of it."""
    made: dict[str, Any] = {"type": "string", "minLength": least}
    if most is not None:
        made["maxLength"] = most
    if pattern is not None:
        made["pattern"] = f"^(?:{pattern})$"
    return made


def list_of(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    """A list."""
    made: dict[str, Any] = {"type": "array", "items": items}
    if least:
        made["minItems"] = least
    if most is not None:
        made["maxItems"] = most
    return made


def any_of(*schemas: Schema) -> Schema:
    """What one of these takes."""
    return {"anyOf": [*schemas]}


def nullable(schema: Schema) -> Schema:
    """The same, or null."""
    if not schema or schema == NOTHING:
        return schema
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], NOTHING]}
    return any_of(schema, NOTHING)


def object_of(
    properties: Mapping[str, Schema],
    required: Sequence[str] = (),
    more: Schema | bool = False,
) -> Schema:
    """An object with these properties, and `more` of such values."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": [*required],
        "additionalProperties": more,
    }


def body_schema(fields: Fields) -> Schema:
    """Of a body with these fields."""
    return object_of(
        {
            name: field.schema if field.required else nullable(field.schema)
            for name, field in fields.items()
        },
        [name for name, field in fields.items() if field.required],
        NOTHING,
    )


def check_names(fields: Fields, said: Mapping[str, Any]) -> None:
    """Raises RefusedError for a field that is not known, and for one that is not supported as it
    is. `said` has none that is null.
    """
    for name, value in said.items():
        field = fields.get(name)
        if field is None:
            raise RefusedError(
                f"{show(name)} in the body is not known",
                code="unknown_parameter",
                param=name[:100],
            )
        if field.only is not None and value not in field.only:
            wanted = " or ".join(map(repr, field.only))
            wanted = f"need {wanted} or nothing" if wanted else "is not supported"
            raise unsupported(f"{name}: {wanted}, have {show(value)}", name)


def check_body(fields: Fields, body: Mapping[str, Any]) -> None:
    """Raises RefusedError for a body that is not as its schema says."""
    for path, reason in _faults(body_schema(fields), body, ()):
        where = "".join(
            f"[{one}]" if isinstance(one, int) else f".{one}" for one in path
        ).removeprefix(".")
        param = path[0] if path and isinstance(path[0], str) else None
        raise RefusedError(f"{where or 'the body'}: {reason}", param=param and param[:100])


Path = tuple[str | int, ...]


def _faults(schema: Schema, value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    """Where a value is not as a schema says, and what it needs there."""
    choices = schema.get("anyOf")
    if choices and all(any(True for _ in _faults(one, value, path)) for one in choices):
        others = [one for one in choices if one != NOTHING]
        if len(others) == 1:
            yield from _faults(others[0], value, path)
        yield path, f"is not as /openapi.json has it, have {show(value)}"
    values = schema.get("enum")
    if values is not None and not any(_same(value, one) for one in values):
        yield path, f"need {' or '.join(map(repr, values))}, have {show(value)}"
    kind = schema.get("type")
    if kind is not None and not _is(kind, value):
        yield path, f"need {kind}, have {show(value)}"
        return
    if isinstance(value, str):
        yield from _of_text(schema, value, path)
    elif isinstance(value, dict):
        yield from _of_object(schema, value, path)
    elif isinstance(value, list):
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if len(value) < least or (most is not None and len(value) > most):
            yield path, f"need {least} to {most} items, have {len(value)}"
        items = schema.get("items")
        if items is not None and not _are_ids(items, value):
            for place, one in enumerate(value):
                yield from _faults(items, one, (*path, place))
    elif _is("number", value):
        yield from _of_number(schema, value, path)


def _are_ids(items: Schema, values: Sequence[Any]) -> bool:
    """Whether these are whole numbers as `items` has them: a prompt may have many."""
    if items.keys() != {"type", "minimum"} or items["type"] != "integer":
        return False
    least = items["minimum"]
    return all(type(one) is int and one >= least for one in values)


def _same(value: Any, other: Any) -> bool:
    """Whether they are equal in JSON, where true is not 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _is(kind: str, value: Any) -> bool:
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind]) and (kind == "boolean") >= isinstance(value, bool)


def _of_number(schema: Schema, value: float, path: Path) -> Iterator[tuple[Path, str]]:
    least, most, above = (schema.get(name) for name in ("minimum", "maximum", "exclusiveMinimum"))
    is_in = (
        (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
    )
    if not is_in:
        yield path, f"is out of its range, have {show(value)}"


def _of_text(schema: Schema, value: str, path: Path) -> Iterator[tuple[Path, str]]:
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if len(value) < least or (most is not None and len(value) > most):
        yield path, f"need {least} to {most} characters, have {len(value)}"
    pattern = schema.get("pattern")
    if pattern is not None and not re.fullmatch(pattern.removesuffix("$"), value):
        yield path, f"need a text like {pattern}, have {show(value)}"


def _of_object(schema: Schema, value: Mapping[str, Any], path: Path) -> Iterator[tuple[Path, str]]:
    properties, more = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name in schema.get("required", ()):
        if name not in value:
            yield (*path, name), "is missing"
    least, most = schema.get("minProperties", 0), schema.get("maxProperties")
    if len(value) < least or (most is not None and len(value) > most):
        yield path, f"need {least} to {most} fields, have {len(value)}"
    for name, one in value.items():
        inner = properties.get(name, more)
        if inner is False:
            yield path, f"{show(name)} is not known"
        elif inner is not True:
            yield from _faults(inner, one, (*path, name))
