"""Count moments that an optimizer cannot use, then refuse, reset or keep them.

These are NaN and infinite elements, and negative ones of a second moment, whose square root is
taken (exp_avg_sq of Adam).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..base import ranks
from ..base.text import first_of
from ..errors import CheckpointError, PlanError
from ..host.optimizers import SECOND, state_of
from ..plan.parameters import ParameterPlan
from ..policy.policy import ResumePolicy
from ..report.model import MomentReport
from ..rules.elementwise import KEEP
from .parameters import Shard, held_parameters, names_of
from .prepare_rules import MomentWork
from .scaled import is_scaled, store, values
from .survey import Survey, survey

_REMEDY = (
    "pass --selective-nonfinite reset to set these elements of both moments to 0, or keep to leave "
    "them as they are"
)
_DONE = {"reset": "reset to 0", "keep": "kept"}


@dataclass(frozen=True)
class Unusable:
    """The elements of a parameter's moments that the optimizer cannot use, on this rank.

    Args:
        nonfinite: Tensor -> number of NaN and infinite elements.
        negative: Tensor of a second moment -> number of negative finite elements.
    """

    nonfinite: Mapping[str, int] = field(default_factory=dict)
    negative: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The number of all of them."""
        return sum(self.nonfinite.values()) + sum(self.negative.values())

    def __str__(self) -> str:
        """Write the numbers for a message."""
        kinds = {"not finite": self.nonfinite, "negative": self.negative}
        return ", ".join(
            f"{n} of {tensor} {what}"
            for what, numbers in kinds.items()
            for tensor, n in numbers.items()
            if n
        )


def unusable_of(inner: Any, key: torch.Tensor) -> Unusable:
    """Count the elements of one parameter's moments that the optimizer cannot use, by kind.

    Args:
        inner: The torch optimizer that holds the state.
        key: A key of its state that has all moments.
    """
    held = {name: values(inner, key, name) for name in state_of(inner).tensors}
    return Unusable(
        nonfinite={name: int((~x.isfinite()).sum()) for name, x in held.items()},
        negative={
            name: int((x.isfinite() & (x < 0.0)).sum())
            for name, x in held.items()
            if name in SECOND
        },
    )


def count_nonfinite(optimizer: Any) -> tuple[int, tuple[float, ...] | None]:
    """Count the elements of this rank's moments that it cannot use, in one read-only pass.

    Returns:
        Their number; the Euclidean norm of each moment, or None if the optimizer has none.
    """
    found = _survey(optimizer)
    return (0, None) if found is None else (sum(found[1].nonfinite), found[1].norms)


def handle_nonfinite(
    optimizer: Any,
    model_chunks: Sequence[Any],
    choice: str,
    bad: Mapping[str, Unusable] | None = None,
) -> str:
    """Refuse, reset or keep loaded moments that Adam cannot use; collective, if some rank has any.

    Args:
        optimizer: A Megatron optimizer with state.
        model_chunks: Its model, for the names of its parameters.
        choice: ``error``, ``reset`` or ``keep`` (`ResumePolicy.nonfinite`).
        bad: Parameters on this rank -> the elements, if they are known and the choice is ``error``.

    Returns:
        A phrase for the report.

    Raises:
        CheckpointError: The choice is ``error``; on every rank with such an element.
        AgreementError: The choice is ``error``; on the other ranks, with the messages.
    """
    keys = _keys_with_unusable(optimizer) if bad is None else []
    error = None
    if choice == "error":
        if bad is None:
            names = names_of(optimizer, model_chunks) if keys else {}
            bad = {names.get(id(k), "unnamed"): unusable_of(optimizer.optimizer, k) for k in keys}
        if bad:
            listing = first_of([f"{name}: {found}" for name, found in bad.items()])
            error = CheckpointError(
                f"the checkpoint holds moments that {_name(optimizer)} cannot use: {listing}. Load "
                f"an earlier checkpoint, or {_REMEDY}"
            )
    ranks.stop_together(f"counting moments that {_name(optimizer)} cannot use", error)
    if choice == "reset":
        wanted = {id(key) for key in keys}
        for held in held_parameters(optimizer):
            if id(held.key) in wanted:
                _reset(optimizer.optimizer, held.key)
    done = _DONE.get(choice, choice)
    return f"not finite{_negative(optimizer.optimizer)}, in the checkpoint: {done}"


def _name(optimizer: Any) -> str:
    """Name the optimizer; every Adam is called so, wherever it keeps its step."""
    state = state_of(optimizer.optimizer)
    return "Adam" if state.adam else state.name


def _negative(inner: Any) -> str:
    seconds = [tensor for tensor in state_of(inner).tensors if tensor in SECOND]
    return f", or negative in {seconds[0]}" if seconds else ""


def handle_made(work: MomentWork, moments: MomentReport) -> tuple[MomentReport, tuple[str, ...]]:
    """Refuse, reset or keep moments that cannot be used after the rules; collective.

    The report's sums tell every rank whether there are any. Only then the ranks exchange more.

    Args:
        work: The work whose rules have been applied.
        moments: The report about them.

    Returns:
        The report, with the values after a reset; notes for the report.

    Raises:
        PlanError: The policy's choice is ``error``; on every rank with such an element.
        AgreementError: The choice is ``error``; on the other ranks, with the messages.
    """
    found = sum(moments.nonfinite.values())
    if not found:
        return moments, ()
    choice = work.policy.nonfinite
    shards = [shard for shard in work.shards if shard.has_moments]
    if choice == "error":
        ranks.stop_together("applying the moment rules", _refusal(work, shards))
    if choice == "reset":
        for shard in shards:
            _reset(shard.inner, shard.key)
        moments = _measured_again(moments, shards)
    negative = ", or negative in exp_avg_sq" if work.optimizer.moment("exp_avg_sq") else ""
    text = f"{found} elements of the moments not finite{negative}, after the rules"
    return moments, (f"{text}: {_DONE.get(choice, choice)}",)


def _refusal(work: MomentWork, shards: Sequence[Shard]) -> PlanError | None:
    """Make the error that names this rank's parameters and their rules; None if all are usable."""
    counted = [(shard, unusable_of(shard.inner, shard.key)) for shard in shards]
    bad = [
        f"{shard.parameter.name}: {found} ({_rules_of(work.policy, work.plans, shard)})"
        for shard, found in counted
        if found.total
    ]
    if not bad:
        return None
    return PlanError(
        "after the moment rules there are moments that "
        f"{'Adam' if work.optimizer.adam else work.optimizer.name} cannot use: {first_of(bad)}. "
        f"Take smaller numbers, or {_REMEDY}"
    )


def _rules_of(policy: ResumePolicy, plans: Mapping[str, ParameterPlan], shard: Shard) -> str:
    """Name what changes a parameter's moments."""
    changing = (
        rows.rule
        for rows in plans[shard.parameter.name].rows
        if (rows.exp_avg, rows.exp_avg_sq) != (KEEP, KEEP)
    )
    return "; ".join(
        f"preset {policy.preset}" if n is None else f"rule {policy.rules[n]}"
        for n in dict.fromkeys(changing)
    )


def _measured_again(moments: MomentReport, shards: Sequence[Shard]) -> MomentReport:
    """Return the report with the norms of the moments as they are now; collective."""
    names = tuple(moments.rms)
    squares = [0.0] * len(names)
    for shard in shards:
        for which, norm in enumerate(survey(shard.inner, [shard.key]).norms):
            squares[which] += norm**2
    held = sum(shard.end - shard.begin for shard in shards)
    sums = torch.tensor([*squares, held], dtype=torch.float64, device=ranks.device())
    ranks.sum_over_ranks(sums)
    *of_all, elements = sums.tolist()
    return replace(
        moments,
        rms={
            key: (moments.rms[key][0], (square / elements) ** 0.5 if elements else 0.0)
            for key, square in zip(names, of_all, strict=True)
        },
        nonfinite=dict.fromkeys(names, 0),
        norms_on_this_rank=tuple(square**0.5 for square in squares),
    )


def _survey(optimizer: Any) -> tuple[list[torch.Tensor], Survey] | None:
    """Survey all moments of an optimizer; returns the keys of its state too."""
    inner = optimizer.optimizer
    names = state_of(inner).tensors
    if inner is None or not names:
        return None
    keys = [k for k, state in inner.state.items() if all(m in state for m in names)]
    return keys, survey(inner, keys)


def _keys_with_unusable(optimizer: Any) -> list[torch.Tensor]:
    """List the keys of the state whose moments have elements that cannot be used."""
    found = _survey(optimizer)
    if found is None:
        return []
    return [key for key, n in zip(found[0], found[1].nonfinite, strict=True) if n]


@torch.no_grad()
def _reset(inner: Any, key: torch.Tensor) -> None:
    """Set all moments to 0 where one of them cannot be used."""
    moments = {name: values(inner, key, name) for name in state_of(inner).tensors}
    usable = [
        x.isfinite() & (x >= 0.0) if n in SECOND else x.isfinite() for n, x in moments.items()
    ]
    wrong = ~torch.stack(usable).all(0)
    for name, found in moments.items():
        found.masked_fill_(wrong, 0.0)
        if is_scaled(inner, name):
            store(inner, key, name, found)
