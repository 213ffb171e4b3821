"""JSON schemas from types and docstrings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

import pytest

from megatron_ext.base.schema import INLINE, Count, Keywords, Real, Versioned
from megatron_ext.schemas.generator import document

Name = Annotated[str, Keywords("name", description="A name.", pattern="^a+$")]


@dataclass(frozen=True)
class Inner:
    """One of them, with
    a long summary.

    Args:
        size: Of ``it``, in bytes; None where
            nobody knows: or so.
        kind: What `it` is.
    """

    size: Count | None
    kind: Literal["a", "b"] | None = None


class Before(TypedDict):
    """What is always there.

    Attributes:
        first: Of a base.
    """

    first: Name


class OuterDocument(Before, total=False):
    """A document.

    Attributes:
        inner: By name.
        here: Written in place.
        either: One or the other.
        several: Plain ones.
        anything: Whatever.
        norms: Some numbers.
    """

    inner: Mapping[str, Inner]
    here: Annotated[Inner, INLINE, Keywords(minProperties=2)]
    either: list[Inner | None]
    several: tuple[str | int | float | None, ...]
    anything: Any
    norms: list[Real]


INNER = {
    "description": "One of them, with a long summary.",
    "type": "object",
    "additionalProperties": False,
    "required": ["size", "kind"],
    "properties": {
        "size": {
            "description": "Of it, in bytes; null where nobody knows: or so.",
            "type": ["integer", "null"],
            "minimum": 0,
        },
        "kind": {"description": "What it is.", "enum": ["a", "b", None]},
    },
}


def test_a_schema_has_what_types_and_docstrings_say() -> None:
    text = document("package/some-thing", OuterDocument)
    assert json.loads(text) == {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "package some thing",
        "description": "A document.",
        "type": "object",
        "additionalProperties": False,
        "required": ["first"],
        "properties": {
            "first": {"description": "Of a base.", "$ref": "#/$defs/name"},
            "inner": {
                "description": "By name.",
                "type": "object",
                "additionalProperties": {"$ref": "#/$defs/inner"},
            },
            "here": {**INNER, "description": "Written in place.", "minProperties": 2},
            "either": {
                "description": "One or the other.",
                "type": "array",
                "items": {"oneOf": [{"type": "null"}, {"$ref": "#/$defs/inner"}]},
            },
            "several": {
                "description": "Plain ones.",
                "type": "array",
                "items": {"type": ["string", "number", "null"]},
            },
            "anything": {"description": "Whatever."},
            "norms": {
                "description": "Some numbers.",
                "type": "array",
                "items": {"$ref": "#/$defs/float"},
            },
        },
        "$defs": {
            "float": {"oneOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]},
            "inner": INNER,
            "name": {"description": "A name.", "type": "string", "pattern": "^a+$"},
        },
    }


def test_a_versioned_document_names_its_version() -> None:
    found = json.loads(document("package/thing/3", Versioned, Inner, description="Both."))
    assert found["title"] == "package thing, version 3"
    assert found["description"] == "Both."
    assert found["properties"]["schema"]["const"] == "package/thing/3"
    assert found["required"] == ["schema", "size", "kind"]


def test_a_field_without_a_description_is_refused() -> None:
    class Silent(TypedDict):
        """Says nothing of it."""

        size: int

    with pytest.raises(TypeError, match="Silent: its docstring does not describe 'size'"):
        document("package/silent", Silent)


def test_a_description_without_a_field_is_refused() -> None:
    class Renamed(TypedDict):
        """Says too much.

        Attributes:
            size: There is one.
            length: There is none.
        """

        size: int

    with pytest.raises(TypeError, match="Renamed: its docstring describes 'length', which"):
        document("package/renamed", Renamed)


def test_two_parts_of_one_name_are_refused() -> None:
    class Both(TypedDict):
        """Two.

        Attributes:
            one: This.
            other: That.
        """

        one: Name
        other: Annotated[str, Keywords("name")]

    with pytest.raises(TypeError, match="two types are named 'name'"):
        document("package/both", Both)


def test_a_type_that_json_does_not_have_is_refused() -> None:
    class Strange(TypedDict):
        """A number.

        Attributes:
            value: Of two parts.
        """

        value: complex

    with pytest.raises(TypeError, match="complex'> has no JSON schema"):
        document("package/strange", Strange)
