"""Map the parameters of the current model to those of the checkpoint, as the user asked.

A parameter's state comes from the parameter of the same name unless a `Copy` names another one, or
`ParameterMap.new` says that the checkpoint has none.
"""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..base.regex import Regex
from ..base.regex_parser import MAX_LENGTH, PatternError
from ..errors import PolicyError
from .checks import all_of, at_most
from .match import Match

Copied = Literal["all", "weights", "moments"]

_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclass(frozen=True)
class Copy:
    """Take the state of some current parameters from other parameters of the checkpoint.

    Args:
        to: The current parameters: a name in which ``*`` stands for any text and ``{n}`` for a
            number; or, after ``re:``, a regular expression for the whole name.
        source: The checkpoint's parameter. The k-th ``*`` stands for the text of the k-th one in
            `to`, ``{n-2}`` for arithmetic on its numbers with ``+ - * // %`` and parentheses, and
            ``{name}`` for the text of a named group. If the result of the arithmetic is negative,
            the copy does not apply.
        state: ``"all"``, ``"weights"`` (with the master weights) or ``"moments"``.

    Raises:
        PolicyError: The names cannot be parsed, or `source` uses what `to` does not have.
    """

    to: str
    source: str
    state: Copied = "all"

    def __post_init__(self) -> None:
        """Refuse a copy that can never be applied."""
        for name in ("to", "source"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise PolicyError(
                    f"parameters: copy: expected the name of a parameter, found "
                    f"{getattr(self, name)!r}"
                )
            if len(getattr(self, name)) > MAX_LENGTH:
                raise PolicyError(
                    f"parameters: copy: {name} has {len(getattr(self, name))} characters; expected "
                    f"at most {MAX_LENGTH}"
                )
        if self.state not in get_args(Copied):
            raise PolicyError(
                f"parameters: copy to {self.to!r}: state is {self.state!r}; expected "
                f"{', '.join(get_args(Copied))}"
            )
        groups = set(_pattern(self.to).groups)
        missing = sorted({n for part in _template(self.source) for n in _names(part)} - groups)
        if missing:
            shown = ["*" if name.startswith("_star") else f"{{{name}}}" for name in missing]
            raise PolicyError(
                f"parameters: copy from {self.source!r}: {', '.join(shown)} is not in "
                f"{self.to!r}; expected only what that name has"
            )

    def source_of(self, name: str) -> str | None:
        """Return the checkpoint's parameter for a current one; None if the copy does not apply."""
        found = _pattern(self.to).match(name)
        if found is None:
            return None
        parts = [_evaluate(part, found) for part in _template(self.source)]
        return None if None in parts else "".join(str(part) for part in parts)

    def __str__(self) -> str:
        """Write the copy for messages and the phase's mark."""
        what = "" if self.state == "all" else f" ({self.state})"
        return f"{self.to} from {self.source}{what}"


@dataclass(frozen=True)
class ParameterMap:
    """What the user says about parameters that differ between the checkpoint and the model.

    Args:
        new: Patterns (as in `Match`) of current parameters whose state the checkpoint may lack.
            Their weights are as initialised unless the checkpoint has them, their master weights
            are made from the weights, and their moments are 0 before the rules.
        drop: Patterns of the checkpoint's parameters that may be left behind.
        copies: The state of parameters that comes from other parameters.

    Raises:
        PolicyError: A pattern is malformed.
    """

    new: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    copies: tuple[Copy, ...] = ()

    def __post_init__(self) -> None:
        """Normalise the fields and check the patterns."""
        for name in ("new", "drop"):
            found = getattr(self, name)
            if isinstance(found, str) or not all(isinstance(one, str) for one in found):
                raise PolicyError(
                    f"parameters: {name}: expected a list of patterns, found {found!r}"
                )
            object.__setattr__(self, name, tuple(dict.fromkeys(found)))
            at_most(getattr(self, name), f"parameters: {name}")
            for pattern in getattr(self, name):
                Match(pattern)
        object.__setattr__(self, "copies", all_of(Copy, self.copies, "parameters: copy"))
        at_most(self.copies, "parameters: copies")

    def __bool__(self) -> bool:
        """Whether anything is asked."""
        return bool(self.new or self.drop or self.copies)

    def operations(self) -> Iterator[str]:
        """Describe each part for the phase's mark."""
        yield from (f"new {pattern}" for pattern in sorted(self.new))
        yield from (f"drop {pattern}" for pattern in sorted(self.drop))
        yield from (f"copy {copy}" for copy in self.copies)

    def source_of(self, name: str) -> dict[str, tuple[str, str]]:
        """Find the sources of a current parameter.

        Returns:
            ``weights`` and ``moments`` -> the checkpoint's parameter, and the copy that says so.

        Raises:
            PolicyError: Two copies name different sources.
        """
        out: dict[str, tuple[str, str]] = {}
        for copy in self.copies:
            source = copy.source_of(name)
            if source is None:
                continue
            for what in ("weights", "moments") if copy.state == "all" else (copy.state,):
                before = out.setdefault(what, (source, str(copy)))
                if before[0] != source:
                    raise PolicyError(
                        f"parameters: {name} has two sources for its {what}: {before[0]} (copy "
                        f"{before[1]}) and {source} (copy {copy}); expected one. Make the copies "
                        "match different parameters"
                    )
        return out


#: Every parameter has the state of the same name.
NO_MAP = ParameterMap()

#: A part of a name: text, or an expression.
_Part = str | ast.expr


@functools.lru_cache(maxsize=1024)
def _pattern(to: str) -> Regex:
    """Compile the pattern of a copy's target."""
    if to.startswith("re:"):
        text = to[3:]
    else:
        stars, text = 0, ""
        for piece in re.split(r"(\*|\{[^{}]*\})", to):
            if piece == "*":
                text += f"(?P<_star{stars}>.*)"
                stars += 1
            elif piece.startswith("{"):
                if not piece[1:-1].isidentifier():
                    raise PolicyError(
                        f"parameters: copy to {to!r}: {piece} stands for a number; expected one "
                        "name in braces, as in {n}"
                    )
                text += rf"(?P<{piece[1:-1]}>\d+)"
            else:
                text += re.escape(piece)
    try:
        return Regex(text)
    except PatternError as e:
        raise PolicyError(f"parameters: copy to {to!r}: {e}") from None


@functools.lru_cache(maxsize=1024)
def _template(source: str) -> tuple[_Part, ...]:
    """Parse the name of a copy's source."""
    parts: list[_Part] = []
    stars = 0
    for piece in re.split(r"(\*|\{[^{}]*\})", source):
        if piece == "*":
            parts.append(ast.Name(f"_star{stars}"))
            stars += 1
        elif piece.startswith("{"):
            parts.append(_expression(piece[1:-1], source))
        elif piece:
            parts.append(piece)
    return tuple(parts)


def _expression(text: str, source: str) -> ast.expr:
    try:
        parsed = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        parsed = None
    known = (ast.Name, ast.Constant, ast.BinOp, ast.Load, *_OPERATORS)
    good = parsed is not None and all(
        isinstance(node, known) and isinstance(getattr(node, "value", 0), int)
        for node in ast.walk(parsed)
    )
    if not good or parsed is None:
        raise PolicyError(
            f"parameters: copy from {source!r}: {{{text}}} cannot be computed; expected a name or "
            "arithmetic on whole numbers with + - * // %, as in {n-12}"
        )
    return parsed


def _names(part: _Part) -> set[str]:
    if isinstance(part, str):
        return set()
    return {node.id for node in ast.walk(part) if isinstance(node, ast.Name)}


def _evaluate(part: _Part, groups: dict[str, str | None]) -> str | int | None:
    if isinstance(part, str):
        return part
    if isinstance(part, ast.Name):
        return groups[part.id]
    try:
        value = _number(part, groups)
    except (TypeError, ZeroDivisionError, ValueError):  # a group may take no part in a match
        return None
    return value if value >= 0 else None


def _number(node: ast.expr, groups: dict[str, str | None]) -> int:
    if isinstance(node, ast.BinOp):
        left, right = _number(node.left, groups), _number(node.right, groups)
        return _OPERATORS[type(node.op)](left, right)
    found: Any = groups[node.id] if isinstance(node, ast.Name) else node.value  # type: ignore[attr-defined]
    return int(found)
