"""Count moments that Adam cannot use, then refuse, reset or keep them.

These are NaN and infinite elements, and negative ones of exp_avg_sq, whose square root Adam takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..base import ranks
from ..base.text import first_of
from ..checkpoint.state import MOMENT_KEYS
from ..errors import CheckpointError, PlanError
from ..plan.parameters import ParameterPlan
from ..policy.policy import ResumePolicy
from ..report.model import MomentReport
from ..rules.elementwise import KEEP
from .moments import Survey, survey
from .parameters import Shard, held_parameters, names_of
from .prepare_rules import MomentWork
from .scaled import is_scaled, store, values
from .steps import is_adam

_REMEDY = (
    "pass --selective-nonfinite reset to set these elements of both moments to 0, or keep to leave "
    "them as they are"
)
_DONE = {"reset": "reset to 0", "keep": "kept"}


@dataclass(frozen=True)
class Unusable:
    """The elements of a parameter's moments that Adam cannot use, on this rank.

    Args:
        exp_avg: Number of NaN and infinite elements of exp_avg.
        exp_avg_sq: Number of NaN and infinite elements of exp_avg_sq.
        negative: Number of negative finite elements of exp_avg_sq.
    """

    exp_avg: int = 0
    exp_avg_sq: int = 0
    negative: int = 0

    @property
    def total(self) -> int:
        """The number of all of them."""
        return self.exp_avg + self.exp_avg_sq + self.negative

    def __str__(self) -> str:
        """Write the numbers for a message."""
        numbers = {
            f"{self.exp_avg} of exp_avg not finite": self.exp_avg,
            f"{self.exp_avg_sq} of exp_avg_sq not finite": self.exp_avg_sq,
            f"{self.negative} of exp_avg_sq negative": self.negative,
        }
        return ", ".join(text for text, n in numbers.items() if n)


def unusable_of(inner: Any, key: torch.Tensor) -> Unusable:
    """Count the elements of one parameter's moments that Adam cannot use, by kind.

    Args:
        inner: The torch optimizer that holds the state.
        key: A key of its state that has both moments.
    """
    m, v = (values(inner, key, name) for name in MOMENT_KEYS)
    finite = v.isfinite()
    return Unusable(
        exp_avg=int((~m.isfinite()).sum()),
        exp_avg_sq=int((~finite).sum()),
        negative=int((finite & (v < 0.0)).sum()),
    )


def count_nonfinite(optimizer: Any) -> tuple[int, tuple[float, float] | None]:
    """Count the elements of this rank's moments that Adam cannot use, in one read-only pass.

    Returns:
        Their number; Euclidean norms of exp_avg and exp_avg_sq, or None if the optimizer has no
        moments that can be reached.
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
                f"the checkpoint holds moments that Adam cannot use: {listing}. Load an earlier "
                f"checkpoint, or {_REMEDY}"
            )
    ranks.stop_together("counting moments that Adam cannot use", error)
    if choice == "reset":
        wanted = {id(key) for key in keys}
        for held in held_parameters(optimizer):
            if id(held.key) in wanted:
                _reset(optimizer.optimizer, held.key)
    return f"not finite, or negative in exp_avg_sq, in the checkpoint: {_DONE.get(choice, choice)}"


def handle_made(work: MomentWork, moments: MomentReport) -> tuple[MomentReport, tuple[str, ...]]:
    """Refuse, reset or keep moments that Adam cannot use after the rules; collective.

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
    text = f"{found} elements of the moments not finite, or negative in exp_avg_sq, after the rules"
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
        f"after the moment rules there are moments that Adam cannot use: {first_of(bad)}. Take "
        f"smaller numbers, or {_REMEDY}"
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
    squares = [0.0, 0.0]
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
            for key, square in zip(MOMENT_KEYS, of_all, strict=True)
        },
        nonfinite=dict.fromkeys(MOMENT_KEYS, 0),
        norms_on_this_rank=(squares[0] ** 0.5, squares[1] ** 0.5),
    )


def _survey(optimizer: Any) -> tuple[list[torch.Tensor], Survey] | None:
    """Survey all moments of an optimizer; returns the keys of its state too."""
    inner = optimizer.optimizer
    if inner is None or not is_adam(inner):
        return None
    keys = [k for k, state in inner.state.items() if all(m in state for m in MOMENT_KEYS)]
    return keys, survey(inner, keys)


def _keys_with_unusable(optimizer: Any) -> list[torch.Tensor]:
    """List the keys of the state whose moments have elements that Adam cannot use."""
    found = _survey(optimizer)
    if found is None:
        return []
    return [key for key, n in zip(found[0], found[1].nonfinite, strict=True) if n]


@torch.no_grad()
def _reset(inner: Any, key: torch.Tensor) -> None:
    """Set both moments to 0 where Adam cannot use one of them."""
    moments = {name: values(inner, key, name) for name in MOMENT_KEYS}
    m, v = moments.values()
    wrong = ~(m.isfinite() & v.isfinite() & (v >= 0.0))
    for name, found in moments.items():
        found.masked_fill_(wrong, 0.0)
        if is_scaled(inner, name):
            store(inner, key, name, found)
