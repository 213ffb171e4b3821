"""JSON schemas (draft 2020-12) from the types of documents and their docstrings.

Every class becomes a part of ``$defs`` under its own name, without ``Document``.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from ..base.schema import INLINE, Keywords

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN = {str: "string", bool: "boolean", int: "integer", float: "number", Path: "string"}
_SECTION = re.compile(r"^(Args|Attributes):\n(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r"^    (\S+): ", re.MULTILINE)


def document(name: str, *declared: type, description: str = "") -> str:
    """The schema of a document, as the text of its file.

    Args:
        name: ``megatron_ext/NAME`` or, of a `Versioned` document, ``megatron_ext/NAME/VERSION``.
        declared: Classes whose fields it has, in order.
        description: What it is; by default the first class's docstring.

    Raises:
        TypeError: A field has no description, or a type has no schema.
    """
    parts = _Parts()
    content = parts.object(*declared)
    if "schema" in content["properties"]:
        of_schema = content["properties"]["schema"]
        content["properties"]["schema"] = {"description": of_schema["description"], "const": name}
    package, title, *version = name.split("/")
    out = {
        "$schema": _DIALECT,
        "title": f"{package} {title.replace('-', ' ')}"
        + "".join(f", version {v}" for v in version),
        **content,
        "description": description or content["description"],
    }
    if parts.found:
        out["$defs"] = dict(sorted(parts.found.items()))
    return json.dumps(out, indent=2) + "\n"


class _Parts:
    """The schemas of types, and the named parts that they refer to."""

    def __init__(self) -> None:
        self.found: dict[str, Schema] = {}
        self._declared: dict[str, Any] = {}

    def object(self, *declared: type) -> Schema:
        """The schema of a document with the fields of some classes."""
        properties: dict[str, Schema] = {}
        required: list[str] = []
        for cls in declared:
            texts = _descriptions(cls)
            types_of = get_type_hints(cls, include_extras=True)
            for key in sorted(texts.keys() ^ types_of.keys()):
                known = key in types_of
                problem = f"does not describe {key!r}"
                problem = problem if known else f"describes {key!r}, which is no field of it"
                raise TypeError(f"{cls.__name__}: its docstring {problem}")
            for key, field in types_of.items():
                properties[key] = {**self.of(field), "description": texts[key]}
                if is_dataclass(cls) or key in cls.__required_keys__:  # type: ignore[attr-defined]
                    required.append(key)
        return {
            "description": _words(_summary(declared[0])),
            "type": "object",
            "additionalProperties": False,
            **({"required": required} if required else {}),
            "properties": {k: _described_first(v) for k, v in properties.items()},
        }

    def of(self, declared: Any) -> Schema:
        """The schema of a type.

        Raises:
            TypeError: It is of a kind that no document has.
        """
        origin, arguments = get_origin(declared), get_args(declared)
        if declared is Any:
            return {}
        if declared in _PLAIN:
            return {"type": _PLAIN[declared]}
        if origin is Annotated:
            return self._annotated(declared)
        if origin is Literal:
            return {"enum": list(arguments)}
        if origin in (Union, types.UnionType):
            return self._union(arguments)
        if origin is not None and issubclass(origin, Mapping):
            inner = self.of(arguments[1])
            return {"type": "object", "additionalProperties": inner or True}
        if origin is not None and issubclass(origin, Sequence):
            return {"type": "array", "items": self.of(arguments[0])}
        if is_typeddict(declared) or is_dataclass(declared):
            name = re.sub(r"(?<!^)(?=[A-Z])", "_", declared.__name__.removesuffix("Document"))
            return self._part(name.lower(), declared, lambda: self.object(declared))
        raise TypeError(f"{declared!r} has no JSON schema")

    def _annotated(self, declared: Any) -> Schema:
        base, *metadata = get_args(declared)
        added = [m for m in metadata if isinstance(m, Keywords)]
        base = next((k.of for k in added if k.of is not None), base)
        schema = self.object(base) if INLINE in added else self.of(base)
        for one in added:
            merged = _described_first({**schema, **one.keywords})
            schema = self._part(one.name, one, lambda m=merged: m) if one.name else merged
        return schema

    def _part(self, name: str, declared: Any, make: Any) -> Schema:
        if self._declared.setdefault(name, declared) is not declared:
            raise TypeError(f"two types are named {name!r}; give one of them another name")
        if name not in self.found:
            self.found[name] = {}
            self.found[name] = make()
        return {"$ref": f"#/$defs/{name}"}

    def _union(self, declared: Sequence[Any]) -> Schema:
        alternatives = [self.of(d) for d in declared if d is not type(None)]
        nullable = len(alternatives) < len(declared)
        if len(alternatives) == 1 and nullable:
            (only,) = alternatives
            if "enum" in only:
                return {**only, "enum": [*only["enum"], None]}
            if "type" in only and not isinstance(only["type"], list):
                return {**only, "type": [only["type"], "null"]}
        if all(list(a) == ["type"] for a in alternatives):
            found = [a["type"] for a in alternatives]
            found = [t for t in found if t != "integer" or "number" not in found]
            return {"type": found + ["null"] * nullable}
        return {"oneOf": [{"type": "null"}] * nullable + alternatives}


def _summary(cls: type) -> str:
    return _SECTION.split(inspect.getdoc(cls) or "")[0]


def _descriptions(cls: Any) -> dict[str, str]:
    """Field -> its description; of a TypedDict with those that it inherits."""
    out: dict[str, str] = {}
    for base in getattr(cls, "__orig_bases__", ()) if is_typeddict(cls) else ():
        out |= _descriptions(base) if is_typeddict(base) else {}
    return out | dict(_own_descriptions(inspect.getdoc(cls) or ""))


def _own_descriptions(docstring: str) -> Iterator[tuple[str, str]]:
    for section in _SECTION.finditer(docstring):
        _, *parts = _FIELD.split(section[2])
        for name, text in zip(parts[::2], parts[1::2], strict=True):
            yield name, _words(text)


def _words(text: str) -> str:
    """Text of a docstring as the reader of a JSON document knows it."""
    return re.sub(r"\bNone\b", "null", re.sub(r"`+", "", " ".join(text.split())))


def _described_first(schema: Schema) -> Schema:
    first = {"description": schema["description"]} if "description" in schema else {}
    return first | schema
