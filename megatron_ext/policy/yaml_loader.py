"""Load YAML that a stranger may have written: bounded, without aliases, numbers in plain decimal.

YAML 1.1, which PyYAML reads, takes 0100 as octal and 1:30 as a number to the base 60. Here what
people do not write as a number is refused, with the number that is meant.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..errors import PolicyError

#: Bounds of a policy file.
MAX_SIZE = 1 << 18
MAX_NODES = 20_000
MAX_DEPTH = 16
MAX_DIGITS = 64

_INTEGER, _FLOAT, _TEXT = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "str"))
_MERGE = "tag:yaml.org,2002:merge"
_UNCLEAR = "!unclear-number"
#: Keys whose values are texts: a text may look like any number.
_TEXT_KEYS = ("name", "rows", "match", "to", "from", "phase")
#: Tags of PyYAML's that are kept; what is a number is decided below.
_KEPT = ("bool", "null", "merge", "timestamp")
#: In this order. A number without a point but with an exponent is a text to PyYAML, and the
#: policy's fields read numbers from texts.
_NUMBERS = (
    (_INTEGER, r"[-+]?(?:0|[1-9][0-9]*)"),
    (_FLOAT, r"[-+]?(?:0|[1-9][0-9]*)\.[0-9]*(?:[eE][-+][0-9]+)?|\.[0-9]+(?:[eE][-+][0-9]+)?"),
    (_FLOAT, r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
    (_TEXT, r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"),
    (_UNCLEAR, r"[-+]?0[xXoObB][0-9a-fA-F_]+"),
    (_UNCLEAR, r"[-+]?[0-9][0-9_]*(?::[0-9_]+)+(?:\.[0-9_]*)?"),
    (_UNCLEAR, r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9_]+)?"),
)


def load(text: str) -> Any:
    """Load one YAML document as plain data.

    Args:
        text: The document.

    Raises:
        PolicyError: It is too large or too deep, or has an alias, an anchor, a merge key, a tag, a
            key that is given twice or a number that is not plain decimal. The error names the line.
        yaml.YAMLError, ValueError: It is not YAML.
    """
    if len(text) > MAX_SIZE:
        raise PolicyError(f"expected at most {MAX_SIZE} characters, found more")
    return yaml.load(text, _Loader)


def compose(text: str) -> yaml.Node | None:
    """Return the nodes of a document that `load` has accepted, with their lines."""
    return yaml.compose(text, _Loader)


class _Loader(yaml.SafeLoader):
    """Loader that refuses what a policy does not need."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node of a document within the bounds; called for every node."""
        event: Any = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            instead = "the value itself, in quotes if it begins with *"
            raise _refused(line, f"the alias *{event.anchor}", instead)
        if event.anchor is not None:
            raise _refused(line, f"the anchor &{event.anchor}", "the value itself")
        if event.tag is not None:
            raise _refused(line, f"the tag {event.tag}", "the value without it")
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise PolicyError(f"line {line}: expected at most {MAX_NODES} values, found more")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise PolicyError(f"line {line}: expected at most {MAX_DEPTH} levels, found more")
        made: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if made is not None and made.tag == _MERGE:
            raise _refused(line, "the merge key <<", "the keys themselves")
        return made

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping; two equal keys are an error, unlike in SafeLoader."""
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                line = key.start_mark.line + 1
                raise PolicyError(f"line {line}: {key.value!r} is given twice; expected once")
            seen.add(key.value)
            if key.value in _TEXT_KEYS and value.tag == _UNCLEAR:
                value.tag = _TEXT
        return super().construct_mapping(node, deep)

    def construct_unclear(self, node: yaml.ScalarNode) -> Any:
        """Refuse a number that YAML 1.1 and people read differently."""
        raise _refused(node.start_mark.line + 1, f"the number {node.value}", _plain(node.value))

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Construct a number with a bounded number of digits."""
        if len(node.value) > MAX_DIGITS:
            line = node.start_mark.line + 1
            raise PolicyError(
                f"line {line}: expected a number of at most {MAX_DIGITS} characters, found one of "
                f"{len(node.value)}"
            )
        number = node.value.lower().replace(".inf", "inf").replace(".nan", "nan")
        return int(number) if node.tag == _INTEGER else float(number)


def _refused(line: int, what: str, instead: str) -> PolicyError:
    return PolicyError(f"line {line}: {what} is not read in a policy; write {instead}")


def _plain(text: str) -> str:
    """Say how to write a number that is not plain decimal."""
    digits = text.replace("_", "")
    if re.fullmatch(r"[-+]?0[xXoObB][0-9a-fA-F]{1,16}", digits):
        try:
            digits = str(int(digits, 0))
        except ValueError:
            digits = ""
    elif ":" in digits:
        digits = ""
    else:
        digits = re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", digits)
    plain = digits if 0 < len(digits) <= MAX_DIGITS else "it as a decimal number"
    return f"{plain}, or quotes around it if it is a text"


def _resolvers() -> None:
    table = {
        first: [(tag, found) for tag, found in pairs if tag.rpartition(":")[2] in _KEPT]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _Loader.yaml_implicit_resolvers = table
    for tag, number in _NUMBERS:
        _Loader.add_implicit_resolver(tag, re.compile(rf"(?:{number})\Z"), list("-+.0123456789"))
    for tag in (_INTEGER, _FLOAT):
        _Loader.add_constructor(tag, _Loader.construct_number)
    _Loader.add_constructor(_UNCLEAR, _Loader.construct_unclear)


_resolvers()
