"""Tables of many tensors: the most notable of each state, under one line about all of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import MegatronExtError
from . import output

if TYPE_CHECKING:
    from rich.console import Console

    from ..checkpoint.stored import StoredCheckpoint
    from ..offline.moment_scan import TensorDistance, TensorStatistics

#: ``--by`` -> what it sorts by, the largest first.
_ORDERS: dict[str, Callable[[TensorStatistics], float]] = {
    "rms": lambda s: _rms([s]),
    "max": lambda s: s.largest,
    "nonfinite": lambda s: s.nonfinite,
}
_TOP = 5


def add_options(parser: argparse.ArgumentParser, *, sorted_by: bool) -> None:
    """Add the options that choose the tensors that are printed.

    Args:
        parser: The parser of a command.
        sorted_by: Whether the order can be chosen.
    """
    parser.add_argument(
        "--top",
        type=int,
        metavar="N",
        help=f"with --moments: print N tensors of each state. Default: {_TOP}; --json has all",
    )
    parser.add_argument(
        "--match",
        metavar="PATTERN",
        help="with --moments: print only tensors whose name matches, as in a policy",
    )
    if sorted_by:
        parser.add_argument(
            "--by",
            choices=[*_ORDERS],
            help="with --moments: print the tensors with the largest RMS, largest absolute value "
            "or most non-finite elements. Default: rms; those with non-finite elements come first",
        )


def check_options(options: argparse.Namespace, *stored: StoredCheckpoint) -> None:
    """Refuse options that choose nothing, before a tensor is read.

    Args:
        options: The parsed options.
        stored: The checkpoints.

    Raises:
        MegatronExtError: An option has no effect or is malformed, or no name matches.
    """
    from ..base.patterns import compiled
    from ..base.regex_parser import PatternError
    from ..base.text import first_of
    from ..offline.slabs import require_moments

    names = [f"--{n}" for n in ("top", "match", "by") if getattr(options, n, None) is not None]
    if names and not options.moments:
        raise MegatronExtError(f"{', '.join(names)} without --moments: add --moments")
    if options.top is not None and options.top < 1:
        raise MegatronExtError(f"--top {options.top}: expected a number of at least 1")
    if options.match is None:
        return
    try:
        fits = compiled(options.match)
    except PatternError as e:
        raise MegatronExtError(f"--match {options.match}: {e}") from None
    found = sorted({key.name for one in stored for key in require_moments(one)[1].values()})
    if not any(map(fits, found)):
        raise MegatronExtError(
            f"--match {options.match}: expected the name of a tensor, found {len(found)} others: "
            f"{first_of(found)}. A glob has to match the whole name, as in '*linear_fc1*'"
        )


def print_statistics(
    to: Console, found: Iterable[TensorStatistics], options: argparse.Namespace
) -> None:
    """Print the statistics of the moments.

    Args:
        to: The console.
        found: Of all tensors.
        options: The parsed options.
    """
    order = _ORDERS[options.by or "rms"]
    for title, chosen in _by_state(found, options.match):
        chosen.sort(key=lambda s: (s.nonfinite == 0, -order(s)))
        elements, bad = sum(s.elements for s in chosen), sum(s.nonfinite for s in chosen)
        tensors = sum(s.nonfinite > 0 for s in chosen)
        where = f" in {tensors} of them" if bad else ""
        line = (
            f"{title}: {_tensors(len(chosen))}, {output.large(elements)} elements, RMS "
            f"{_rms(chosen):.4g}, largest {max(s.largest for s in chosen):.4g}, {bad} not finite"
            f"{where}"
        )
        rows = [
            (s.name, output.large(s.elements), _rms([s]), s.largest, s.nonfinite) for s in chosen
        ]
        _print(to, line, ("tensor", "elements", "RMS", "largest", "not finite"), rows, options.top)


def print_distances(
    to: Console, found: Iterable[TensorDistance], options: argparse.Namespace
) -> None:
    """Print the distances of the moments, the largest relative one first.

    Args:
        to: The console.
        found: Of all tensors.
        options: The parsed options.
    """
    for title, chosen in _by_state(found, options.match):
        # NaN is the largest difference.
        chosen.sort(key=lambda d: -(math.inf if math.isnan(d.relative) else d.relative))
        tensors = sum(d.different > 0 for d in chosen)
        line = (
            f"{title}: {tensors} of {_tensors(len(chosen))} differ, "
            f"{_count(chosen, 'different')} of {_count(chosen, 'elements')} elements"
        )
        rows = [
            (d.name, output.large(d.elements), output.large(d.different), d.distance, d.relative)
            for d in chosen
            if d.different
        ]
        columns = ("tensor", "elements", "different", "distance", "relative")
        _print(to, line, columns, rows, options.top)


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count != 1)}"


def _count(found: Sequence[TensorDistance], name: str) -> str:
    return output.large(sum(getattr(d, name) for d in found))


def _by_state(found: Iterable[Any], match: str | None) -> Iterator[tuple[str, list[Any]]]:
    """Yield the tensors of each optimizer and state whose names match."""
    from ..base.patterns import compiled

    fits = compiled(match or "*")
    states: dict[str, list[Any]] = {}
    for one in found:
        if fits(one.name):
            chain = "" if one.optimizer is None else f"optimizer {one.optimizer} "
            states.setdefault(f"{chain}{one.state}", []).append(one)
    yield from states.items()


def _rms(found: Sequence[TensorStatistics]) -> float:
    """Compute the RMS of all elements; those that are not finite count as 0."""
    elements = sum(s.elements for s in found)
    return math.sqrt(sum(s.norm * s.norm for s in found) / elements) if elements else 0.0


def _print(
    to: Console, line: str, columns: Sequence[str], rows: list[Any], top: int | None
) -> None:
    shown = rows[: top or _TOP]
    output.print_text(to, line, 2, "bold")
    output.print_table(to, "", columns, shown)
    if len(rows) > len(shown):
        output.print_text(to, f"  {len(rows) - len(shown)} more: --top {len(rows)}")
        to.print()
