"""Match parameters and param_groups to rules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.patterns import compiled
from ..base.regex_parser import PatternError
from ..base.values import plain
from ..errors import PolicyError
from ..rules.base import Rule
from ..rules.elementwise import KEEP
from ..rules.registry import check_moment, write
from .checks import all_of, unique_keys, whole_number

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class GroupRule:
    """Exceptions for the param_groups with certain attributes.

    Args:
        match: Key of a param_group -> its value in the current group, for example
            ``{"is_expert_parallel": True}``.
        keep: Keys that come from the checkpoint in these groups.
        take: Keys that come from the arguments in these groups.

    Raises:
        PolicyError: The rule matches nothing, decides nothing, or names a key that cannot be
            chosen.
    """

    match: tuple[tuple[str, Scalar], ...]
    keep: tuple[str, ...] = ()
    take: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Normalise the fields and refuse a rule that can never be applied."""
        object.__setattr__(self, "match", attributes(self.match, "group rule"))
        if not self.match:
            raise PolicyError("group rule: expected at least one attribute to match, found none")
        for name in ("keep", "take"):
            keys = unique_keys(getattr(self, name), f"group rule {self}", "key of a param_group")
            object.__setattr__(self, name, keys)
        both = sorted(set(self.keep) & set(self.take))
        if both:
            raise PolicyError(f"group rule {self}: {', '.join(both)} both kept and taken")
        if not self.keep and not self.take:
            raise PolicyError(f"group rule {self}: expected keys to keep or to take, found none")
        if "weight_decay" in (*self.keep, *self.take):
            raise PolicyError(
                f"group rule {self}: 'weight_decay' cannot be chosen per group: the scheduler "
                "computes it before every step from start_wd and end_wd and the group's wd_mult. "
                "Name it in --selective-keep-hyperparameters, for all groups"
            )

    def fits(self, group: Mapping[str, Any]) -> bool:
        """Whether a current param_group has all attributes."""
        return has_attributes(group, self.match)

    def __str__(self) -> str:
        """Write the attributes as in a flag."""
        return " ".join(f"{k}={_scalar_text(v)}" for k, v in self.match)


@dataclass(frozen=True)
class Match:
    """A pattern for parameters and for their rows.

    Args:
        name: Glob (``*`` also matches dots) or, after ``re:``, a regular expression that has to
            match the whole name. A name is ``decoder.layers.<global index>. ...``, the same for
            every parallel layout.
        rows: First row and one past the last, along dimension 0 of the unsharded parameter; None
            for an open end.
        ndim: Number of dimensions of the parameter, or None for any.
        group: Attributes of its param_group, as in `GroupRule`.

    Raises:
        PolicyError: The pattern cannot be used (`megatron_ext.base.patterns.compiled`), or the rows
            are not a range.
    """

    name: str = "*"
    rows: tuple[int | None, int | None] | None = None
    ndim: int | None = None
    group: tuple[tuple[str, Scalar], ...] = ()

    def __post_init__(self) -> None:
        """Check the pattern and the rows."""
        if not isinstance(self.name, str) or not self.name:
            raise PolicyError(f"match: expected a parameter name or glob, found {self.name!r}")
        object.__setattr__(self, "group", attributes(self.group, f"rule {self.name}"))
        try:
            compiled(self.name)
        except PatternError as e:
            raise PolicyError(f"match {self.name!r}: {e}") from None
        if self.rows is not None:
            object.__setattr__(self, "rows", _rows(self.rows, self.name))
        whole = isinstance(self.ndim, int) and not isinstance(self.ndim, bool) and self.ndim >= 0
        if self.ndim is not None and not whole:
            raise PolicyError(f"match {self.name!r}: ndim is {self.ndim!r}; expected 0, 1, 2 ...")

    def fits(self, name: str, ndim: int, group: Mapping[str, Any]) -> bool:
        """Whether some rows of a parameter match."""
        return (
            (self.ndim is None or self.ndim == ndim)
            and has_attributes(group, self.group)
            and bool(compiled(self.name)(name))
        )

    @classmethod
    def parse(cls, text: str) -> Match:
        """Parse ``NAME[A:B] ndim=N KEY=VALUE ...``; only the name is required.

        Raises:
            PolicyError: A part cannot be parsed. The error names it.
        """
        name, *attributes = str(text).split() or [""]
        rows = None
        if found := re.fullmatch(r"(.*)\[(\d*):(\d*)\]", name):
            name, first, last = found.groups()
            ends = (whole_number(e, f"match {text!r}") if e else None for e in (first, last))
            rows = (next(ends), next(ends))
        if not name and rows is None:
            raise PolicyError(f"match {text!r}: expected a parameter name or glob, found none")
        values: list[tuple[str, str]] = []
        for attribute in attributes:
            key, equals, value = attribute.partition("=")
            if not equals:
                raise PolicyError(f"match {text!r}: expected KEY=VALUE, found {attribute!r}")
            values.append((key, value))
        ndims = [value for key, value in values if key == "ndim"]
        if len(ndims) > 1 or not all(re.fullmatch(r"\d+", n) for n in ndims):
            raise PolicyError(f"match {text!r}: expected one ndim=NUMBER, found {', '.join(ndims)}")
        group = tuple((key, value) for key, value in values if key != "ndim")
        ndim = whole_number(ndims[0], f"match {text!r}: ndim") if ndims else None
        return cls(name or "*", rows, ndim, group)

    def __str__(self) -> str:
        """Write the match as `parse` reads it."""
        rows = ""
        if self.rows is not None:
            rows = "[{}:{}]".format(*("" if r is None else r for r in self.rows))
        words = [self.name + rows]
        words += [f"ndim={self.ndim}"] if self.ndim is not None else []
        words += [f"{k}={_scalar_text(v)}" for k, v in self.group]
        return " ".join(words)


@dataclass(frozen=True)
class MomentRule:
    """The rules for the moments of some parameters.

    Args:
        match: The parameters and rows.
        exp_avg: The rule for exp_avg.
        exp_avg_sq: The rule for exp_avg_sq.

    Raises:
        PolicyError: A rule has no meaning for its moment.
    """

    match: Match
    exp_avg: Rule = KEEP
    exp_avg_sq: Rule = KEEP

    def __post_init__(self) -> None:
        """Refuse rules that have no meaning for their moment."""
        all_of(Match, (self.match,), "rule: match")
        for key in ("exp_avg", "exp_avg_sq"):
            check_moment(key, getattr(self, key), f"rule {self.match}")

    def __str__(self) -> str:
        """Write the rule for messages."""
        return (
            f"{str(self.match)!r} (exp_avg: {write(self.exp_avg)}, "
            f"exp_avg_sq: {write(self.exp_avg_sq)})"
        )


def attributes(found: Any, where: str) -> tuple[tuple[str, Scalar], ...]:
    """Normalise attributes of param_groups for `has_attributes`.

    Args:
        found: A mapping or pairs. Text is parsed as in a flag.
        where: Their place, for errors.

    Returns:
        Pairs of key and value, sorted by key.

    Raises:
        PolicyError: They are not pairs of a key and a plain value, or a key occurs twice.
    """
    items = found.items() if isinstance(found, Mapping) else found
    out: dict[str, Scalar] = {}
    for item in items:
        if not (isinstance(item, Sequence) and len(item) == 2 and isinstance(item[0], str)):
            raise PolicyError(f"{where}: expected KEY: VALUE pairs, found {item!r}")
        key, value = item
        if not (value is None or isinstance(value, str | int | float | bool)) or value != value:
            raise PolicyError(f"{where}: {key}: expected a plain value, found {value!r}")
        if key in out:
            raise PolicyError(f"{where}: {key!r} is given twice; expected one value")
        out[key] = scalar(value) if isinstance(value, str) else value
    return tuple(sorted(out.items()))


def has_attributes(group: Mapping[str, Any], wanted: Sequence[tuple[str, Scalar]]) -> bool:
    """Whether a param_group has all these attributes."""
    return all(_equal(group.get(key), value) for key, value in wanted)


def _rows(found: Any, name: str) -> tuple[int | None, int | None]:
    ends = tuple(found)
    good = len(ends) == 2 and all(
        e is None or (isinstance(e, int) and not isinstance(e, bool) and e >= 0) for e in ends
    )
    if not good:
        raise PolicyError(f"match {name!r}: rows {found!r}: expected two numbers, A and B of A:B")
    first, last = ends
    if last is not None and (first or 0) >= last:
        raise PolicyError(
            f"match {name!r}: rows {first or 0}:{last} are empty; expected A:B with A < B"
        )
    return first, last


def scalar(text: str) -> Scalar:
    """Parse a value of a flag: a number, true, false, none, or else the text itself."""
    named: dict[str, Scalar] = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _scalar_text(value: Scalar) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _equal(found: Any, wanted: Scalar) -> bool:
    found = plain(found)
    if isinstance(wanted, bool) or isinstance(found, bool):
        return bool(found) == bool(wanted) and found is not None
    return bool(found == wanted)
