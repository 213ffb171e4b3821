"""Read and write a `ResumePolicy` as YAML."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from ..base.files import open_regular
from ..errors import PolicyError
from .document import from_dict, to_dict
from .policy import ResumePolicy
from .yaml_loader import MAX_SIZE, compose, load


def read(path: str | Path, name: str = "--selective-policy") -> ResumePolicy:
    """Read a policy file.

    Args:
        path: The YAML file.
        name: The flag or argument that names the file, for errors.

    Raises:
        PolicyError: The file cannot be read, is not YAML, or is not a policy. The error names the
            file and the place in it.
    """
    try:
        with open_regular(Path(path)) as file, io.TextIOWrapper(file, encoding="utf-8") as lines:
            text = lines.read(MAX_SIZE + 1)
    except (OSError, UnicodeDecodeError) as e:
        raise PolicyError(f"{name} {path}: cannot be read: {e}") from None
    try:
        return loads(text)
    except PolicyError as e:
        raise PolicyError(f"{name} {path}: {e}") from None


def loads(text: str) -> ResumePolicy:
    """Parse a policy from YAML text.

    Raises:
        PolicyError: See `read`. The error names the line, if there is one that it is about.
    """
    try:
        content = load(text)
    except PolicyError:
        raise
    except (yaml.YAMLError, ValueError) as e:
        raise PolicyError(
            f"not YAML: {' '.join(str(e).split())}. Text that begins with * or ends with : needs "
            "quotes"
        ) from None
    try:
        return from_dict({} if content is None else content)
    except PolicyError as e:
        line = _line_of(str(e), text)
        raise PolicyError(f"line {line}: {e}" if line else str(e)) from None


def _line_of(message: str, text: str) -> int | None:
    """Return the line that a refusal is about; None if the message does not tell.

    Args:
        message: It may begin with a place such as ``moments[0].match``, and quote a key or a value.
        text: The YAML text, which has been loaded.
    """
    root = compose(text)
    found = [] if root is None else list(_places(root, ""))
    place = re.match(r"[\w.\[\]]*", message)
    inside = [
        one for one in found if place and f"{one[0]}.".startswith((f"{place[0]}.", f"{place[0]}["))
    ]
    for word in re.findall(r"'([^']+)'", message):
        lines = {line for _, line, value in inside or found if word in (value, *value.split())}
        if len(lines) == 1:
            return lines.pop()
    return inside[0][1] if inside else None


def _places(node: yaml.Node, path: str) -> Iterator[tuple[str, int, str]]:
    """Yield the place, the line and the text of every key, item and value below a node."""
    if isinstance(node, yaml.ScalarNode):
        yield path, node.start_mark.line + 1, node.value
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield f"{path}[{number}]", item.start_mark.line + 1, ""
            yield from _places(item, f"{path}[{number}]")
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{path}.{key.value}".lstrip(".")
            yield from _places(key, inner)
            yield from _places(value, inner)


def dumps(policy: ResumePolicy) -> str:
    """Write a policy as YAML text for `loads`; defaults are left out."""
    content = to_dict(policy)
    return yaml.safe_dump(content, sort_keys=False, width=96) if content else "{}\n"
