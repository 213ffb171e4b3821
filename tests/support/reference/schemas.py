"""The JSON schemas of the package: every key with its type and meaning, and the file itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..pool import ROOT
from .markdown import blocks, code, table, words

DIRECTORY = ROOT / "megatron_ext" / "schemas"
POLICY = "resume-policy.schema.json"

Schema = Mapping[str, Any]
#: Path of a key, and its schema.
Entry = tuple[str, Schema]


def policy_file() -> str:
    """The keys of a policy file, from its schema."""
    return _tables(POLICY)


def schemas() -> str:
    """Every schema; the keys of a policy file have a page of their own."""
    out = []
    for path in sorted(DIRECTORY.glob("*.json")):
        schema = json.loads(path.read_text())
        file = f"[{code(path.name)}](../../{path.relative_to(ROOT)})"
        out += [
            f"## {schema['title'].removeprefix('megatron_ext ')}",
            words(schema["description"]),
            f"File: {file}",
            "" if path.name == POLICY else _tables(path.name),
        ]
    return blocks(*out)


def _tables(name: str) -> str:
    """A table for the document, and one for each named part of it."""
    schema = json.loads((DIRECTORY / name).read_text())
    kind = name.split(".")[0]
    out = [_table(_entries(schema, ""), kind)]
    for part, content in schema.get("$defs", {}).items():
        entries = [(path.lstrip(".") or part, inner) for path, inner in _inside(content, "")]
        out += [
            f"### {_title(kind, part)}",
            words(content.get("description", "")),
            _table(entries, kind) if entries else _type(content, kind),
        ]
    return blocks(*out)


def _table(entries: Iterable[Entry], kind: str) -> str:
    rows = [
        (code(path), _type(inner, kind), words(inner.get("description", "")))
        for path, inner in entries
    ]
    return table(("key", "value", "meaning"), rows)


def _entries(schema: Schema, path: str) -> Iterator[Entry]:
    """Every key and every described alternative, depth first; named parts are not entered."""
    for key, inner in schema.get("properties", {}).items():
        at = f"{path}.{key}" if path else key
        inner = {} if isinstance(inner, bool) else inner  # true: any value
        yield at, inner
        yield from _inside(inner, at)


def _inside(schema: Schema, path: str) -> Iterator[Entry]:
    if "$ref" in schema:
        return
    yield from _entries(schema, path)
    for name in ("items", "additionalProperties"):
        inner = schema.get(name)
        if isinstance(inner, Mapping):
            at = f"{path}[]" if name == "items" else f"{path}.*"
            if "description" in inner and "$ref" not in inner:
                yield at, inner
            yield from _inside(inner, at)
    for name in ("oneOf", "anyOf", "allOf"):
        for inner in schema.get(name, ()):
            if "description" in inner and "$ref" not in inner:
                yield path, inner
            yield from _inside(inner, path)


def _type(schema: Schema, kind: str) -> str:
    """What a value may be, in words; parts that have a name as links."""
    if "$ref" in schema:
        part = schema["$ref"].rpartition("/")[2]
        # The anchor that GitHub, GitLab and MyST give a heading.
        return f"[{code(part)}](#{_title(kind, part).lower().replace(' ', '-')})"
    if "const" in schema:
        return code(_value(schema["const"]))
    if "enum" in schema:
        return ", ".join(code(_value(v)) for v in schema["enum"])
    for name in ("oneOf", "anyOf"):
        if name in schema and not {"type", "properties"} & schema.keys():
            return ", ".join(_type(s, kind) for s in schema[name])
    types = schema.get("type", "any")
    types = [types] if isinstance(types, str) else types
    return ", ".join(_one_type(t, schema, kind) for t in types)


def _one_type(name: str, schema: Schema, kind: str) -> str:
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "minLength": "length at least",
    }
    said = [f"{word} {schema[key]}" for key, word in bounds.items() if key in schema]
    if name == "array" and isinstance(schema.get("items"), Mapping):
        return f"list of {_type(schema['items'], kind)}"
    if name in ("integer", "number") and said:
        return f"{name}, {', '.join(said)}"
    plain = {"string": "text", "boolean": "true or false", "array": "list", "object": "mapping"}
    return plain.get(name, name)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _title(kind: str, part: str) -> str:
    return f"{part} in {kind}"
