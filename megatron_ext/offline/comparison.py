"""Compare the summaries of two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..base.values import same
from ..plan.groups import match_groups
from .inspection import Inspection, OptimizerState, StateTensors

Section = Literal[
    "checkpoint", "layout", "optimizers", "groups", "scheduler", "counters", "moments", "args"
]


@dataclass(frozen=True)
class Difference:
    """One difference.

    Args:
        section: ``args``, ``groups``, ``scheduler`` and so on.
        name: Name of the value that differs.
        a: Its value in the first checkpoint; None if it is missing there.
        b: Its value in the second checkpoint; None if it is missing there.
        only: ``a`` or ``b`` if only that checkpoint has it.
    """

    section: Section
    name: str
    a: Any
    b: Any
    only: Literal["a", "b"] | None = None


def compare(a: Inspection, b: Inspection) -> tuple[Difference, ...]:
    """Compare two checkpoints, without the elements of the moments.

    Args:
        a: The first checkpoint.
        b: The second checkpoint.

    Returns:
        The differences, the most important first.
    """
    changes = [*_compare_scalars(a, b)]
    changes += _compare_mappings("layout", a.layout, b.layout)
    changes += _compare_optimizers(a.optimizers, b.optimizers)
    changes += _compare_mappings("scheduler", a.scheduler or {}, b.scheduler or {})
    changes += _compare_mappings("counters", a.counters, b.counters)
    changes += _compare_mappings("moments", _described(a.moments), _described(b.moments))
    changes += _compare_mappings("args", a.args, b.args)
    return tuple(changes)


def _described(moments: Sequence[StateTensors]) -> dict[str, str]:
    described: dict[str, str] = {}
    for m in moments:
        chain = "" if m.optimizer is None else f"optimizer {m.optimizer} "
        text = f"{m.tensors} tensors by {m.by}, {m.elements} elements"
        described[f"{chain}{m.state} {m.dtype}"] = text
    return described


def _compare_scalars(a: Inspection, b: Inspection) -> Iterator[Difference]:
    for name in ("iteration", "release", "format", "megatron_core", "sharding_type"):
        one, other = getattr(a, name), getattr(b, name)
        if one != other:
            yield Difference("checkpoint", name, one, other)


def _compare_mappings(
    section: Section, a: Mapping[Any, Any], b: Mapping[Any, Any], prefix: str = ""
) -> Iterator[Difference]:
    for key in [*a, *(k for k in b if k not in a)]:
        name = f"{prefix}{key}"
        if key not in b:
            yield Difference(section, name, a[key], None, "a")
        elif key not in a:
            yield Difference(section, name, None, b[key], "b")
        elif not same(a[key], b[key]):
            yield Difference(section, name, a[key], b[key])


def _compare_optimizers(
    a: Sequence[OptimizerState], b: Sequence[OptimizerState]
) -> Iterator[Difference]:
    for number in range(max(len(a), len(b))):
        where = f"optimizer {number}" if max(len(a), len(b)) > 1 else "optimizer"
        if number >= len(b):
            yield Difference("optimizers", where, f"{len(a[number].groups)} groups", None, "a")
        elif number >= len(a):
            yield Difference("optimizers", where, None, f"{len(b[number].groups)} groups", "b")
        else:
            yield from _compare_optimizer(where, a[number], b[number])


def _compare_optimizer(where: str, a: OptimizerState, b: OptimizerState) -> Iterator[Difference]:
    if a.step != b.step:
        yield Difference("optimizers", f"{where} step", a.step, b.step)
    marks = [None if mark is None else str(mark) for mark in (a.mark, b.mark)]
    # `Mark` leaves its words out of comparisons, so the texts are compared.
    if marks[0] != marks[1]:
        yield Difference("optimizers", f"{where} phase", marks[0], marks[1])
    scalers = a.grad_scaler or {}, b.grad_scaler or {}
    yield from _compare_mappings("optimizers", *scalers, prefix=f"{where} grad_scaler ")
    pairs = pair_groups(a.groups, b.groups)
    for i, j in pairs:
        if i is not None and j is not None:
            name = f"{where} group {i}" + ("" if i == j else f" -> {j}")
            yield from _compare_mappings("groups", a.groups[i], b.groups[j], prefix=f"{name} ")
        elif i is not None:
            yield Difference("groups", f"{where} group {i}", dict(a.groups[i]), None, "a")
        elif j is not None:
            yield Difference("groups", f"{where} group {j}", None, dict(b.groups[j]), "b")


def pair_groups(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]
) -> list[tuple[int | None, int | None]]:
    """Pair param_groups as a resume does; ambiguous ones by structural keys and position.

    Args:
        a: Groups of one checkpoint.
        b: Groups of the other.

    Returns:
        Pairs of indices; None for a missing counterpart.
    """
    found = match_groups(a, b, [0] * len(a), [0] * len(b))
    pair = {i: j for j, i in enumerate(found) if i is not None}
    for i in (i for i in range(len(a)) if i not in pair):
        free = [j for j in range(len(b)) if j not in pair.values()]
        twins = [j for j in free if match_groups([a[i]], [b[j]], [0], [0]) == [0]]
        if twins:
            pair[i] = twins[0]
    only_b = [(None, j) for j in range(len(b)) if j not in pair.values()]
    return [*((i, pair.get(i)) for i in range(len(a))), *only_b]
