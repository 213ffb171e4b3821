"""How a moment rule is written: the same words in a flag, in YAML and in a report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args

from ..errors import PolicyError

Key = Literal["exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Key, ...] = get_args(Key)

#: A number as it is written: finite, decimal.
DECIMAL = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_INTEGER = re.compile(r"-?\d+", re.ASCII)


@dataclass(frozen=True)
class Form:
    r"""One way in which a rule is written, and what the help and the documents say about it.

    Args:
        text: Its words. A capital letter stands for a number (N for an integer), words in brackets
            may be left out: ``prune-random P [seed N]``.
        what: What it does, in one line.
        formula: The same in TeX.
        basis: Where the formula comes from: P (published) with arXiv ids, D (derived from Adam's
            definition) or X (experimental).
        values: The rule's first fields, where the words stand for them: ``reset`` is a fill of 0.
        moments: Which moments it has a meaning for.
        because: What the error says where another moment is given it.
    """

    text: str
    what: str
    formula: str
    basis: str
    values: tuple[Any, ...] = ()
    moments: tuple[Key, ...] = MOMENTS
    because: str = ""

    @property
    def name(self) -> str:
        """The first word."""
        return self.text.split()[0]

    @property
    def letters(self) -> tuple[str, ...]:
        """The capital letters, which stand for the rule's fields after `values`."""
        return tuple(w for w in (*self._required, *self._optional) if w.isupper())

    def matches(self, words: Sequence[str]) -> bool:
        """Whether some words are this form, with anything in place of a number."""
        shapes = (self._required, (*self._required, *self._optional))
        return any(
            len(words) == len(shape)
            and all(s.isupper() or s == w for s, w in zip(shape, words, strict=True))
            for shape in shapes
        )

    def read(self, words: Sequence[str], text: str) -> tuple[Any, ...]:
        """The fields of the rule that some words of this form mean.

        Raises:
            PolicyError: A word is no number; names `text`.
        """
        shape = (*self._required, *self._optional)
        pairs = zip(shape, words, strict=False)
        return (*self.values, *(_number(s, w, text) for s, w in pairs if s.isupper()))

    def write(self, rule: Any) -> str:
        """The words for a rule, whose first fields are `values`."""
        lettered = dict(zip(self.letters, fields(rule)[len(self.values) :], strict=False))
        numbers = {letter: getattr(rule, f.name) for letter, f in lettered.items()}
        words = self._required
        if any(numbers[c] != lettered[c].default for c in self._optional if c in lettered):
            words += self._optional
        return " ".join(repr(numbers[w]) if w in numbers else w for w in words)

    def unset(self, rule: type) -> list[str]:
        """The fields of a rule that this form leaves without a value."""
        of_rule = fields(rule)
        given = len(self.values) + sum(w.isupper() for w in self._required)
        return [f.name for f in of_rule[given:] if f.default is MISSING]

    @property
    def pattern(self) -> str:
        """A regular expression of what `read` takes, for a JSON schema."""

        def of(words: Sequence[str]) -> list[str]:
            return [
                _INTEGER.pattern if w == "N" else DECIMAL.pattern if w.isupper() else w
                for w in words
            ]

        optional = "".join(f" +{part}" for part in of(self._optional))
        return " +".join(of(self._required)) + (f"({optional})?" if optional else "")

    @property
    def _required(self) -> tuple[str, ...]:
        return tuple(self.text.partition(" [")[0].split())

    @property
    def _optional(self) -> tuple[str, ...]:
        return tuple(self.text.partition(" [")[2].rstrip("]").split())


def _number(letter: str, word: str, text: str) -> float | int:
    if letter == "N":
        if not _INTEGER.fullmatch(word):
            raise PolicyError(f"{text!r}: expected an integer, found {word!r}")
        return int(word)
    if not DECIMAL.fullmatch(word):
        raise PolicyError(f"{text!r}: expected a number, found {word!r}")
    return float(word)
