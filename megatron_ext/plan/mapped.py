"""What a load has to be told about parameters that differ from the checkpoint's. Plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..base.text import first_of
from ..checkpoint.names import Place
from ..policy.match import Match
from ..rules.elementwise import KEEP
from .cautions import betas_of, fresh_update
from .decisions import ResumePlan


@dataclass(frozen=True)
class Wanted:
    """The tensor of a parameter that some rank requests, with all its layers and experts.

    Args:
        kind: As from `megatron_ext.checkpoint.names.kind_and_key`, or `OBJECT`.
        key: The checkpoint key.
        base: The model's key of the parameter, whose parts may have keys with a suffix.
        suffix: The rest of the model's key.
        axes: The lengths of the leading axes.
        shape: The unsharded shape of one parameter.
        resizable: Whether its number of rows may differ from the stored one.
        leads: The positions along the leading axes.
    """

    kind: str
    key: str
    base: str
    suffix: str
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    resizable: bool
    leads: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, order=True)
class NewParameter:
    """A parameter of which the checkpoint lacks something.

    Args:
        name: Global name.
        elements: Its number of elements.
        weights: Whether its weights are as initialised; else they are loaded.
        moments: Whether its moments are 0; else they are loaded.
    """

    name: str
    elements: int
    weights: bool
    moments: bool


@dataclass(frozen=True, order=True)
class CopiedParameter:
    """A parameter that takes its state from another one of the checkpoint.

    Args:
        name: Global name.
        source: The other one's name.
        state: ``all``, ``weights`` or ``moments``.
    """

    name: str
    source: str
    state: str


@dataclass(frozen=True, order=True)
class LeftParameter:
    """A parameter whose stored moments are not used.

    Args:
        name: Global name in the checkpoint.
        elements: Its number of elements.
        why: ``frozen``, ``replaced`` by a copy, or ``dropped``.
    """

    name: str
    elements: int
    why: str


@dataclass(frozen=True)
class Mapped:
    """The sources of all requested tensors.

    Args:
        sources: Kind, checkpoint key and position of each tensor that is not requested from where
            it is stored -> that place; None if it is new.
        new: The parameters that lack something in the checkpoint.
        copied: The parameters that take their state from others.
        left: The parameters of the checkpoint whose moments are not used.
        partial: Whether some layers or experts of a stored tensor are not requested.
    """

    sources: Mapping[tuple[str, str, tuple[int, ...]], Place | None] = field(default_factory=dict)
    new: tuple[NewParameter, ...] = ()
    copied: tuple[CopiedParameter, ...] = ()
    left: tuple[LeftParameter, ...] = ()
    partial: bool = False

    @property
    def new_to_optimizer(self) -> tuple[str, ...]:
        """The names of the parameters whose moments start at 0."""
        return tuple(one.name for one in self.new if one.moments)

    @property
    def changes_request(self) -> bool:
        """Whether a rank may have to request something else than Megatron does."""
        return bool(self.sources) or self.partial


def new_warnings(plan: ResumePlan, mapped: Mapped | None) -> Iterator[str]:
    """Warn about new parameters whose moments no rule fills, with the size of the effect.

    Args:
        plan: The plan of the optimizer.
        mapped: The sources of all parameters.
    """
    rules = [r.match for r in plan.policy.rules if r.exp_avg_sq != KEEP]
    bare = [
        name
        for name in (() if mapped is None else mapped.new_to_optimizer)
        if not any(Match(rule.name).fits(name, 0, {}) for rule in rules)
    ]
    if not bare or not plan.step or plan.optimizer.moment("exp_avg_sq") is None:
        return
    for betas in betas_of(plan):
        yield (
            f"the moments of {len(bare)} new parameters ({first_of(bare)}) are 0 while step stays "
            f"at {plan.step}: they get no bias correction, and at betas {betas[0]:g}, {betas[1]:g} "
            f"their first update is {fresh_update(betas, plan.step):.2f} lr. The remedy is "
            "--selective-rule PATTERN reset 'fill mean-of OTHERS', with the pattern of alike "
            "parameters, or 'fill X'"
        )
