"""The text forms of moment rules, which are the same in flags, in YAML and in reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args

from ..errors import PolicyError

Key = Literal["exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Key, ...] = get_args(Key)

#: The text of a number: finite and decimal.
DECIMAL = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_INTEGER = re.compile(r"-?\d+", re.ASCII)


@dataclass(frozen=True)
class Form:
    r"""One text form of a rule, with its description for the help and the documents.

    Args:
        text: Its words. A capital letter stands for a number, and N for an integer. Words in
            brackets are optional, as in ``prune-random P [seed N]``.
        what: The description in one line.
        formula: The formula in TeX.
        basis: The basis of the formula: P (published) with arXiv ids, D (derived from Adam's
            definition) or X (experimental).
        values: The values of the rule's first fields, if the words imply them. For example,
            ``reset`` is a fill with 0.
        moments: The moments that the form is for.
        because: The explanation in the error for another moment.
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
        """The first word of the form."""
        return self.text.split()[0]

    @property
    def letters(self) -> tuple[str, ...]:
        """The capital letters, which stand for the fields of the rule after `values`."""
        return tuple(w for w in (*self._required, *self._optional) if w.isupper())

    def matches(self, words: Sequence[str]) -> bool:
        """Whether words have this form. Any word matches a number."""
        shapes = (self._required, (*self._required, *self._optional))
        return any(
            len(words) == len(shape)
            and all(s.isupper() or s == w for s, w in zip(shape, words, strict=True))
            for shape in shapes
        )

    def read(self, words: Sequence[str], text: str) -> tuple[Any, ...]:
        """Read the values of the rule's fields from words of this form.

        Raises:
            PolicyError: A word is not a number. The message has `text`.
        """
        shape = (*self._required, *self._optional)
        pairs = zip(shape, words, strict=False)
        return (*self.values, *(_number(s, w, text) for s, w in pairs if s.isupper()))

    def write(self, rule: Any) -> str:
        """Write a rule whose first fields are `values`."""
        lettered = dict(zip(self.letters, fields(rule)[len(self.values) :], strict=False))
        numbers = {letter: getattr(rule, f.name) for letter, f in lettered.items()}
        words = self._required
        if any(numbers[c] != lettered[c].default for c in self._optional if c in lettered):
            words += self._optional
        return " ".join(repr(numbers[w]) if w in numbers else w for w in words)

    def unset(self, rule: type) -> list[str]:
        """List the fields of a rule to which this form gives no value."""
        of_rule = fields(rule)
        given = len(self.values) + sum(w.isupper() for w in self._required)
        return [f.name for f in of_rule[given:] if f.default is MISSING]

    @property
    def pattern(self) -> str:
        """A regular expression of the text that `read` accepts, for a JSON schema."""

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
