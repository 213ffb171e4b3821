"""What the user asks of a resume: `ResumePolicy`, validated on its own.

A policy says for every hyperparameter whether its value comes from the current arguments (the
default) or from the checkpoint, and for every element of the Adam moments what is done to it (the
default: nothing). Master weights always come from the checkpoint.

From flags: `megatron_ext.arguments`. From and to YAML: `megatron_ext.policy_file`.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .errors import PolicyError
from .presets import KEEP_ALL, Preset, Step
from .rules import KEEP, Rule, check_moment, write

#: Keys that `megatron.core.optimizer_param_scheduler.OptimizerParamScheduler` writes or reads in
#: a param_group. ``--use-checkpoint-opt_param-scheduler`` takes exactly these from the checkpoint.
SCHEDULE_KEYS = ("lr", "max_lr", "min_lr", "weight_decay", "start_wd", "end_wd")

#: Attributes of the scheduler that hold a kept key, because the scheduler overwrites the group's
#: own value from them at every step (`OptimizerParamScheduler.step`).
SCHEDULER_ATTRIBUTES = {
    "max_lr": ("max_lr",),
    "min_lr": ("min_lr",),
    "start_wd": ("start_wd",),
    "end_wd": ("end_wd",),
    "weight_decay": ("start_wd", "end_wd", "wd_incr_steps", "wd_incr_style"),
}

#: Keys of a param_group that are no hyperparameters, and are never taken from the checkpoint.
_NOT_HYPERPARAMETERS = ("params", "step", "lr")

_NOT_A_CHOICE = {
    "params": "the parameters always are the current model's",
    "step": "step is state, not a hyperparameter: see --selective-step",
    "lr": (
        "the scheduler computes lr from max_lr and min_lr before every step: "
        "keep 'max_lr' and 'min_lr' instead"
    ),
}

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class GroupRule:
    """Exceptions for the param_groups with certain attributes.

    Args:
        match: Key of a param_group -> the value it has in the current group, for example
            ``{"is_expert_parallel": True}``.
        keep: Keys that come from the checkpoint in these groups.
        take: Keys that come from the arguments in these groups.

    Raises:
        PolicyError: Nothing to match, nothing decided, or a key that cannot be chosen.
    """

    match: tuple[tuple[str, Scalar], ...]
    keep: tuple[str, ...] = ()
    take: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Normalise, and refuse what can never be carried out."""
        object.__setattr__(self, "match", attributes(self.match, "group rule"))
        if not self.match:
            raise PolicyError("group rule: expected at least one attribute to match, found none")
        for name in ("keep", "take"):
            keys = _keys(getattr(self, name), f"group rule {self}", "key of a param_group")
            object.__setattr__(self, name, keys)
        both = sorted(set(self.keep) & set(self.take))
        if both:
            raise PolicyError(f"group rule {self}: {', '.join(both)} both kept and taken")
        if not self.keep and not self.take:
            raise PolicyError(f"group rule {self}: expected keys to keep or to take, found none")
        if "weight_decay" in (*self.keep, *self.take):
            raise PolicyError(
                f"group rule {self}: 'weight_decay' is no choice of a group: the scheduler "
                "computes it before every step from start_wd and end_wd and the group's wd_mult. "
                "Name it in --selective-keep-hyperparameters, for all groups"
            )

    def fits(self, group: Mapping[str, Any]) -> bool:
        """Whether a current param_group has all attributes."""
        return has_attributes(group, self.match)

    def __str__(self) -> str:
        """The attributes, as they are written in a flag."""
        return " ".join(f"{k}={_scalar_text(v)}" for k, v in self.match)


@dataclass(frozen=True)
class Match:
    """Which parameters, and which of their rows.

    Args:
        name: Glob (``*`` also matches dots) or, after ``re:``, a regular expression that has to
            match the whole name. A name is ``decoder.layers.<global index>. ...``, the same on
            every layout.
        rows: First row and one past the last, along dimension 0 of the unsharded parameter; None
            for an end that is open.
        ndim: Number of dimensions the parameter has, or None for any.
        group: Attributes of its param_group, as in `GroupRule`.

    Raises:
        PolicyError: A regular expression that does not compile, or rows that are no range.
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
            self._pattern()
        except re.error as e:
            raise PolicyError(
                f"match {self.name!r}: not a regular expression: {e}; without 're:' it is a glob"
            ) from None
        if self.rows is not None:
            object.__setattr__(self, "rows", _rows(self.rows, self.name))
        whole = isinstance(self.ndim, int) and not isinstance(self.ndim, bool) and self.ndim >= 0
        if self.ndim is not None and not whole:
            raise PolicyError(f"match {self.name!r}: ndim is {self.ndim!r}; expected 0, 1, 2 ...")

    def fits(self, name: str, ndim: int, group: Mapping[str, Any]) -> bool:
        """Whether a parameter is meant, whichever rows."""
        return (
            (self.ndim is None or self.ndim == ndim)
            and has_attributes(group, self.group)
            and self._pattern().fullmatch(name) is not None
        )

    def _pattern(self) -> re.Pattern[str]:
        return _compiled(self.name)

    @classmethod
    def parse(cls, text: str) -> Match:
        """Read ``NAME[A:B] ndim=N KEY=VALUE ...``; all but the name may be left out.

        Raises:
            PolicyError: It cannot be read; says which part.
        """
        name, *attributes = str(text).split() or [""]
        rows = None
        if found := re.fullmatch(r"(.*)\[(\d*):(\d*)\]", name):
            name, first, last = found.groups()
            rows = (int(first) if first else None, int(last) if last else None)
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
        return cls(name or "*", rows, int(ndims[0]) if ndims else None, group)

    def __str__(self) -> str:
        """As `parse` reads it."""
        rows = ""
        if self.rows is not None:
            rows = "[{}:{}]".format(*("" if r is None else r for r in self.rows))
        words = [self.name + rows]
        words += [f"ndim={self.ndim}"] if self.ndim is not None else []
        words += [f"{k}={_scalar_text(v)}" for k, v in self.group]
        return " ".join(words)


@dataclass(frozen=True)
class MomentRule:
    """What is done to the moments of some parameters.

    Args:
        match: Which.
        exp_avg: What is done to exp_avg.
        exp_avg_sq: What is done to exp_avg_sq.

    Raises:
        PolicyError: An operation that has no meaning for its moment.
    """

    match: Match
    exp_avg: Rule = KEEP
    exp_avg_sq: Rule = KEEP

    def __post_init__(self) -> None:
        """Refuse what has no meaning for its moment."""
        _all_of(Match, (self.match,), "rule: match")
        for key in ("exp_avg", "exp_avg_sq"):
            check_moment(key, getattr(self, key), f"rule {self.match}")

    def __str__(self) -> str:
        """As it stands in messages."""
        return (
            f"{str(self.match)!r} (exp_avg: {write(self.exp_avg)}, "
            f"exp_avg_sq: {write(self.exp_avg_sq)})"
        )


@dataclass(frozen=True)
class ResumePolicy:
    """One decision for every piece of optimizer state at a resume.

    Args:
        keep_hyperparameters: Keys of a param_group (for example ``"betas"``, ``"eps"``,
            ``"max_lr"``, ``"weight_decay"``) whose value comes from the checkpoint. Every other
            key comes from the current arguments.
        schedule: ``"args"``: the scheduler's values come from the current arguments, whether
            ``--override-opt_param-scheduler`` is given or not. ``"checkpoint"``: the scheduler's
            values and the group keys in `SCHEDULE_KEYS` come from the checkpoint, as with
            ``--use-checkpoint-opt_param-scheduler``.
        hyperparameters: Where the keys come from that are not named: ``"args"`` or
            ``"checkpoint"``.
        take_hyperparameters: Keys that come from the arguments although `hyperparameters` is
            ``"checkpoint"``.
        groups: Exceptions for some param_groups.
        preset: What is done to every element of the moments that no rule names, to ``step``, and
            which hyperparameters follow.
        rules: What is done to some elements of the moments. Two rules must not meet in one.
        step: ``"keep"``, ``"reset"`` (0) or a number; None for what the preset says.
        nonfinite: What to do about NaN or infinite moments in the checkpoint: ``"error"``,
            ``"reset"`` (those elements to 0) or ``"keep"``.
        strict: Whether a rule that matches nothing is an error (else a warning).
        schedule_position: ``"continue"`` or ``"restart"`` (num_steps = 0: a re-warm-up with kept
            moments); None: restarts if and only if the iteration is reset.
        grad_scaler: ``"keep"`` the loss scale of the checkpoint, or ``"reset"`` it to the
            arguments' initial one (fp16).
        reset_iteration: The iteration counts from 0 again.
        reset_dataloader: The data is read from its beginning again.
        phase: Name of the phase that begins here; tells it from another one with the same
            operations.

    Raises:
        PolicyError: A key is malformed, or is one that cannot be chosen.
    """

    keep_hyperparameters: tuple[str, ...] = ()
    schedule: Literal["args", "checkpoint"] = "args"
    hyperparameters: Literal["args", "checkpoint"] = "args"
    take_hyperparameters: tuple[str, ...] = ()
    groups: tuple[GroupRule, ...] = ()
    preset: Preset = KEEP_ALL
    rules: tuple[MomentRule, ...] = ()
    step: Step | None = None
    nonfinite: Literal["error", "reset", "keep"] = "error"
    strict: bool = True
    schedule_position: Literal["continue", "restart"] | None = None
    grad_scaler: Literal["keep", "reset"] = "keep"
    reset_iteration: bool = False
    reset_dataloader: bool = False
    phase: str = ""

    def __post_init__(self) -> None:
        """Normalise the keys and refuse what can never be carried out."""
        if self.schedule_position is not None:
            _one_of("schedule position", self.schedule_position, ("continue", "restart"))
        _one_of("grad_scaler", self.grad_scaler, ("keep", "reset"))
        for name in ("reset_iteration", "reset_dataloader"):
            if not isinstance(getattr(self, name), bool):
                raise PolicyError(f"{name}: expected true or false, found {getattr(self, name)!r}")
        if not isinstance(self.phase, str) or not re.fullmatch(r"[\w.-]*", self.phase, re.ASCII):
            raise PolicyError(
                f"--selective-phase: expected letters, digits, '.', '_' and '-', found "
                f"{self.phase!r}"
            )
        _one_of("schedule", self.schedule, ("args", "checkpoint"))
        _one_of("hyperparameters", self.hyperparameters, ("args", "checkpoint"))
        _one_of("nonfinite", self.nonfinite, ("error", "reset", "keep"))
        for name in ("keep_hyperparameters", "take_hyperparameters"):
            flag = f"--selective-{name.replace('_', '-')}"
            object.__setattr__(self, name, _keys(getattr(self, name), flag, name))
        both = sorted(set(self.keep_hyperparameters) & set(self.take_hyperparameters))
        if both:
            raise PolicyError(
                f"{', '.join(both)}: in --selective-keep-hyperparameters (from the checkpoint) and "
                "in --selective-take-hyperparameters (from the arguments); expected one"
            )
        for name, kind in (("groups", GroupRule), ("rules", MomentRule)):
            object.__setattr__(self, name, _all_of(kind, getattr(self, name), name))
        _all_of(Preset, (self.preset,), "preset")
        step = self.step
        number = isinstance(step, int) and not isinstance(step, bool) and step >= 0
        if not (step is None or step in ("keep", "reset") or number):
            raise PolicyError(
                f"--selective-step: expected keep, reset or a number of at least 0, found {step!r}"
            )

    def source(self, key: str, group: Mapping[str, Any]) -> tuple[bool, str]:
        """Whether a key of a current param_group comes from the checkpoint, and why.

        Args:
            key: The key.
            group: The current group, for the attributes that `groups` matches.

        Returns:
            True for the checkpoint; the reason in the user's words.

        Raises:
            PolicyError: Two group rules disagree.
        """
        if key in _NOT_HYPERPARAMETERS and not (key == "lr" and self.schedule == "checkpoint"):
            return False, "default"
        said = {
            rule: key in rule.keep
            for rule in self.groups
            if rule.fits(group) and key in (*rule.keep, *rule.take)
        }
        if len(set(said.values())) > 1:
            raise PolicyError(
                f"group rules {' and '.join(repr(str(r)) for r in said)} disagree about {key!r}: "
                "expected one to decide"
            )
        for rule, kept in said.items():
            return kept, f"group rule {str(rule)!r}"
        if key in self.keep_hyperparameters:
            return True, f"--selective-keep-hyperparameters {key}"
        if key in self.take_hyperparameters:
            return False, f"--selective-take-hyperparameters {key}"
        if self.schedule == "checkpoint" and key in SCHEDULE_KEYS:
            return True, "--use-checkpoint-opt_param-scheduler"
        if self.hyperparameters == "checkpoint":
            return True, "--selective-hyperparameters checkpoint"
        return False, "default"

    @property
    def named_keys(self) -> tuple[str, ...]:
        """All keys the user has named."""
        named = (k for rule in self.groups for k in (*rule.keep, *rule.take))
        return tuple(
            dict.fromkeys((*self.keep_hyperparameters, *self.take_hyperparameters, *named))
        )

    @property
    def kept_scheduler_attributes(self) -> tuple[str, ...]:
        """The scheduler attributes that come from the checkpoint because a key is kept."""
        keys = self.keep_hyperparameters
        if self.hyperparameters == "checkpoint":
            keys = tuple(k for k in SCHEDULER_ATTRIBUTES if k not in self.take_hyperparameters)
        names = [a for key in keys for a in SCHEDULER_ATTRIBUTES.get(key, ())]
        return tuple(dict.fromkeys(names))

    @property
    def next_step(self) -> Step:
        """What becomes of ``step``."""
        return self.preset.effect.step if self.step is None else self.step

    @property
    def restarts_schedule(self) -> bool:
        """Whether the scheduler's position, which counts samples, goes back to 0."""
        if self.schedule_position is None:
            return self.reset_iteration
        return self.schedule_position == "restart"

    @property
    def operations(self) -> tuple[str, ...]:
        """What must not be done twice to the same state, in words; hyperparameters are no part."""
        effect = self.preset.effect
        out = []
        if (effect.exp_avg, effect.exp_avg_sq, effect.step) != (KEEP, KEEP, "keep"):
            kept = " without exp_avg_sq" if "exp_avg_sq" in self.preset.decline else ""
            out.append(f"preset {self.preset}{kept}")
        changing = (r for r in self.rules if not (r.exp_avg == r.exp_avg_sq == KEEP))
        out += sorted(f"rule {_with_plain_numbers(rule)}" for rule in changing)
        said = {
            f"step {self.step}": self.step not in (None, "keep"),
            "iteration reset": self.reset_iteration,
            "data position reset": self.reset_dataloader,
            "schedule restart": self.restarts_schedule,
            "grad scaler reset": self.grad_scaler == "reset",
        }
        return (*out, *(text for text, done in said.items() if done))

    @property
    def needs_optimizer(self) -> bool:
        """Whether it asks for anything that comes only with the checkpoint's optimizer."""
        from_checkpoint = self.keep_hyperparameters or self.hyperparameters == "checkpoint"
        kept = any(rule.keep for rule in self.groups)
        goes_on = self.schedule_position == "continue"
        return bool(self.operations or from_checkpoint or kept or goes_on)

    def without_operations(self) -> ResumePolicy:
        """What is left of it to do where its operations have been done: the hyperparameters."""
        return replace(
            self,
            preset=replace(self.preset, moments=False),
            rules=(),
            step=None,
            schedule_position="continue",
            grad_scaler="keep",
            reset_iteration=False,
            reset_dataloader=False,
        )

    @property
    def changes_moments(self) -> bool:
        """Whether any element of the moments may get another value."""
        return any(o != KEEP for o in self._moment_operations())

    @property
    def overwrites_moments(self) -> bool:
        """Whether any element of the moments may be set without a look at its old value."""
        return not all(o.reads_old for o in self._moment_operations())

    @property
    def decides_moments(self) -> bool:
        """Whether it has rules for the moments, or a preset that may change them."""
        return self.changes_moments or bool(self.rules)

    @property
    def told_rules(self) -> tuple[tuple[str, Rule, Rule], ...]:
        """Each rule's match, and the preset last, and what is done to each moment; for people."""
        effect = self.preset.effect
        rules = ((str(r.match), r.exp_avg, r.exp_avg_sq) for r in self.rules)
        return (*rules, (f"preset {self.preset}", effect.exp_avg, effect.exp_avg_sq))

    def _moment_operations(self) -> list[Rule]:
        effect = self.preset.effect
        operations = [effect.exp_avg, effect.exp_avg_sq]
        return operations + [o for r in self.rules for o in (r.exp_avg, r.exp_avg_sq)]


def _keys(found: Any, where: str, what: str) -> tuple[str, ...]:
    if isinstance(found, str):
        raise PolicyError(
            f"{what}: expected a sequence of keys, found the string {found!r}; write [{found!r}]"
        )
    for key in found:
        if not isinstance(key, str) or not re.fullmatch(r"\w+", key):
            raise PolicyError(
                f"{where}: {key!r} is not a param_group key; "
                "expected names such as 'betas' or 'weight_decay', separated by spaces"
            )
        if key in _NOT_A_CHOICE:
            raise PolicyError(f"{where}: {key!r} cannot be kept: {_NOT_A_CHOICE[key]}")
    return tuple(dict.fromkeys(found))


def attributes(found: Any, where: str) -> tuple[tuple[str, Scalar], ...]:
    """Attributes of param_groups, as `has_attributes` takes them.

    Args:
        found: A mapping or pairs; text stands for the value that it is in a flag.
        where: What they are part of, for errors.

    Returns:
        Key and value, in the order of the keys.

    Raises:
        PolicyError: They are no pairs of a key and a plain value, or a key is there twice.
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


@functools.lru_cache(maxsize=256)
def _compiled(name: str) -> re.Pattern[str]:
    """A glob is translated anew at every `re.compile`, which is most of the time of a match."""
    return re.compile(name[3:] if name.startswith("re:") else fnmatch.translate(name))


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


def _all_of(kind: type, found: Any, where: str) -> tuple[Any, ...]:
    items = tuple(found)
    for item in items:
        if not isinstance(item, kind):
            raise PolicyError(f"{where}: expected {kind.__name__}, found {item!r}")
    return items


def _one_of(name: str, found: str, expected: tuple[str, ...]) -> None:
    if found not in expected:
        raise PolicyError(f"{name}: expected {' or '.join(map(repr, expected))}, found {found!r}")


def scalar(text: str) -> Scalar:
    """A value as it is written in a flag: a number, true, false, none, or the text itself."""
    named: dict[str, Scalar] = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _with_plain_numbers(rule: MomentRule) -> MomentRule:
    """An equal rule whose text is that of all rules equal to it: 1 and 1.0 are one number."""

    def whole(value: Scalar) -> Scalar:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def real(operation: Rule) -> Rule:
        numbers = {k: v + 0.0 for k, v in vars(operation).items() if k != "seed" and _number(v)}
        return type(operation)(**{**vars(operation), **numbers})

    group = tuple((key, whole(value)) for key, value in rule.match.group)
    return MomentRule(replace(rule.match, group=group), real(rule.exp_avg), real(rule.exp_avg_sq))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scalar_text(value: Scalar) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _equal(found: Any, wanted: Scalar) -> bool:
    found = found.item() if hasattr(found, "item") else found
    if isinstance(wanted, bool) or isinstance(found, bool):
        return bool(found) == bool(wanted) and found is not None
    return bool(found == wanted)
