"""The JSON schemas of the package: every key with its type and meaning, and the file itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective

from . import trees

DIRECTORY = Path(__file__).resolve().parents[3] / "megatron_ext" / "schemas"
POLICY = "resume-policy.schema.json"

Schema = Mapping[str, Any]
#: Path of a key, and its schema.
Entry = tuple[str, Schema]


class PolicyFile(SphinxDirective):
    """The keys of a policy file."""

    def run(self) -> list[nodes.Node]:
        """From its schema."""
        return list(_tables(POLICY))


class Schemas(SphinxDirective):
    """Every schema but that of a policy file, which has a page of its own."""

    def run(self) -> list[nodes.Node]:
        """One section a schema."""
        out: list[nodes.Node] = []
        for path in sorted(DIRECTORY.glob("*.json")):
            schema = json.loads(path.read_text())
            self.env.note_dependency(str(path))
            file = addnodes.download_reference(
                "", "", trees.code(path.name), reftarget=f"/../megatron_ext/schemas/{path.name}"
            )
            content: list[nodes.Node] = [
                trees.paragraph(schema["description"]),
                trees.paragraph([nodes.Text("Download: "), file]),
            ]
            if path.name != POLICY:
                content += _tables(path.name)
            title = schema["title"].removeprefix("megatron_ext ")
            out.append(trees.section(title, trees.anchor(path.name.split(".")[0]), *content))
        return out


def _tables(name: str) -> Iterator[nodes.Node]:
    """A table for the document, and one for each named part of it."""
    schema = json.loads((DIRECTORY / name).read_text())
    kind = name.split(".")[0]
    yield _table(_entries(schema, ""), kind)
    for part, content in schema.get("$defs", {}).items():
        name_of_part = nodes.strong("", "", trees.code(part))
        target = nodes.paragraph("", "", name_of_part, ids=[_id(kind, part)])
        target += trees.words(f": {content.get('description', '')}")
        yield target
        entries = [(path.lstrip(".") or part, inner) for path, inner in _inside(content, "")]
        yield _table(entries, kind) if entries else trees.paragraph(_type(content, kind))


def _table(entries: Iterable[Entry], kind: str) -> nodes.table:
    rows = [
        ([trees.code(path)], _type(inner, kind), inner.get("description", ""))
        for path, inner in entries
    ]
    return trees.table(("key", "value", "meaning"), rows)


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


def _type(schema: Schema, kind: str) -> list[nodes.Node]:
    """What a value may be, in words; parts that have a name as links."""
    if "$ref" in schema:
        part = schema["$ref"].rpartition("/")[2]
        link = nodes.reference("", "", trees.code(part), internal=True, refid=_id(kind, part))
        return [link]
    if "const" in schema:
        return [trees.code(_value(schema["const"]))]
    if "enum" in schema:
        return _joined([[trees.code(_value(v))] for v in schema["enum"]])
    for name in ("oneOf", "anyOf"):
        if name in schema and not {"type", "properties"} & schema.keys():
            return _joined([_type(s, kind) for s in schema[name]])
    types = schema.get("type", "any")
    names = [_one_type(t, schema, kind) for t in ([types] if isinstance(types, str) else types)]
    return _joined(names)


def _one_type(name: str, schema: Schema, kind: str) -> list[nodes.Node]:
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "minLength": "length at least",
    }
    said = [f"{word} {schema[key]}" for key, word in bounds.items() if key in schema]
    if name == "array" and isinstance(schema.get("items"), Mapping):
        return [nodes.Text("list of "), *_type(schema["items"], kind)]
    if name == "array":
        return [nodes.Text("list")]
    if name == "object":
        return [nodes.Text("mapping")]
    if name in ("integer", "number") and said:
        return [nodes.Text(f"{name}, {', '.join(said)}")]
    return [nodes.Text({"string": "text", "boolean": "true or false"}.get(name, name))]


def _joined(parts: list[list[nodes.Node]]) -> list[nodes.Node]:
    out: list[nodes.Node] = []
    for number, part in enumerate(parts):
        out += [nodes.Text(", "), *part] if number else part
    return out


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _id(kind: str, part: str) -> str:
    return trees.anchor(kind, part)
