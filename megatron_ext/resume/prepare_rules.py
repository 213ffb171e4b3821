"""Resolve a plan's moment rules against this rank's shards, and exchange them with the ranks.

Ranks that hold different parameters compute the same statistics together. They first exchange which
statistics their parameters need.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..base import ranks
from ..base.text import MAX_NAMED
from ..errors import CheckpointError, PlanError
from ..host.optimizers import ADAM, OptimizerState, state_of_member
from ..plan.decisions import ResumePlan
from ..plan.matching import unmatched, used_group_rules, used_rules
from ..plan.mean_of import Offer, Parts, means_of, offer, sources_of
from ..plan.moments import plan_moments
from ..plan.parameters import ParameterPlan
from ..policy.policy import ResumePolicy
from ..rules.base import Statistic
from ..rules.elementwise import KEEP
from ..rules.form import Key
from .parameters import Shard, locate_parameters, shards_of

#: Number of names per rule that a rank sends to the others.
_NAMED_BY_RANK = 4


@dataclass(frozen=True)
class MomentWork:
    """The moment rules of one optimizer on this rank, resolved.

    Args:
        policy: The policy in force.
        shards: This rank's shards.
        plans: The rules of each parameter, by its name.
        used: Positions of the rules that match a parameter of the chain on this rank.
        used_groups: Positions of the group rules that match a param_group of the chain.
        optimizer: The state of the optimizer.
        wanted: The statistics that some rank needs, the same list on every rank.
        shapes: The unsharded shapes of their parameters.
        offers: What this rank's parameters give to each mean of several parameters that a rule
            names.
        sources: The means of single parameters for each such mean in `wanted`, the same on every
            rank.
        unread: For each moment, the parameters on this rank whose moment was not read.
        warnings: A warning about rules that match nothing on any rank.
        examples: For each rule, some parameters that it matches on any rank.
    """

    policy: ResumePolicy
    shards: tuple[Shard, ...]
    plans: Mapping[str, ParameterPlan]
    used: frozenset[int]
    used_groups: frozenset[int] = frozenset()
    optimizer: OptimizerState = ADAM
    wanted: tuple[Statistic, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    offers: Mapping[Statistic, Offer] = field(default_factory=dict)
    sources: Mapping[Statistic, Parts] = field(default_factory=dict)
    unread: Mapping[Key, frozenset[str]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    examples: tuple[tuple[str, ...], ...] = ()


def prepare(
    optimizer: Any,
    model_chunks: Sequence[Any],
    plan: ResumePlan,
    saved_groups: Sequence[Mapping[str, Any]],
    chain: Sequence[Any] = (),
    unread: Mapping[Key, frozenset[str]] | None = None,
    new: Collection[str] = (),
) -> MomentWork | None:
    """Resolve a plan's rules against this rank's shards. Changes nothing; not collective.

    Args:
        optimizer: A Megatron optimizer.
        model_chunks: The model it was built for.
        plan: The optimizer's plan.
        saved_groups: The checkpoint's param_groups.
        chain: All optimizers that the policy applies to. A rule has to match in one of them.
        unread: For each moment, the parameters on this rank whose moment was not read.
        new: The names of parameters that are new to the optimizers.

    Returns:
        None if the policy has no rules and keeps all moments.

    Raises:
        PlanError: A rule cannot be applied.
        CheckpointError: A moment was not read, and the plan does not overwrite it.
        HostError: The model's sharded_state_dict does not place a parameter.
    """
    policy, unread = plan.policy, unread or {}
    if not policy.overwrites_moments:
        _require_read(unread, None)
    if not (policy.decides_moments or policy.groups):
        return None
    chain = [o for o in chain or [optimizer] if o.optimizer is not None]
    used_groups = frozenset(
        used_group_rules(policy, [g for one in chain for g in one.optimizer.param_groups])
    )
    if not policy.decides_moments:
        return MomentWork(policy, (), {}, frozenset(), used_groups)
    members = chain if policy.rules else [o for o in chain if o is optimizer]
    of_members = _shards_by_optimizer(members, model_chunks)
    used = frozenset().union(
        *(
            used_rules(policy, (s.parameter for s in of_members[id(o)]), o.optimizer.param_groups)
            for o in members
        )
    )
    elsewhere = [
        shard.parameter.name for o in members if o is not optimizer for shard in of_members[id(o)]
    ]
    offers = {one: offer(one, (), new, elsewhere) for one in means_of(policy)}
    state = state_of_member(optimizer)
    if optimizer.optimizer is None:
        return MomentWork(policy, (), {}, used, used_groups, state, offers=offers)
    shards = of_members[id(optimizer)]
    parameters = {s.parameter.name: s.parameter for s in shards}
    groups = optimizer.optimizer.param_groups
    plans = {
        p.parameter.name: p
        for p in plan_moments(plan, list(parameters.values()), saved_groups, groups)
    }
    _require_read(unread, plans)
    offers = {one: offer(one, plans.values(), new, elsewhere) for one in offers}
    return MomentWork(policy, shards, plans, used, used_groups, state, offers=offers, unread=unread)


def _require_read(
    unread: Mapping[Key, frozenset[str]], plans: Mapping[str, ParameterPlan] | None
) -> None:
    """Raise unless the plan overwrites every moment that was not read.

    Args:
        unread: For each moment, the parameters on this rank whose moment was not read.
        plans: The rules of each parameter that has elements on this rank, by its name. A rank may
            have none. None if the policy overwrites nothing.
    """
    for key, names in unread.items():
        for name in names if plans is None else names & plans.keys():
            done = [KEEP] if plans is None else [getattr(rows, key) for rows in plans[name].rows]
            if any(rule.reads_old for rule in done):
                raise CheckpointError(
                    f"{key} of {name} was not read from the checkpoint, because the plan "
                    f"overwrote it; now the plan is {done}; expected the same plan before and "
                    "after reading. The checkpoint was replaced while it was being read, or its "
                    "param_groups differ from its first ones; start again"
                )


def exchange_with_ranks(work: MomentWork) -> MomentWork:
    """Exchange with all ranks which rules matched and which statistics are needed; collective.

    This is one gather of plain values. It is skipped if the policy has no rules and the preset
    needs no statistic.

    Raises:
        PlanError: The policy is strict, and a rule matches nothing on any rank; or the parameters
            of a ``mean-of`` are not what it expects. On every rank.
    """
    policy, effect = work.policy, work.policy.preset.effect
    selects = effect.exp_avg.statistics or effect.exp_avg_sq.statistics
    if not policy.rules and not policy.groups and not selects:
        return work
    needed = {s: p.parameter.shape for p in work.plans.values() for s in p.statistics}
    examples = sorted(work.plans)
    ends = [*examples[:1], *examples[-1:]]
    mine = (needed, work.used, work.used_groups, ends, _matched(work), work.offers)
    of_ranks, used, used_groups, names, matched, offers = zip(*ranks.gather(mine), strict=True)
    some_names = sorted({name for some in names for name in some})
    idle = unmatched(policy, frozenset().union(*used), frozenset().union(*used_groups), some_names)
    if idle and policy.strict:
        raise PlanError(f"{idle}. Correct the rule, or pass --no-selective-strict")
    wanted = sorted({s for needed in of_ranks for s in needed})
    return replace(
        work,
        wanted=tuple(wanted),
        sources={
            s: sources_of(s, [of_rank[s] for of_rank in offers], some_names)
            for s in wanted
            if s.kind == "mean-of"
        },
        shapes={s.parameter: shape for needed in of_ranks for s, shape in needed.items()},
        warnings=(idle,) if idle else (),
        examples=tuple(
            tuple(sorted({name for some in of_rule for name in some})[:MAX_NAMED])
            for of_rule in zip(*matched, strict=True)
        ),
    )


def _matched(work: MomentWork) -> list[list[str]]:
    """List, for each rule, the first parameters on this rank that it matches."""
    return [
        [
            name
            for name, plan in sorted(work.plans.items())
            if any(rows.rule == number for rows in plan.rows)
        ][:_NAMED_BY_RANK]
        for number in range(len(work.policy.rules))
    ]


def _shards_by_optimizer(
    optimizers: Sequence[Any], model_chunks: Sequence[Any]
) -> dict[int, tuple[Shard, ...]]:
    """Map the id of each optimizer to its shards on this rank, locating the parameters once."""
    where = locate_parameters(model_chunks) if optimizers else {}
    return {id(one): tuple(shards_of(one, model_chunks, where)) for one in optimizers}
