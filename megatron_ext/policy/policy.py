"""The user's choices for a resume: `ResumePolicy`, validated without a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from ..checkpoint.state import LARGEST_STEP, NOT_HYPERPARAMETERS
from ..errors import PolicyError
from ..rules.base import Rule
from ..rules.elementwise import KEEP
from .checks import all_of, at_most, is_number, unique_keys
from .match import GroupRule, MomentRule, Scalar
from .parameter_map import NO_MAP, ParameterMap
from .presets import KEEP_ALL, Preset, Step
from .schema import PHASE_NAME, KeepOrReset, Masters, Nonfinite, Origin, Position

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
        hyperparameters: Source of the keys that are not named: ``"args"`` or ``"checkpoint"``.
        take_hyperparameters: Keys that come from the arguments although `hyperparameters` is
            ``"checkpoint"``.
        groups: Exceptions for some param_groups.
        preset: Change of every moment element that no rule covers, of ``step``, and of the
            hyperparameters that follow.
        rules: Changes of some moment elements. Two rules must not cover the same element.
        step: ``"keep"``, ``"reset"`` (0) or a number; None for the preset's choice.
        nonfinite: How to treat moments that Adam cannot use, in the checkpoint or after the
            rules: NaN, infinite, or negative in exp_avg_sq. ``"error"``, ``"reset"`` (those
            elements to 0) or ``"keep"``.
        master_weights: ``"checkpoint"``, or ``"model"``: the fp32 master weights are made from the
            weights that the model has loaded, for weights that were edited after the save.
        parameters: What is said about parameters that differ between checkpoint and model.
        strict: Whether a rule that matches nothing is an error (else a warning).
        schedule_position: ``"continue"`` or ``"restart"`` (num_steps = 0: a re-warm-up with kept
            moments); None restarts if and only if the iteration is reset.
        grad_scaler: ``"keep"`` the loss scale of the checkpoint, or ``"reset"`` it to the
            arguments' initial one (fp16).
        reset_iteration: The iteration counts from 0 again.
        reset_dataloader: The data is read from its beginning again.
        phase: Name of the phase that begins here; it distinguishes phases with the same
            operations.

    Raises:
        PolicyError: A key is malformed or cannot be chosen.
    """

    keep_hyperparameters: tuple[str, ...] = ()
    schedule: Origin = "args"
    hyperparameters: Origin = "args"
    take_hyperparameters: tuple[str, ...] = ()
    groups: tuple[GroupRule, ...] = ()
    preset: Preset = KEEP_ALL
    rules: tuple[MomentRule, ...] = ()
    step: Step | None = None
    nonfinite: Nonfinite = "error"
    master_weights: Masters = "checkpoint"
    parameters: ParameterMap = NO_MAP
    strict: bool = True
    schedule_position: Position | None = None
    grad_scaler: KeepOrReset = "keep"
    reset_iteration: bool = False
    reset_dataloader: bool = False
    phase: str = ""

    def __post_init__(self) -> None:
        """Normalise the keys and refuse a policy that can never be applied."""
        if self.schedule_position is not None:
            _one_of("schedule position", self.schedule_position, get_args(Position))
        _one_of("grad_scaler", self.grad_scaler, get_args(KeepOrReset))
        for name in ("reset_iteration", "reset_dataloader"):
            if not isinstance(getattr(self, name), bool):
                raise PolicyError(f"{name}: expected true or false, found {getattr(self, name)!r}")
        if not isinstance(self.phase, str) or not re.fullmatch(PHASE_NAME, self.phase):
            raise PolicyError(
                f"--selective-phase: expected letters, digits, '.', '_' and '-', found "
                f"{self.phase!r}"
            )
        _one_of("schedule", self.schedule, get_args(Origin))
        _one_of("hyperparameters", self.hyperparameters, get_args(Origin))
        _one_of("nonfinite", self.nonfinite, get_args(Nonfinite))
        _one_of("master_weights", self.master_weights, get_args(Masters))
        for name in ("keep_hyperparameters", "take_hyperparameters"):
            flag = f"--selective-{name.replace('_', '-')}"
            object.__setattr__(self, name, unique_keys(getattr(self, name), flag, name))
        both = sorted(set(self.keep_hyperparameters) & set(self.take_hyperparameters))
        if both:
            raise PolicyError(
                f"{', '.join(both)}: in --selective-keep-hyperparameters (from the checkpoint) and "
                "in --selective-take-hyperparameters (from the arguments); expected one"
            )
        for name, kind in (("groups", GroupRule), ("rules", MomentRule)):
            object.__setattr__(self, name, all_of(kind, getattr(self, name), name))
            at_most(getattr(self, name), name)
        all_of(Preset, (self.preset,), "preset")
        all_of(ParameterMap, (self.parameters,), "parameters")
        step = self.step
        if isinstance(step, int) and step > LARGEST_STEP:
            raise PolicyError(
                "--selective-step: expected keep, reset or a number of at least 0 and at most "
                f"{LARGEST_STEP}, found {step!r}"
            )
        number = isinstance(step, int) and not isinstance(step, bool) and step >= 0
        if not (step is None or step in ("keep", "reset") or number):
            raise PolicyError(
                f"--selective-step: expected keep, reset or a number of at least 0, found {step!r}"
            )

    def source(self, key: str, group: Mapping[str, Any]) -> tuple[bool, str]:
        """Decide whether a key of a current param_group comes from the checkpoint, and why.

        Args:
            key: The key.
            group: The current group, for the attributes that `groups` matches.

        Returns:
            True for the checkpoint; then the reason, which is the flag or rule that decides.

        Raises:
            PolicyError: Two group rules disagree.
        """
        # The scheduler computes lr before every step; it is kept with the whole schedule only.
        if key in NOT_HYPERPARAMETERS or (key == "lr" and self.schedule != "checkpoint"):
            return False, "default"
        decided = {
            rule: key in rule.keep
            for rule in self.groups
            if rule.fits(group) and key in (*rule.keep, *rule.take)
        }
        if len(set(decided.values())) > 1:
            names = " and ".join(repr(str(rule)) for rule in decided)
            raise PolicyError(f"group rules {names} disagree about {key!r}: expected one to decide")
        for rule, kept in decided.items():
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
        """All keys that the user has named."""
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
        """The change of ``step``."""
        return self.preset.effect.step if self.step is None else self.step

    @property
    def restarts_schedule(self) -> bool:
        """Whether the scheduler's position, which counts samples, goes back to 0."""
        if self.schedule_position is None:
            return self.reset_iteration
        return self.schedule_position == "restart"

    @property
    def operations(self) -> tuple[str, ...]:
        """Operations that must be done only once, in words. Hyperparameters do not count."""
        effect = self.preset.effect
        out = []
        if (effect.exp_avg, effect.exp_avg_sq, effect.step) != (KEEP, KEEP, "keep"):
            kept = " without exp_avg_sq" if "exp_avg_sq" in self.preset.decline else ""
            out.append(f"preset {self.preset}{kept}")
        changing = (r for r in self.rules if not (r.exp_avg == r.exp_avg_sq == KEEP))
        out += sorted(f"rule {_with_plain_numbers(rule)}" for rule in changing)
        out += self.parameters.operations()
        others = {
            f"step {self.step}": self.step not in (None, "keep"),
            "master weights from the model": self.master_weights == "model",
            "iteration reset": self.reset_iteration,
            "data position reset": self.reset_dataloader,
            "schedule restart": self.restarts_schedule,
            "grad scaler reset": self.grad_scaler == "reset",
        }
        return (*out, *(text for text, done in others.items() if done))

    @property
    def needs_optimizer(self) -> bool:
        """Whether the policy needs the optimizer state of the checkpoint."""
        from_checkpoint = self.keep_hyperparameters or self.hyperparameters == "checkpoint"
        kept = any(rule.keep for rule in self.groups)
        continues = self.schedule_position == "continue"
        return bool(self.operations or from_checkpoint or kept or continues)

    def without_operations(self) -> ResumePolicy:
        """Copy the policy without its one-time operations; the hyperparameters remain."""
        return replace(
            self,
            preset=replace(self.preset, moments=False),
            rules=(),
            step=None,
            master_weights="checkpoint",
            parameters=NO_MAP,
            schedule_position="continue",
            grad_scaler="keep",
            reset_iteration=False,
            reset_dataloader=False,
        )

    def facts(self) -> dict[str, Any]:
        """Return a name, for a message, and the value of every field."""
        return {f"policy, {f.name}": getattr(self, f.name) for f in fields(self)}

    @property
    def changes_moments(self) -> bool:
        """Whether any element of the moments may change."""
        return any(o != KEEP for o in self._moment_operations())

    @property
    def overwrites_moments(self) -> bool:
        """Whether any element of the moments may be set without reading its old value."""
        return not all(o.reads_old for o in self._moment_operations())

    @property
    def decides_moments(self) -> bool:
        """Whether the policy has rules for the moments, or a preset that may change them."""
        return self.changes_moments or bool(self.rules)

    @property
    def described_rules(self) -> tuple[tuple[str, Rule, Rule], ...]:
        """The match, the exp_avg rule and the exp_avg_sq rule of each rule; the preset is last."""
        effect = self.preset.effect
        rules = ((str(r.match), r.exp_avg, r.exp_avg_sq) for r in self.rules)
        return (*rules, (f"preset {self.preset}", effect.exp_avg, effect.exp_avg_sq))

    def _moment_operations(self) -> list[Rule]:
        effect = self.preset.effect
        operations = [effect.exp_avg, effect.exp_avg_sq]
        return operations + [o for r in self.rules for o in (r.exp_avg, r.exp_avg_sq)]


def _one_of(name: str, found: str, expected: tuple[str, ...]) -> None:
    if found not in expected:
        raise PolicyError(f"{name}: expected {' or '.join(map(repr, expected))}, found {found!r}")


def _with_plain_numbers(rule: MomentRule) -> MomentRule:
    """Normalise numbers so that equal rules have the same text: 1 and 1.0 are equal."""

    def whole(value: Scalar) -> Scalar:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def real(operation: Rule) -> Rule:
        numbers = {k: v + 0.0 for k, v in vars(operation).items() if k != "seed" and is_number(v)}
        return type(operation)(**{**vars(operation), **numbers})

    group = tuple((key, whole(value)) for key, value in rule.match.group)
    return MomentRule(replace(rule.match, group=group), real(rule.exp_avg), real(rule.exp_avg_sq))
