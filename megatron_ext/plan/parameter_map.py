"""Decide where the state of every parameter comes from. Pure, and the same on every rank.

By default a parameter's weights, master weights and moments come from the tensors of the same name
and shape. Everything else is an error until the policy's `ParameterMap` says what is meant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ..base.text import MAX_NAMED, first_of
from ..checkpoint.names import MASTER, OBJECT, WEIGHTS, Place, Style, index, name_of, object_name
from ..errors import CheckpointError, MegatronExtError, PlanError
from ..host.optimizers import FIRST
from ..policy.match import Match, MomentRule
from ..policy.parameter_map import ParameterMap
from .mapped import CopiedParameter, LeftParameter, Mapped, NewParameter, Wanted


def plan_map(
    asked: ParameterMap,
    wanted: Iterable[Wanted],
    stored: Mapping[str, tuple[int, ...] | None],
    style: Style,
    *,
    rules: Sequence[MomentRule] = (),
    strict: bool = True,
) -> Mapped:
    """Find the source of every tensor that the ranks request.

    Args:
        asked: What the user says, if the phase begins with this load.
        wanted: The requests of all ranks.
        stored: Checkpoint key -> shape; None for an object that is not a tensor.
        style: How the model names its parameters.
        rules: The policy's rules for moments.
        strict: Whether a pattern that matches nothing is an error.

    Raises:
        CheckpointError: Parameters are new, left over, or have another shape.
        PlanError: A pattern matches nothing, a source does not exist, or its shape differs.
        PolicyError: A parameter has two sources.
    """
    return _Planner(asked, stored, style, rules).plan(list(wanted), strict)


def _fits(patterns: Sequence[str], name: str) -> list[str]:
    return [p for p in patterns if Match(p).fits(name, 0, {})]


class _Planner:
    def __init__(
        self,
        asked: ParameterMap,
        stored: Mapping[str, tuple[int, ...] | None],
        style: Style,
        rules: Sequence[MomentRule],
    ) -> None:
        self.asked, self.style = asked, style
        self.resets = [r for r in rules if not (r.exp_avg.reads_old or r.exp_avg_sq.reads_old)]
        self.places = index(stored, style)
        self.kinds = {kind for kind, _ in self.places}
        self.sources: dict[tuple[str, str, tuple[int, ...]], Place | None] = {}
        self.used: set[tuple[str, str]] = set()
        #: Name -> kind -> number of elements of what is missing.
        self.lacking: dict[str, dict[str, int]] = {}
        self.changed: dict[str, str] = {}
        self.copied: dict[tuple[str, str], set[str]] = {}
        self.matched: set[str] = set()
        self.asked_kinds: set[str] = set()
        self.names: set[str] = set()

    def plan(self, wanted: list[Wanted], strict: bool) -> Mapped:
        self.asked_kinds = {one.kind for one in wanted}
        for one in sorted(wanted, key=lambda w: w.kind == OBJECT):  # objects follow their modules
            for lead in one.leads:
                self._object(one, lead) if one.kind == OBJECT else self._tensor(one, lead)
        new, refused = self._new()
        left, unknown = self._left()
        error = self._error(refused, unknown, strict)
        if error is not None:
            raise error
        used_keys = {self.places[one].key for one in self.used}
        partial = any(
            place.axes and place.key in used_keys and one not in self.used
            for one, place in self.places.items()
        )
        copied = sorted(
            CopiedParameter(to, source, _what(kinds)) for (to, source), kinds in self.copied.items()
        )
        return Mapped(self.sources, tuple(new), tuple(copied), tuple(left), partial)

    def _tensor(self, one: Wanted, lead: tuple[int, ...]) -> None:
        name = name_of(one.base, lead, self.style)
        self.names.add(name)
        what = "weights" if one.kind in (WEIGHTS, MASTER) else "moments"
        source, copy = self.asked.source_of(name).get(what, (name, ""))
        kind = self._kind_of(one.kind)
        if kind is None:
            return  # another optimizer wrote the checkpoint, which Megatron's load refuses
        place = self.places.get((kind, source + one.suffix))
        if copy:
            self.matched.add(copy)
        if copy and source != name:
            self._require_source(name, source, copy, kind, place, one)
            if what == "moments":
                self._require_kept(name, copy, len(one.shape))
            self.copied.setdefault((name, source), set()).add(what)
        elif place is not None and not _same_shape(one, place):
            self.changed[name] = f"{name} has shape {place.shape} there, {one.shape} in the model"
            place = None
        if place is None:
            lacking = self.lacking.setdefault(name, {})
            lacking[one.kind] = lacking.get(one.kind, 0) + math.prod(one.shape)
        else:
            self.used.add((kind, source + one.suffix))
            if (place.key, place.lead, place.axes) == (one.key, lead, one.axes):
                return
        self.sources[one.kind, one.key, lead] = place

    def _kind_of(self, kind: str) -> str | None:
        if kind in self.kinds:
            return kind
        # An fp32 model has no master weights without the distributed optimizer.
        return WEIGHTS if kind == MASTER and FIRST & self.kinds else None

    def _require_source(
        self, name: str, source: str, copy: str, kind: str, place: Place | None, one: Wanted
    ) -> None:
        if place is None and kind == MASTER:
            return  # a source that was frozen: the master weights are made from its weights
        if place is None:
            raise PlanError(
                f"parameters: copy {copy}: the checkpoint has no {kind} of {source}, which {name} "
                "is to be copied from. Name a parameter that `python -m megatron_ext inspect` "
                "lists; `state: weights` copies no moments"
            )
        if place.shape != one.shape:
            raise PlanError(
                f"parameters: copy {copy}: {source} has shape {place.shape} in the checkpoint, "
                f"{name} {one.shape} in the model; expected the same shape"
            )

    def _require_kept(self, name: str, copy: str, ndim: int) -> None:
        """Refuse a copy of moments that a rule overwrites as a whole."""
        for rule in self.resets:
            match = rule.match
            if match.rows is None and not match.group and match.fits(name, ndim, {}):
                raise PlanError(
                    f"parameters: copy {copy}: the moments of {name} are copied, and the rule "
                    f"{rule} overwrites both of them; expected one of the two. Copy the weights "
                    "alone (state: weights), or leave the rule out"
                )

    def _object(self, one: Wanted, lead: tuple[int, ...]) -> None:
        name = object_name(one.base, lead, one.axes, self.style)
        source, _ = self.asked.source_of(name).get("weights", (name, ""))
        place = self.places.get((OBJECT, source))
        module = name.rpartition(".")[0] + "."
        if place is None and not any(n.startswith(module) for n in self.lacking):
            return  # Megatron decides what a missing object means
        if place is None or (place.lead, place.axes, place.key) != (lead, one.axes, one.key):
            self.sources[one.kind, one.key, lead] = place

    def _new(self) -> tuple[list[NewParameter], list[str]]:
        """Split what is missing into what may be new and what may not."""
        new, refused = [], []
        for name, kinds in sorted(self.lacking.items()):
            fits = _fits(self.asked.new, name)
            self.matched.update(fits)
            copied = {w for (to, _), whats in self.copied.items() if to == name for w in whats}
            # The user has asked for a copy of the weights alone, or the source has no masters.
            implied = bool(copied) and WEIGHTS not in kinds
            if fits or implied:
                moments = bool(set(kinds) - {WEIGHTS, MASTER})
                new.append(NewParameter(name, max(kinds.values()), WEIGHTS in kinds, moments))
            else:
                refused.append(self.changed.get(name) or _lack(name, kinds))
        return new, refused

    def _left(self) -> tuple[list[LeftParameter], list[str]]:
        """Split the stored moments that are not used into those that may be left and others."""
        moments = sorted(self.kinds - {WEIGHTS, MASTER, OBJECT})
        left, unknown = [], []
        if not self.asked_kinds & set(moments):
            return [], []  # state that is stored by bucket, or another optimizer's
        replaced = {to for to, _ in self.copied} | set(self.changed)
        for kind, name in sorted(self.places):
            if kind not in moments[:1] or (kind, name) in self.used:
                continue
            elements = math.prod(self.places[kind, name].shape)
            fits = _fits(self.asked.drop, name)
            self.matched.update(fits)
            if name in replaced:
                left.append(LeftParameter(name, elements, "replaced"))
            elif (WEIGHTS, name) in self.used or WEIGHTS not in self.asked_kinds:
                left.append(LeftParameter(name, elements, "frozen"))
            elif fits:
                left.append(LeftParameter(name, elements, "dropped"))
            else:
                unknown.append(name)
        return left, unknown

    def _error(
        self, refused: list[str], unknown: list[str], strict: bool
    ) -> MegatronExtError | None:
        asked = self.asked
        patterns = (*asked.new, *asked.drop, *map(str, asked.copies))
        useless = [p for p in patterns if p not in self.matched]
        if useless and strict:
            return PlanError(_useless(useless, asked, sorted(self.names)))
        if not refused and not unknown:
            return None
        lines = [f"  in the model: {line}" for line in _some(refused)]
        lines += [f"  in the checkpoint only: {line}" for line in _some(unknown)]
        ways = []
        if refused:
            ways.append(
                "--selective-new-parameters PATTERN ... for those of the model (weights that the "
                "checkpoint lacks stay as initialised, moments start at 0)"
            )
        if unknown:
            ways.append(
                "--selective-drop-parameters PATTERN ... for those of the checkpoint (their state "
                "is left behind)"
            )
        return CheckpointError(
            "the checkpoint and the model do not have the same parameters:\n"
            + "\n".join(lines)
            + f"\nIf this is meant, pass {', and '.join(ways)}; or copy parameters from others "
            "with --selective-copy-parameters TO FROM. Otherwise resume with the model that the "
            "checkpoint was saved with"
        )


def _same_shape(one: Wanted, place: Place) -> bool:
    if one.shape == place.shape:
        return True
    same_rank = len(one.shape) == len(place.shape)
    return one.resizable and same_rank and one.shape[1:] == place.shape[1:]


def _what(kinds: set[str]) -> str:
    return "all" if len(kinds) > 1 else next(iter(kinds))


def _lack(name: str, kinds: Mapping[str, int]) -> str:
    return f"{name} ({'weights and moments' if WEIGHTS in kinds else 'moments only'} are missing)"


def _some(names: Sequence[str]) -> list[str]:
    more = [f"and {len(names) - MAX_NAMED} more"] if len(names) > MAX_NAMED else []
    return [*names[:MAX_NAMED], *more]


def _useless(patterns: Sequence[str], asked: ParameterMap, names: Sequence[str]) -> str:
    of = {
        **{
            p: f"--selective-new-parameters {p}: the checkpoint lacks nothing of" for p in asked.new
        },
        **{p: f"--selective-drop-parameters {p}: the model has" for p in asked.drop},
    }
    first = patterns[0]
    what = of.get(first, f"parameters: copy {first}: it applies to none of")
    return (
        f"{what} the parameters that it matches, or it matches none; expected at least one. The "
        f"model's parameters are {first_of(names)}. Correct the pattern or leave it out"
    )
