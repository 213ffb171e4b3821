"""Regular expressions that are matched in linear time, for patterns that a stranger may write.

Python's `re` tries every way to match, whose number may grow exponentially with the name. Here an
expression becomes a program of few instructions (Thompson's construction) and that a table of
states, which reads each character of a name once. What a table cannot match is refused.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from .regex_parser import MAX_INSTRUCTIONS, MAX_LENGTH, Node, Parser, PatternError

#: The most steps that the table of an expression may take to make.
MAX_STEPS = 20_000

#: Every kind of character that an expression in ASCII can tell apart.
_SAMPLES = (*map(chr, range(128)), "\u00e9", "\u0663", "\u2003", "\u2603")


class _Instruction(NamedTuple):
    """One instruction; `other` is the second choice of a ``split`` and the slot of a ``save``."""

    kind: str
    next: int
    other: int = 0


class Regex:
    """A regular expression for a whole name.

    Args:
        text: The expression, in the syntax of `re`.

    Raises:
        PatternError: It is malformed, too large, or cannot be matched in linear time.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise PatternError(f"it has {len(text)} characters; expected at most {MAX_LENGTH}")
        try:
            names = re.compile(text).groupindex
        except (re.error, OverflowError, RecursionError) as e:
            raise PatternError(f"not a regular expression: {e}") from None
        parser = Parser(text)
        tree = parser.parse()
        self.groups = tuple(names)
        self._classes = _Classes(parser.elements)
        self._signatures = self._classes.signatures([*_SAMPLES, *text])
        self._program: list[_Instruction] = [_Instruction("match", 0)]
        self._emitted = 0
        self._start = self._emit(tree, 0)
        self._build()

    def fits(self, name: str) -> bool:
        """Whether the whole name matches."""
        state, rows, classes = 0, self._rows, self._classes
        for character in name:
            state = rows[state][classes[character]]
            if state < 0:
                return False
        return self._accepts[state]

    def match(self, name: str) -> dict[str, str | None] | None:
        """Match the whole name as `re` does.

        Returns:
            The text of each named group, None for one that took no part; None without a match.
        """
        if not self.fits(name):
            return None
        # Depth first, the preferred choice first. What failed at a position fails there again.
        tried: set[tuple[int, int]] = set()
        stack: list[tuple[int, int, Any]] = [(self._start, 0, None)]
        while stack:
            at, position, saved = stack.pop()
            if (at, position) in tried:
                continue
            tried.add((at, position))
            kind, following, other = self._program[at]
            if kind == "match" and position == len(name):
                return self._texts(name, saved)
            if kind == "split":
                stack += [(other, position, saved), (following, position, saved)]
            elif kind == "save":
                stack.append((following, position, (other, position, saved)))
            elif kind == "read" and position < len(name) and self._reads(other, name[position]):
                stack.append((following, position + 1, saved))
        return None

    def _texts(self, name: str, saved: Any) -> dict[str, str | None]:
        ends: dict[int, int] = {}
        while saved is not None:
            slot, position, saved = saved
            ends.setdefault(slot, position)
        return {
            group: name[ends[2 * i] : ends[2 * i + 1]] if 2 * i + 1 in ends else None
            for i, group in enumerate(self.groups)
        }

    def _reads(self, element: int, character: str) -> bool:
        return self._signatures[self._classes[character]][element]

    def _emit(self, node: Node, following: int) -> int:
        """Add the instructions of a node that go on at `following`; return the first."""
        self._emitted += 1
        if self._emitted > MAX_STEPS:
            raise PatternError("it repeats too much; write + or * instead of {m,n}")
        kind, *rest = node
        if kind == "read":
            return self._add(_Instruction("read", following, rest[0]))
        if kind == "sequence":
            for part in reversed(rest[0]):
                following = self._emit(part, following)
            return following
        if kind == "choice":
            first, *others = rest[0]
            if not others:
                return self._emit(first, following)
            second = self._emit(("choice", others), following)
            return self._add(_Instruction("split", self._emit(first, following), second))
        if kind == "group":
            number = self.groups.index(rest[0])
            end = self._add(_Instruction("save", following, 2 * number + 1))
            return self._add(_Instruction("save", self._emit(rest[1], end), 2 * number))
        inner, least, most, greedy = rest
        if most is None:
            loop = self._add(_Instruction("split", 0, 0))
            self._program[loop] = _split(self._emit(inner, loop), following, greedy)
            entry = loop
        else:
            entry = following
            for _ in range(most - least):
                entry = self._add(_split(self._emit(inner, entry), following, greedy))
        for _ in range(least):
            entry = self._emit(inner, entry)
        return entry

    def _add(self, instruction: _Instruction) -> int:
        if len(self._program) >= MAX_INSTRUCTIONS:
            raise PatternError(
                f"it has more than {MAX_INSTRUCTIONS} parts, counted repetitions written out; "
                "write + or * instead of {m,n}"
            )
        self._program.append(instruction)
        return len(self._program) - 1

    def _build(self) -> None:
        """Make the table: a state is the set of instructions that may be next."""
        self._rows: list[list[int]] = []
        states = {self._closure([self._start]): 0}
        steps = 0
        for state in (waiting := list(states)):
            row = []
            for signature in self._signatures:
                steps += len(state) + 1
                reads = (self._program[i] for i in state if i)
                after = self._closure([i.next for i in reads if signature[i.other]])
                if after and after not in states:
                    states[after] = len(states)
                    waiting.append(after)
                row.append(states[after] if after else -1)
            if steps > MAX_STEPS:
                raise PatternError(
                    "there are too many ways to match it; write fewer counted repetitions {m,n} "
                    "and fewer parts between one .* and the next"
                )
            self._rows.append(row)
        self._accepts = [0 in state for state in states]

    def _closure(self, begin: list[int]) -> frozenset[int]:
        """Return the reading instructions, and 0 for the end, before the next character."""
        found, seen, waiting = set(), set(begin), list(begin)
        while waiting:
            at = waiting.pop()
            kind, following, other = self._program[at]
            if kind in ("read", "match"):
                found.add(at)
                continue
            for one in (following, other) if kind == "split" else (following,):
                if one not in seen:
                    seen.add(one)
                    waiting.append(one)
        return frozenset(found)


class _Classes(dict[str, int]):
    """Character -> its class: the number of its signature, which says what elements read it."""

    def __init__(self, elements: list[str]) -> None:
        self._elements = [re.compile(e) for e in elements]
        self._numbers: dict[tuple[bool, ...], int] = {}

    def __missing__(self, character: str) -> int:
        signature = tuple(e.fullmatch(character) is not None for e in self._elements)
        self[character] = number = self._numbers.setdefault(signature, len(self._numbers))
        return number

    def signatures(self, samples: list[str]) -> list[tuple[bool, ...]]:
        """Return the signatures of all classes, of which the samples have one each."""
        for character in samples:
            self[character]
        return list(self._numbers)


def _split(inner: int, out: int, greedy: bool) -> _Instruction:
    return _Instruction("split", inner, out) if greedy else _Instruction("split", out, inner)
