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
#: Characters of a number.
_LONGEST_NUMBER = 64
#: The text that stands for each placeholder of a form; any other placeholder is a decimal number.
_TEXTS = {"N": _INTEGER, "PATTERN": re.compile(r"\S+")}


@dataclass(frozen=True)
class Form:
    r"""One text form of a rule, with its description for the help and the documents.

    Args:
        text: Its words. A word in capitals is a placeholder: PATTERN stands for a pattern of
            parameter names, N for an integer, and any other letter for a number. Words in brackets
            are optional, as in ``prune-random P [seed N]``.
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
    def placeholders(self) -> tuple[str, ...]:
        """The words in capitals, which stand for the fields of the rule after `values`."""
        return tuple(w for w in (*self._required, *self._optional) if w.isupper())

    def matches(self, words: Sequence[str]) -> bool:
        """Whether words have this form. Any word matches a placeholder."""
        shapes = (self._required, (*self._required, *self._optional))
        return any(
            len(words) == len(shape)
            and all(s.isupper() or s == w for s, w in zip(shape, words, strict=True))
            for shape in shapes
        )

    def lacks(self, words: Sequence[str]) -> bool:
        """Whether words are the name and more of this form, without the placeholders after them."""
        begun = self._required[: len(words)]
        return 1 < len(words) < len(self._required) and begun == tuple(words)

    def read(self, words: Sequence[str], text: str) -> tuple[Any, ...]:
        """Read the values of the rule's fields from words of this form.

        Raises:
            PolicyError: A word is not what a placeholder stands for. The message has `text`.
        """
        shape = (*self._required, *self._optional)
        pairs = zip(shape, words, strict=False)
        return (*self.values, *(_value(s, w, text) for s, w in pairs if s.isupper()))

    def write(self, rule: Any) -> str:
        """Write a rule whose first fields are `values`."""
        of_fields = dict(zip(self.placeholders, fields(rule)[len(self.values) :], strict=False))
        values = {word: getattr(rule, f.name) for word, f in of_fields.items()}
        words = self._required
        if any(values[w] != of_fields[w].default for w in self._optional if w in values):
            words += self._optional
        texts = {word: v if isinstance(v, str) else repr(v) for word, v in values.items()}
        return " ".join(texts.get(w, w) for w in words)

    def unset(self, rule: type) -> list[str]:
        """List the fields of a rule to which this form gives no value."""
        of_rule = fields(rule)
        given = len(self.values) + sum(w.isupper() for w in self._required)
        return [f.name for f in of_rule[given:] if f.default is MISSING]

    @property
    def pattern(self) -> str:
        """A regular expression of the text that `read` accepts, for a JSON schema."""

        def of(words: Sequence[str]) -> list[str]:
            return [_TEXTS.get(w, DECIMAL).pattern if w.isupper() else w for w in words]

        optional = "".join(f" +{part}" for part in of(self._optional))
        return " +".join(of(self._required)) + (f"({optional})?" if optional else "")

    @property
    def _required(self) -> tuple[str, ...]:
        return tuple(self.text.partition(" [")[0].split())

    @property
    def _optional(self) -> tuple[str, ...]:
        return tuple(self.text.partition(" [")[2].rstrip("]").split())


def _value(placeholder: str, word: str, text: str) -> float | int | str:
    if placeholder == "PATTERN":
        return word
    if not _TEXTS.get(placeholder, DECIMAL).fullmatch(word):
        what = "an integer" if placeholder == "N" else "a number"
        raise PolicyError(f"{text!r}: expected {what}, found {word!r}")
    if len(word) > _LONGEST_NUMBER:
        raise PolicyError(
            f"expected a number of at most {_LONGEST_NUMBER} characters, found one of {len(word)}"
        )
    return int(word) if placeholder == "N" else float(word)
