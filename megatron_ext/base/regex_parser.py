"""Parse the regular expressions that `.regex` can match."""

from __future__ import annotations

import re
from typing import Any

#: Bounds of one expression. A counted repetition is written out.
MAX_LENGTH = 256
MAX_DEPTH = 16
MAX_INSTRUCTIONS = 512

_QUANTIFIER = re.compile(r"[*+?]|\{(?=[\d,])(\d*)(,?)(\d*)\}", re.ASCII)
_GROUP = re.compile(r"\((?:\?:|\?P<(\w+)>|(?!\?))")
_CLASS = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]", re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
#: Letters after a backslash that stand for one character.
_LETTERS = "dDwWsSntrfv"
_EXPECTED = (
    "expected literals, classes, '.', '|', groups, '*', '+', '?' and '{m,n}', and '^' and '$' at "
    "the ends only, and '(?!...)' at the beginning of a match"
)

#: A parsed expression: its kind, and what the kind has.
Node = tuple[Any, ...]


class PatternError(ValueError):
    """A pattern is malformed, or cannot be matched in linear time."""


class Parser:
    """Parses what `re` has accepted; `elements` are the parts that read one character."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = int(text.startswith("^"))
        self._end = len(text) - int(re.search(r"(?<!\\)(?:\\\\)*\$\Z", text) is not None)
        self.elements: list[str] = []

    def parse(self) -> Node:
        """Return the tree of the whole expression."""
        found = self._choice(0)
        if self._at < self._end:
            raise self._refused()
        return found

    def group_at(self, begin: int) -> tuple[str, str]:
        """Split off a group: the text in it, which begins at `begin`, and what comes after it."""
        self._at = begin
        self._choice(1)
        return self._text[begin : self._at], self._text[self._at + 1 :]

    def _refused(self, why: str = "cannot be matched in linear time") -> PatternError:
        return PatternError(f"{self._text[self._at : self._at + 4]!r} {why}; {_EXPECTED}")

    def _choice(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise PatternError(f"its groups are nested more than {MAX_DEPTH} deep")
        choices: list[list[Node]] = [[]]
        while self._at < self._end and (character := self._text[self._at]) != ")":
            if character == "|":
                self._at += 1
                choices.append([])
            else:
                choices[-1].append(self._repeated(self._one(depth)))
        return "choice", [("sequence", one) for one in choices]

    def _one(self, depth: int) -> Node:
        text, at = self._text, self._at
        if text[at] == "(":
            begin = _GROUP.match(text, at)
            if begin is None:
                raise self._refused()
            self._at = begin.end()
            inner = self._choice(depth + 1)
            self._at += 1
            return inner if begin[1] is None else ("group", begin[1], inner)
        if text[at] == "[":
            found = _CLASS.match(text, at)
            element = "" if found is None else found[0]
            if not element.isascii():
                raise self._refused("has a character that is not ASCII in a class")
        elif text[at] == "\\":
            element = text[at : at + 2]
        else:
            element = text[at] if text[at] == "." else re.escape(text[at])
        letters = (e for e in _ESCAPED.findall(element) if e.isalnum())
        if not element or text[at] in "*+?^$" or any(e not in _LETTERS for e in letters):
            raise self._refused()
        self._at += len(element) if text[at] in "[\\" else 1
        if element not in self.elements:
            self.elements.append(element)
        return "read", self.elements.index(element)

    def _repeated(self, inner: Node) -> Node:
        found = _QUANTIFIER.match(self._text, self._at, self._end)
        if found is None:
            return inner
        self._at = found.end()
        least: int
        most: int | None
        if found[0] in "*+?":
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[found[0]]
        else:
            least = int(found[1] or 0)
            most = (int(found[3]) if found[3] else None) if found[2] else least
        if max(least, most or 0) > MAX_INSTRUCTIONS:
            raise PatternError(f"{found[0]} repeats more than {MAX_INSTRUCTIONS} times")
        rest = self._text[self._at : self._at + 1]
        if rest == "+":
            raise self._refused()
        self._at += rest == "?"
        return "repeat", inner, least, most, rest != "?"
